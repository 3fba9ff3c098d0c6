"""Where a training stands, and how its candidates are ranked."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

from seprune.measure.metrics import Evaluation

MANY = 1000  # images, below which one more right answer is luck


@dataclass
class Progress:
    """Where training stands; with a snapshot of its state, all that a resumed run needs."""

    epoch: int = 0
    step: int = 0
    loss: float = 0.0
    lr_scale: float = 1.0
    rollbacks: int = 0
    best_epoch: int = -1
    best: tuple[float, float] = (-math.inf, 0.0)
    history: list[dict[str, Any]] = field(default_factory=list)
    before: dict[str, Any] | None = None
    recalibrated: dict[str, Any] | None = None
    chosen: str = "start"
    lr: float = 0.0
    trials: list[dict[str, float]] = field(default_factory=list)


class DivergedError(Exception):
    """The loss, or an output on the validation images, is no number any more."""


def rank_of(score: Evaluation) -> tuple[float, float]:
    """Higher is better: the metric, then loss; the other way round on few images."""
    loss = score.loss if math.isfinite(score.loss) else math.inf
    return (score.rank, -loss) if score.count >= MANY else (-loss, score.rank)
