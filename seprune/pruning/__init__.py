"""Scores and a budget become a plan, and a plan a smaller network."""
