"""Where a training stands, and how its candidates are ranked."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

from seprune.measure.metrics import Evaluation
from seprune.recovery.finetune.checkpoints import start_again
from seprune.recovery.finetune.settings import Epoch
from seprune.runtime.typed import Natural, Positive, typed

MANY = 1000  # images, below which one more right answer is luck


@dataclass
class Progress:
    """Where training stands; with a snapshot of its state, all that a resumed run needs."""

    epoch: Natural = 0
    step: Natural = 0
    loss: float = 0.0
    lr_scale: float = 1.0
    rollbacks: Natural = 0
    best_epoch: int = -1
    best: tuple[float, float] = (-math.inf, 0.0)
    history: list[Epoch] = field(default_factory=list)
    before: Evaluation | None = None
    recalibrated: Evaluation | None = None
    chosen: str = "start"
    lr: float = 0.0
    trials: list[dict[str, float]] = field(default_factory=list)

    def __post_init__(self) -> None:
        if len(self.history) != self.epoch or not -1 <= self.best_epoch < max(self.epoch, 1):
            raise ValueError(f"{len(self.history)} epochs, {self.epoch} done")
        for score in (self.before, self.recalibrated):
            if score is not None and score.metric not in score.metrics:
                raise ValueError(f"a score without its metric '{score.metric}'")


@dataclass(frozen=True)
class StepFacts:
    """The plain numbers of a `TrainState`."""

    parts: Positive
    updates: Natural
    scaler: dict[str, Any] | None = None


@dataclass(frozen=True)
class SavedFacts:
    """What a generation on disk says beside its tensors."""

    at: Progress
    state: StepFacts
    identity: dict[str, str]

    @classmethod
    def of(cls, content: Any, source: str) -> SavedFacts:
        """The facts of a generation in the folder `source`."""
        return typed(cls, content, source=source, fix=start_again(source), code="damaged")


class DivergedError(Exception):
    """The loss, or an output on the validation images, is no number any more."""


def rank_of(score: Evaluation) -> tuple[float, float]:
    """Higher is better: the metric, then loss; the other way round on few images."""
    loss = score.loss if math.isfinite(score.loss) else math.inf
    return (score.rank, -loss) if score.count >= MANY else (-loss, score.rank)
