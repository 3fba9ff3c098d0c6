"""Batches on the device of a stage, shared among the processes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch.utils.data import DataLoader, DistributedSampler

from seprune.data import Loader
from seprune.tasks import Task, infer_task, unlabelled_task
from seprune.tasks.batches import to_device

Batches = Iterable[Any]  # of whatever the task splits into inputs and target


def resolve_task(task: Task | None, loader: Any, batch: Any, *, labelled: bool = True) -> Task:
    """The task given, that of the loader, or what a batch looks like.

    Without `labelled` any target will do, as none is looked at.

    Raises:
        InputError: it was not given, and the batch does not say; names those that would fit.
    """
    infer = infer_task if labelled else unlabelled_task
    return task or getattr(loader, "task", None) or infer(batch)


def share(
    loader: Batches,
    device: torch.device,
    rank: int,
    world: int,
    *,
    training: bool = False,
    task: Task | None = None,
) -> Loader | Placed:
    """This process's part of `loader`, on `device`.

    `training`: batches too small for every process to get a part are left out.
    """
    if isinstance(loader, Loader):
        return loader.on(device, rank, world)
    alike = isinstance(loader, DataLoader) and not isinstance(loader.sampler, DistributedSampler)
    part = (rank, world) if alike else (0, 1)
    return Placed(loader, device, *part, training=training, task=task)


class Placed:
    """Somebody else's loader, each batch shared among the processes; batches as it gives them."""

    def __init__(
        self,
        loader: Batches,
        device: torch.device,
        rank: int,
        world: int,
        *,
        training: bool,
        task: Task | None = None,
    ):
        self.task = task or getattr(loader, "task", None)
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

    def __iter__(self) -> Iterator[Any]:
        for batch in self.loader:
            task = resolve_task(self.task, self.loader, batch, labelled=False)
            self.batch_size = task.size(batch)
            mine = batch
            if self.world > 1:
                if self.batch_size < self.least or self.batch_size <= self.rank:
                    continue
                mine = task.part(batch, slice(self.rank, None, self.world))
            if self.batch_size:
                yield to_device(mine, self.device)


def length(loader: Any) -> int:
    """Batches that the loader gives; 0 if it does not say."""
    return len(loader) if hasattr(loader, "__len__") else 0
