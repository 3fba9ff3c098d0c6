"""Which output positions of a layer enter its regression: the same share of every image."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from seprune.recovery.refit.products import sampled


@dataclass(frozen=True)
class Sampling:
    """How many rows a layer gets from all images; a function of shapes alone.

    Attributes:
        images: of the calibration set, over all processes.
        rows: at most so many output positions per layer.
    """

    images: int
    rows: int

    def index(self, positions: int, samples: int, *, first: int, images: int) -> Tensor:
        """Flat positions (samples, P) of a tensor with `samples` in its first dimension.

        Args:
            first: number of the batch's first image.
            images: of the batch; where the samples are more, each image has several.
        """
        each = -(-samples // images)
        some = min(positions, -(-self.rows // (self.images * each)))
        return _index(positions, some, first * each, samples)


@lru_cache(maxsize=256)  # layers of one size, and both networks, take the same positions
def _index(positions: int, some: int, first: int, samples: int) -> Tensor:
    turns = torch.arange(first, first + samples)[:, None] * some
    return _order(positions)[(turns + torch.arange(some)) % positions]


@lru_cache(maxsize=64)
def _order(positions: int) -> Tensor:
    return torch.randperm(positions, generator=torch.Generator().manual_seed(0))


@dataclass(frozen=True)
class Reader:
    """Takes the sampled rows of a batch out of a feature map as it flows by: (channels, rows).

    Attributes:
        dim: of the channels.
        keep: the channels wanted, None for all.
    """

    sampling: Sampling
    first: int
    images: int
    dim: int
    keep: Tensor | None

    def __call__(self, values: Tensor) -> Tensor:
        positions = values[0].numel() // values.shape[self.dim]
        index = self.sampling.index(
            positions, len(values), first=self.first, images=self.images
        ).to(values.device)
        rows = sampled(values, index, dim=self.dim).permute(2, 0, 1)
        keep = self.keep
        rows = rows.clone() if keep is None else rows.index_select(0, keep.to(rows.device))
        return rows.flatten(1)
