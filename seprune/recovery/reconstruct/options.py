"""How to reconstruct, and what came of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import nn

from seprune.runtime.short_table import ShortTable, Tabular
from seprune.tasks import Task


@dataclass(frozen=True)
class ReconstructOptions:
    """How to reconstruct.

    Attributes:
        images: how many images of the loader are used, an eighth of them to judge by.
        epochs: passes over the images that are learned from.
        lr: peak rate of AdamW under a one-cycle schedule.
        batch_size: images of one step; its gradient is accumulated where memory is short.
        layers: weight of the mean relative error over the layers, beside that of the outputs.
        shift: largest random shift, as a fraction of the side of an image; 0 turns it off.
        flip: mirror half of the images.
        memory: bytes for the values that the backward pass needs; `auto` is a share of what the
            machine, the cgroup or the GPU has free.
        device: `auto`, `cpu`, `cuda`, ...
        folder: holds the state after each epoch; the same call in the same folder goes on there.
        seed: of the split, the order of the images, their shifts and flips.
        task: by default what the batches look like.
    """

    images: int = 2048
    epochs: int = 10
    lr: float = 1e-3
    batch_size: int = 128
    layers: float = 1.0
    shift: float = 0.125
    flip: bool = True
    memory: int | Literal["auto"] = "auto"
    device: str | torch.device = "auto"
    folder: Path | None = None
    seed: int = 0
    task: Task | None = None


@dataclass(frozen=True, repr=False)
class Reconstructed(Tabular):
    """The reconstructed network.

    Attributes:
        model: with the weights of the epoch that was best on the held-out images.
        errors: of the outputs on those images after each epoch, relative to the variance of the
            parent's; the first one is that of the network that was given.
        best: the number of the chosen epoch; 0 is the network that was given.
        layers: error of each layer's output on those images, before and after.
        held_out: how many images judged.
    """

    model: nn.Module
    errors: tuple[float, ...]
    best: int
    layers: Mapping[str, tuple[float, float]]
    held_out: int

    def _short_table(self) -> ShortTable:
        title = f"chosen: epoch {self.best} of {len(self.errors) - 1}" if self.best else (
            "chosen: the network given")  # fmt: skip
        outputs = (self.errors[0], self.errors[self.best])
        return ShortTable.of_errors(title, {"outputs": outputs, **self.layers})
