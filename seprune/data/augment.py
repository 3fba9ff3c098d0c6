"""Random crops, flips and cutout for whole batches, every draw a function of (seed, epoch, row)."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F


@dataclass(frozen=True)
class Augment:
    """What training does to an image.

    `pad`: zero padding before a random crop back to size. `resized_crop`: a random part of the
    original, 8 to 100 % of its area, scaled to size, in place of the padded crop. `cutout`: side
    of the square that is blanked. `randaugment`: two random operations of RandAugment
    (arXiv:1909.13719).
    """

    pad: int = 0
    flip: bool = False
    cutout: int = 0
    resized_crop: bool = False
    randaugment: bool = False


def seed_of(*key: int) -> int:
    """A 63-bit seed that depends on every number of `key`."""
    return int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0] >> 1)


def generator(*key: int) -> torch.Generator:
    """A CPU generator seeded by `key`: CPU, so that every device sees the same draws."""
    return torch.Generator().manual_seed(seed_of(*key))


@dataclass(frozen=True)
class Draws:
    """One epoch's random numbers, one per row: offsets (N, 2), flips (N,), centres (N, 2)."""

    offsets: Tensor
    flips: Tensor
    centres: Tensor

    def to(self, device: torch.device) -> Draws:
        return Draws(self.offsets.to(device), self.flips.to(device), self.centres.to(device))

    def take(self, rows: Tensor) -> Draws:
        return Draws(self.offsets[rows], self.flips[rows], self.centres[rows])


def draw(augment: Augment, count: int, size: tuple[int, int], *, key: tuple[int, ...]) -> Draws:
    """The random numbers of one epoch over `count` images of `size` (H, W)."""
    source = generator(*key)
    offsets = torch.randint(0, 2 * augment.pad + 1, (count, 2), generator=source)
    flips = torch.rand(count, generator=source) < 0.5
    centres = (torch.rand(count, 2, generator=source) * torch.tensor(size)).long()
    return Draws(offsets, flips & augment.flip, centres)


def crop_and_flip(images_BCHW: Tensor, draws: Draws, *, pad: int) -> Tensor:
    """Each image padded by zeros, cut back to size at its offset and mirrored by its flip."""
    height, width = images_BCHW.shape[-2:]
    device = images_BCHW.device
    rows = draws.offsets[:, :1] + torch.arange(height, device=device)
    ahead = torch.arange(width, device=device)
    columns = draws.offsets[:, 1:] + torch.where(draws.flips[:, None], ahead.flip(0), ahead)
    padded = F.pad(images_BCHW, (pad, pad, pad, pad)) if pad else images_BCHW
    batch = torch.arange(len(images_BCHW), device=device)
    # Indexing puts the channel last; the permuted view is a channels_last (B, C, H, W).
    taken = padded.permute(0, 2, 3, 1)[batch[:, None, None], rows[:, :, None], columns[:, None, :]]
    return taken.permute(0, 3, 1, 2)


def cutout(images_BCHW: Tensor, centres: Tensor, *, side: int) -> Tensor:
    """Zeros in a square of `side` around each centre (arXiv:1708.04552); the border may cut it."""
    height, width = images_BCHW.shape[-2:]
    device = images_BCHW.device
    reach = torch.arange(side, device=device) - side // 2
    rows = (centres[:, :1] + reach)[:, :, None] == torch.arange(height, device=device)
    columns = (centres[:, 1:] + reach)[:, :, None] == torch.arange(width, device=device)
    blank = rows.any(1)[:, None, :, None] & columns.any(1)[:, None, None, :]
    return images_BCHW.masked_fill(blank, 0)
