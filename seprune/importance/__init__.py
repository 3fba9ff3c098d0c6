"""One score per unit of every dependency group: higher means keep."""

from seprune.importance.criteria import (
    CRITERIA,
    Importance,
    Scoring,
    collecting,
    criterion,
    score,
)

__all__ = ["CRITERIA", "Importance", "Scoring", "collecting", "criterion", "score"]
