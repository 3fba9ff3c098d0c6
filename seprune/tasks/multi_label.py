"""Several classes for each image at once: binary cross-entropy, F1 and mean average precision."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from seprune.errors import InputError
from seprune.tasks.batches import primary
from seprune.tasks.protocol import BaseTask, Meter, require_same_shape
from seprune.tasks.torchmetrics import TorchMeter, torch_metric


@dataclass(frozen=True)
class MultiLabel(BaseTask):
    """Targets (B, K) in 0..1, one for each logit.

    Attributes:
        inputs: leading elements of a tuple batch that are arguments of the model.
    """

    inputs: int = 1
    name: ClassVar[str] = "multi_label"
    metric: ClassVar[str] = "f1"

    def losses(self, outputs: Any, target: Any) -> Tensor:
        """Binary cross-entropy, mean over the classes.

        Raises:
            InputError: targets of another shape, or outside 0..1.
        """
        logits, wanted = _pair(outputs, target)
        loss = F.binary_cross_entropy_with_logits(logits, wanted, reduction="none")
        return loss.mean(1)

    def distillation(self, outputs: Any, teacher: Any, *, temperature: float) -> Tensor:
        """T^2 times the binary KL of each class at `temperature`, mean over classes."""
        own, taught = primary(outputs).float(), primary(teacher).float()
        require_same_shape(own, taught)
        aim = torch.sigmoid(taught / temperature)
        cross = F.binary_cross_entropy_with_logits(own / temperature, aim)
        entropy = F.binary_cross_entropy_with_logits(taught / temperature, aim)
        return temperature**2 * (cross - entropy)

    def meter(self) -> Meter:
        """Macro F1 at probability 0.5, and mean average precision over the classes."""
        return TorchMeter(_probabilities, _metrics)


def _metrics(probabilities: Tensor) -> dict[str, Any]:
    count = probabilities.shape[1]
    return {
        "f1": torch_metric("classification.MultilabelF1Score", num_labels=count),
        "map": torch_metric("classification.MultilabelAveragePrecision", num_labels=count),
    }


def _probabilities(outputs: Any, target: Any) -> tuple[Tensor, Tensor]:
    """Probabilities and labels 0 or 1, both (B, K)."""
    logits, wanted = _pair(outputs, target)
    return logits.sigmoid(), (wanted >= 0.5).long()


def _pair(outputs: Any, target: Any) -> tuple[Tensor, Tensor]:
    logits = primary(outputs).float()
    if (
        not isinstance(target, Tensor)
        or target.shape != logits.shape
        or bool((target < 0).any() | (target > 1).any())
    ):
        shape = tuple(target.shape) if isinstance(target, Tensor) else type(target).__name__
        raise InputError(
            f"targets {shape} are no labels of logits {tuple(logits.shape)}",
            why="multi_label takes a number in 0..1 for each image and class",
            fix="for one class number an image name --task classification, "
            "for other numbers --task regression",
        )
    return logits, target.float()
