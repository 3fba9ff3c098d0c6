"""Batches on the device of a stage, shared among the processes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, DistributedSampler

from seprune.data import Loader

Batches = Iterable[Any]  # of (images, labels, ...)


def share(
    loader: Batches, device: torch.device, rank: int, world: int, *, training: bool = False
) -> Loader | Placed:
    """This process's part of `loader`, on `device`.

    `training`: batches too small for every process to get a part are left out.
    """
    if isinstance(loader, Loader):
        return loader.on(device, rank, world)
    whole = isinstance(loader, DataLoader) and not isinstance(loader.sampler, DistributedSampler)
    return Placed(loader, device, *((rank, world) if whole else (0, 1)), training=training)


class Placed:
    """Somebody else's loader, each batch shared among the processes. Iterates as `Loader` does."""

    def __init__(
        self, loader: Batches, device: torch.device, rank: int, world: int, *, training: bool
    ):
        self.loader, self.device, self.rank, self.world = loader, device, rank, world
        self.least = world if training else 1
        self.batch_size = 0  # of the batch last given, over all processes

    def set_epoch(self, epoch: int, first: int = 0) -> None:
        """Pass the epoch on to a distributed sampler, and draw anew from the loader's generator."""
        sampler: Any = getattr(self.loader, "sampler", None)
        if hasattr(sampler, "set_epoch"):
            sampler.set_epoch(epoch)
        if getattr(self.loader, "generator", None) is not None:
            self.loader.generator.manual_seed(torch.initial_seed())  # type: ignore[attr-defined]

    def __len__(self) -> int:
        return length(self.loader)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for batch in self.loader:
            images, labels = (t[self.rank :: self.world] for t in (batch[0], batch[1]))
            self.batch_size = len(batch[0])
            if self.batch_size >= self.least and len(images):
                yield (
                    images.to(self.device, non_blocking=True),
                    labels.to(self.device, non_blocking=True),
                )


def length(loader: Any) -> int:
    """Batches that the loader gives; 0 if it does not say."""
    return len(loader) if hasattr(loader, "__len__") else 0
