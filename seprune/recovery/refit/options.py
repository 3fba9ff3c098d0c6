"""What a refit is asked to do, and what it gives back."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn

from seprune.errors import UsageError
from seprune.runtime.short_table import ShortTable, Tabular
from seprune.tasks import Task

_ROWS_PER_COLUMN, _IMAGES_PER_ROW = 32, 32
_FEWEST, _MOST = 1 << 12, 1 << 15


@dataclass(frozen=True)
class RefitOptions:
    """How to refit.

    Attributes:
        images: how many images of the loader are used.
        ridge: weight of the distance to the sliced weights, relative to the mean square of an
            input.
        rows: output positions per layer that enter its regression, spread over all images; None is
            32, or an image in 32 where they are more, for every input of an output (kernel x
            channels) of the parent's layer, at least 2^12 and at most 2^15.
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

    def __post_init__(self) -> None:
        """Refuse what no refit can be made with.

        Raises:
            UsageError: names the option.
        """
        whole = {"images": self.images, "gram": self.gram}
        whole |= {} if self.rows is None else {"rows": self.rows}
        for name, value in whole.items():
            if type(value) is not int or value < 1:
                raise _refused(name, value, "a whole number above 0")
        if not (isinstance(self.ridge, float | int) and 0 <= self.ridge < math.inf):
            raise _refused("ridge", self.ridge, "a finite number that is not negative")
        if self.precision not in ("float32", "float64"):
            raise _refused("precision", self.precision, "float32 or float64")

    def rows_of(self, columns: int, images: int) -> int:
        """Rows for a layer with so many inputs per output; docs/refit.md has the curve.

        With the images they grow as the forwards do, so that a refit costs the same share of them.
        """
        if self.rows is not None:
            return self.rows
        each = max(_ROWS_PER_COLUMN, images // _IMAGES_PER_ROW)
        return min(max(each * columns, _FEWEST), _MOST)


def _refused(name: str, value: object, wanted: str) -> UsageError:
    return UsageError(
        f"RefitOptions: {name}={value!r}",
        why=f"{name} is {wanted}",
        fix=f"give another {name}, or leave it out for the default",
    )


@dataclass(frozen=True, repr=False)
class Refitted(Tabular):
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

    def notes(self) -> tuple[str, ...]:
        """The warnings, and for every reason the layers that kept their sliced weights."""
        layers: dict[str, list[str]] = {}
        for layer, reason in self.skipped.items():
            layers.setdefault(reason, []).append(layer)
        kept = (f"not refitted: {_named(names)}: {reason}" for reason, names in layers.items())
        return (*self.warnings, *kept)

    def _short_table(self) -> ShortTable:
        title = f"refitted layers: {len(self.layers)}, skipped: {len(self.skipped)}"
        return ShortTable.of_errors(title, self.errors)


def _named(layers: Sequence[str], most: int = 3) -> str:
    more = len(layers) - most
    return ", ".join(layers[:most]) + (f" and {more} more" if more > 0 else "")
