"""A class for each pixel: cross-entropy over the pixels, mean intersection over union."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from seprune.errors import InputError
from seprune.tasks.batches import primary
from seprune.tasks.protocol import BaseTask, Meter, require_same_shape, soft_cross_entropy
from seprune.tasks.torchmetrics import TorchMeter, torch_metric


@dataclass(frozen=True)
class Segmentation(BaseTask):
    """Targets are class numbers (B, H, W); logits (B, K, h, w) are scaled to them.

    A single logit (B, 1, h, w) is that of class 1 against class 0.

    Attributes:
        inputs: leading elements of a tuple batch that are arguments of the model.
        ignore_index: a target that counts nowhere.
        auxiliary: weight of the loss of an output called `aux`, as torchvision trains.
    """

    inputs: int = 1
    ignore_index: int = 255
    auxiliary: float = 0.5
    name: ClassVar[str] = "segmentation"
    metric: ClassVar[str] = "miou"

    def losses(self, outputs: Any, target: Any) -> Tensor:
        """Cross-entropy, mean over the pixels of an image that count; 0 where none does.

        Raises:
            InputError: targets that are no masks, or classes that the model does not have.
        """
        loss = self._losses(primary(outputs), target)
        aux = outputs.get("aux") if isinstance(outputs, Mapping) else None
        if aux is not None and self.auxiliary:
            loss = loss + self.auxiliary * self._losses(aux, target)
        return loss

    def _losses(self, logits: Tensor, target: Any) -> Tensor:
        logits, masks = self.pair(logits, target)
        loss = F.cross_entropy(logits, masks, reduction="none", ignore_index=self.ignore_index)
        counted = (masks != self.ignore_index).sum((1, 2)).clamp(min=1)
        return loss.sum((1, 2)) / counted

    def distillation(self, outputs: Any, teacher: Any, *, temperature: float) -> Tensor:
        """T^2 KL of the classes at `temperature`, mean over the pixels."""
        own, taught = (_of_classes(primary(given)) for given in (outputs, teacher))
        require_same_shape(own, taught)
        pixels = [logits.movedim(1, -1).flatten(0, 2) for logits in (own, taught)]
        return soft_cross_entropy(*pixels, temperature=temperature)

    def meter(self) -> Meter:
        """Mean intersection over union over the classes that occur, and pixel accuracy."""
        return _SegmentationMeter(self)

    def pair(self, outputs: Any, target: Any) -> tuple[Tensor, Tensor]:
        """Logits (B, K, H, W) at the size of the masks, and masks (B, H, W)."""
        logits = primary(outputs).float()
        if isinstance(target, Tensor) and target.dim() == 4 and target.shape[1] == 1:
            target = target.squeeze(1)
        if (
            not isinstance(target, Tensor)
            or target.is_floating_point()
            or logits.dim() != 4
            or target.dim() != 3
        ):
            shape = tuple(target.shape) if isinstance(target, Tensor) else type(target).__name__
            raise InputError(
                f"targets {shape} are no masks for outputs {tuple(logits.shape)}",
                why="segmentation takes class numbers (B, H, W) and logits (B, classes, H, W)",
                fix="give masks of integers; for one class an image name --task classification",
            )
        logits, masks = _of_classes(logits), target.long()
        strange = (masks != self.ignore_index) & ((masks < 0) | (masks >= logits.shape[1]))
        if bool(strange.any()):
            raise InputError(
                f"a mask holds class {int(masks[strange][0])}, the model has {logits.shape[1]}",
                why=f"pixels are classes 0..{logits.shape[1] - 1} or {self.ignore_index} (ignored)",
                fix="use the data that the model was trained for, or set ignore_index",
            )
        if logits.shape[2:] != masks.shape[1:]:
            logits = F.interpolate(logits, masks.shape[1:], mode="bilinear", align_corners=False)
        return logits, masks


def _of_classes(logits: Tensor) -> Tensor:
    """Logits of two classes for a single one: their softmax is its sigmoid."""
    if logits.dim() == 4 and logits.shape[1] == 1:
        return torch.cat([torch.zeros_like(logits), logits], 1)
    return logits


class _SegmentationMeter(TorchMeter):
    def __init__(self, task: Segmentation) -> None:
        super().__init__(task.pair, self._metrics)
        self.ignore_index = task.ignore_index

    def _metrics(self, logits: Tensor) -> dict[str, Any]:
        facts = {"num_classes": logits.shape[1], "ignore_index": self.ignore_index}
        return {
            "miou": torch_metric("classification.MulticlassJaccardIndex", **facts),
            "pixel_accuracy": torch_metric(
                "classification.MulticlassAccuracy", average="micro", **facts
            ),
            # pixels by class of the mask, and by class of the answer
            "pixels": torch_metric("classification.MulticlassConfusionMatrix", **facts),
        }

    def by_class(self) -> list[float]:
        """Intersection over union of every class; NaN for those that are nowhere."""
        pixels = self.metrics["pixels"].compute().double()
        found = pixels.diag()
        everywhere = pixels.sum(0) + pixels.sum(1) - found
        return list((found / everywhere).tolist())
