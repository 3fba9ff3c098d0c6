"""One score per unit of every dependency group: higher means keep."""

from seprune.importance.criteria import (
    CRITERIA,
    Importance,
    Scoring,
    criterion,
    score,
)

__all__ = ["CRITERIA", "Importance", "Scoring", "criterion", "score"]
