"""What a refit is asked to do, and what it gives back."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn

from seprune.tasks import Task

_ROWS_PER_COLUMN = 32
_FEWEST, _MOST = 1 << 12, 1 << 15


@dataclass(frozen=True)
class RefitOptions:
    """How to refit.

    Attributes:
        images: how many images of the loader are used.
        ridge: weight of the distance to the sliced weights, relative to the mean square of an
            input.
        rows: output positions per layer that enter its regression, spread over all images; None is
            32 for every input of an output (kernel x channels) of the parent's layer, at least
            2^12 and at most 2^15.
        memory: bytes that the refit may use beside the networks and the images; `auto` is a share
            of what the machine, the cgroup or the GPU has free. Too little costs time: layers
            whose forwards cannot all wait cost a pass each.
        gram: bytes of one matrix of normal equations; wider layers are solved in blocks of inputs.
        precision: of the products that make the normal equations; their sums are float64.
            With a ridge below 1e-6 float32 is not enough.
        device: `auto`, `cpu`, `cuda`, ...
        task: by default what the batches look like.
    """

    images: int = 2048
    ridge: float = 1e-3
    rows: int | None = None
    memory: int | Literal["auto"] = "auto"
    gram: int = 512 << 20
    precision: Literal["float32", "float64"] = "float32"
    device: str | torch.device = "auto"
    task: Task | None = None

    def rows_of(self, columns: int) -> int:
        """Rows for a layer with so many inputs per output; docs/refit.md has the curve."""
        if self.rows is not None:
            return self.rows
        return min(max(_ROWS_PER_COLUMN * columns, _FEWEST), _MOST)


@dataclass(frozen=True)
class Refitted:
    """The refitted network.

    Attributes:
        layers: those that have new weights, in the order of the forward pass.
        skipped: those that kept their sliced weights: layer -> reason.
        errors: layer -> (before, after): mean squared error of its output on the calibration
            images, relative to the variance of the target.
        warnings: what happened on the way that does not make the result wrong.
    """

    model: nn.Module
    layers: tuple[str, ...]
    skipped: Mapping[str, str]
    errors: Mapping[str, tuple[float, float]]
    warnings: tuple[str, ...] = ()
