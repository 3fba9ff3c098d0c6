"""What metrics are called, and how their values are written, wherever people read them."""

from __future__ import annotations

TITLES = {
    "top1": "top-1",
    "top5": "top-5",
    "miou": "mIoU",
    "pixel_accuracy": "pixel accuracy",
    "map": "mAP",
    "map50": "mAP at 0.5",
    "f1": "F1",
    "r2": "R2",
    "mae": "MAE",
    "recall@1": "recall@1",
}
FRACTIONS = {"top1", "top5", "miou", "pixel_accuracy", "map", "map50", "f1", "recall@1"}


def metric_title(metric: str) -> str:
    """The usual name of a metric; its own where none is known."""
    return TITLES.get(metric, metric)


def metric_value(metric: str, value: float | None, digits: int = 2) -> str:
    """A fraction in percent, any other number as it is; a dash for none."""
    if value is None:
        return "–"
    return f"{100 * value:.{digits}f} %" if metric in FRACTIONS else f"{value:.{digits + 2}g}"
