"""One class for each image: cross-entropy, top-1 and top-5."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from seprune.errors import InputError
from seprune.runtime.distributed import sum_over_processes
from seprune.tasks.batches import primary
from seprune.tasks.protocol import BaseTask, Meter, single_logit, soft_cross_entropy


@dataclass(frozen=True)
class Classification(BaseTask):
    """Targets are class numbers (B,), or probabilities (B, K) that sum to 1.

    Attributes:
        inputs: leading elements of a tuple batch that are arguments of the model.
        smoothing: of the labels, in training.
    """

    inputs: int = 1
    smoothing: float = 0.0
    name: ClassVar[str] = "classification"
    metric: ClassVar[str] = "top1"

    def loss(self, outputs: Any, target: Any) -> Tensor:
        """Mean cross-entropy.

        Raises:
            InputError: targets that are no classes.
        """
        logits = logits_of(outputs).float()
        return F.cross_entropy(logits, _classes(target, logits), label_smoothing=self.smoothing)

    def labels(self, target: Any, logits: Tensor) -> Tensor:
        """Class numbers (B,) int64, or probabilities (B, K).

        Raises:
            InputError: targets that are no classes of these logits.
        """
        return _classes(target, logits)

    def losses(self, outputs: Any, target: Any) -> Tensor:
        """Cross-entropy of every image, without smoothing."""
        logits = logits_of(outputs).float()
        target = _classes(target, logits)
        if not target.is_floating_point():
            target = target.clamp(0, logits.shape[1] - 1)  # the meter counts strange ones
        return F.cross_entropy(logits, target, reduction="none")

    def distillation(self, outputs: Any, teacher: Any, *, temperature: float) -> Tensor:
        """T^2 KL of the classes at `temperature`."""
        return soft_cross_entropy(logits_of(outputs), logits_of(teacher), temperature=temperature)

    def meter(self) -> Meter:
        """Top-1 and top-5; equal logits are ranked by class number."""
        return _TopK()


class _TopK:
    def __init__(self) -> None:
        self.sums: Tensor | None = None  # top1, top5, count, labels out of range
        self.classes = 0

    def update(self, outputs: Any, target: Any) -> None:
        logits = logits_of(outputs).float()
        labels = _classes(target, logits)
        if labels.is_floating_point():
            labels = labels.argmax(1)
        self.classes = classes = logits.shape[1]
        strange = (labels < 0) | (labels >= classes)
        labels = labels.clamp(0, classes - 1)
        finite = logits.isfinite().all(1)
        own = logits.gather(1, labels[:, None])
        earlier = torch.arange(classes, device=logits.device) < labels[:, None]
        place = ((logits > own) | ((logits == own) & earlier)).sum(1)
        columns = ((place < 1) & finite, (place < 5) & finite, torch.ones_like(finite), strange)
        sums = torch.stack([column.double().sum() for column in columns])
        self.sums = sums if self.sums is None else self.sums + sums

    def compute(self) -> dict[str, float]:
        own = torch.zeros(4, dtype=torch.float64) if self.sums is None else self.sums
        top1, top5, count, strange = sum_over_processes(own).tolist()
        if strange:
            raise InputError(
                f"{strange:.0f} of {count:.0f} labels are outside 0..{self.classes - 1}",
                why=f"the model has {self.classes} outputs",
                fix="evaluate on the data the model was trained for, or set the number of classes",
            )
        return {"top1": top1 / count, "top5": top5 / count}


def logits_of(output: Any) -> Tensor:
    """The class logits (B, C) in a model's output; auxiliary outputs are left aside.

    Raises:
        InputError: there is no such table.
    """
    logits = primary(output)
    if logits.ndim != 2:
        raise InputError(
            "the model's output is no table of class logits (images, classes), but "
            f"{tuple(logits.shape)}",
            why="classes are scored by one number each",
            fix="wrap the model so that it returns a tensor (B, C), or name the task, such as "
            "--task segmentation",
        )
    return logits


def _classes(target: Any, logits: Tensor) -> Tensor:
    """Class numbers or probabilities, checked against the logits."""
    if isinstance(target, Tensor) and not target.is_floating_point():
        if target.shape == logits.shape[:1]:
            if logits.shape[1] == 1:
                raise single_logit()
            return target.long()
    elif isinstance(target, Tensor) and target.shape == logits.shape:
        sums = target.detach().sum(1)
        if logits.shape[1] > 1 and torch.allclose(sums, torch.ones_like(sums), atol=1e-3):
            return target
    shape = tuple(target.shape) if isinstance(target, Tensor) else type(target).__name__
    kind = str(target.dtype).removeprefix("torch.") if isinstance(target, Tensor) else ""
    raise InputError(
        f"targets {kind} {shape} are no classes of logits {tuple(logits.shape)}".replace("  ", " "),
        why="classification takes class numbers (B,), or probabilities (B, C) that sum to 1",
        fix="name the task that fits: --task multi_label, --task regression or --task segmentation",
    )
