"""Accuracy regained after a cut: BatchNorm statistics, closed-form refit, fine-tuning."""
