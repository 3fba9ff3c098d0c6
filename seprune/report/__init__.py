"""Measurements become JSON, CSV, terminal tables, one HTML file, a model card.

measurement  the plain data: Report and its parts, exact numbers, to and from JSON
words        how numbers are written, and what the gates say in sentences
figures      Report -> plotly figures as plain dicts
html         one offline page a run, or a comparison (page.html.j2, page.css, page.js)
terminal     the same at 80 columns
training     loss and metric by epoch: read, drawn, as a table
drawing      a small drawing of the network
table        one CSV row a channel
compare      several runs: rows, means over seeds, the Pareto front
artefacts    what was measured of exported files
card         the README.md of a saved folder
picture      accuracy against FLOPs as a PNG, for the card
"""

from seprune.report.measurement import (
    BudgetReport,
    ClassExamples,
    GateSummary,
    GroupCut,
    Measurement,
    Report,
    TrainedEpoch,
    TrainingCurve,
)

__all__ = [
    "BudgetReport",
    "ClassExamples",
    "GateSummary",
    "GroupCut",
    "Measurement",
    "Report",
    "TrainedEpoch",
    "TrainingCurve",
]
