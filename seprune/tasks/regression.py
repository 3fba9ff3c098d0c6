"""Numbers: mean squared error, R2 and mean absolute error."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from seprune.errors import InputError
from seprune.tasks.batches import primary
from seprune.tasks.protocol import BaseTask, Meter
from seprune.tasks.torchmetrics import TorchMeter, torch_metric


@dataclass(frozen=True)
class Regression(BaseTask):
    """Targets (B,) or (B, K); a model that gives (B, 1) may have targets (B,).

    Attributes:
        inputs: leading elements of a tuple batch that are arguments of the model.
    """

    inputs: int = 1
    name: ClassVar[str] = "regression"
    metric: ClassVar[str] = "r2"

    def losses(self, outputs: Any, target: Any) -> Tensor:
        """Squared error, mean over the numbers of a sample.

        Raises:
            InputError: targets of another shape.
        """
        own, wanted = _pair(outputs, target)
        return (own - wanted).square().mean(1)

    def meter(self) -> Meter:
        """R2 (mean over the outputs), and mean absolute error."""
        return TorchMeter(_numbers, _metrics)


def _metrics(outputs: Tensor) -> dict[str, Any]:
    return {
        "r2": torch_metric("regression.R2Score"),
        "mae": torch_metric("regression.MeanAbsoluteError"),
    }


def _numbers(outputs: Any, target: Any) -> tuple[Tensor, Tensor]:
    """Both as (B,) of one number for a sample, else as (B, K)."""
    own, wanted = _pair(outputs, target)
    return own.squeeze(1), wanted.squeeze(1)


def _pair(outputs: Any, target: Any) -> tuple[Tensor, Tensor]:
    """Both as (B, K)."""
    own = primary(outputs).float()
    flat = own.flatten(1) if own.dim() > 1 else own[:, None]
    if not isinstance(target, Tensor) or target.numel() != flat.numel() or not len(target):
        shape = tuple(target.shape) if isinstance(target, Tensor) else type(target).__name__
        raise InputError(
            f"targets {shape} do not fit outputs {tuple(own.shape)}",
            why="regression compares number by number",
            fix="give as many numbers for each sample as the model has outputs; for class numbers "
            "name --task classification",
        )
    return flat, target.float().reshape(flat.shape)
