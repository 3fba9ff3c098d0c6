"""Calibration samples that wait for their turn, whatever a task takes a batch to be."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

from seprune.data import Loader
from seprune.data.image_buffer import Column, WaitingImages, unchanged, wait_for
from seprune.data.joint import TargetLoader
from seprune.data.placement import resolve_task
from seprune.data.preprocessing import normalise
from seprune.errors import InputError
from seprune.runtime.inference import device_of
from seprune.statistics.batches import count_images, open_batches
from seprune.tasks import Task
from seprune.tasks.batches import positional, to_device


@dataclass(frozen=True)
class Several:
    """Samples of more than one tensor each; what is not per sample is of the first batch.

    Attributes:
        columns: a tensor of all samples for each leaf of a batch, or what all batches share.
    """

    columns: tuple[Any, ...]
    spec: TreeSpec
    count: int

    def __len__(self) -> int:
        return self.count

    def part(self, start: int, stop: int) -> Any:
        """Samples of these numbers, built as the loader builds its batches."""
        return self.rows(range(start, min(stop, self.count)))

    def rows(self, numbers: Sequence[int]) -> Any:
        """Samples of any numbers."""
        chosen = [c.rows(numbers) if isinstance(c, WaitingImages) else c for c in self.columns]
        return tree_unflatten(chosen, self.spec)


@dataclass(frozen=True)
class SizedImages:
    """Images of several sizes, as a detector takes them."""

    kept: tuple[Tensor, ...]

    def __len__(self) -> int:
        return len(self.kept)

    def part(self, start: int, stop: int) -> list[Tensor]:
        """Images of these numbers."""
        return list(self.kept[start:stop])

    def rows(self, numbers: Sequence[int]) -> list[Tensor]:
        """Images of any numbers."""
        return [self.kept[number] for number in numbers]


@dataclass(frozen=True)
class CalibrationInputs:
    """Calibration samples without their targets, and how a model is run on them."""

    task: Task
    kept: WaitingImages | Several | SizedImages

    def __len__(self) -> int:
        return len(self.kept)

    def part(self, start: int, stop: int, device: torch.device | None = None) -> Any:
        """Samples of these numbers as a batch that the task takes, by default on the CPU."""
        found = self.kept.part(start, stop)
        return found if device is None else to_device(found, device)

    def rows(self, numbers: Sequence[int], device: torch.device) -> Any:
        """Samples of any numbers as a batch."""
        return to_device(self.kept.rows(numbers), device)

    def forward(self, model: nn.Module, batch: Any) -> Any:
        """The model's outputs."""
        return self.task.forward(model, batch)

    def example(self, model: nn.Module) -> Any:
        """Two samples, or the only one twice, as the arguments of a forward, to record one."""
        sample = self.task.split(self.rows([0, min(1, len(self) - 1)], device_of(model)))
        return positional(model, sample.args, sample.kwargs)


def take_inputs(
    loader: Iterable[Any], count: int, *, memory: int, task: Task | None = None
) -> CalibrationInputs:
    """The first `count` samples of a loader, or all of them, without their targets.

    Args:
        memory: bytes; where they take more they wait on disk.
        task: by default that of the loader, or what the first batch looks like.

    Raises:
        InputError: no samples, or tensors whose shapes differ from batch to batch.
    """
    given = count_images(loader)
    count = min(count, given) if given else count
    plain = isinstance(loader, Loader) and not isinstance(loader, TargetLoader)
    if isinstance(loader, Loader) and plain and not loader.augment.cutout:
        here = loader.on(torch.device("cpu"))
        count = min(count, sum(map(len, here.own_rows())))
        finish = partial(normalise, preprocessing=loader.preprocessing)
        kept = wait_for(here.pixels(), count, memory=memory, finish=finish)
        return CalibrationInputs(resolve_task(task, loader, None, labelled=False), kept)
    task, _, batches = open_batches(loader, torch.device("cpu"), 0, 1, task=task)
    return CalibrationInputs(task, _keep(task, batches, count, memory))


def _keep(
    task: Task, batches: Iterator[Any], count: int, memory: int
) -> WaitingImages | Several | SizedImages:
    images: list[Tensor] = []
    parts: _Parts | None = None
    done = 0
    for batch in batches:
        own, size = task.unlabelled(batch), task.size(batch)
        if isinstance(own, list):
            images += own
        else:
            parts = parts or _Parts(own, size, count, memory)
            parts.add(own)
        done += size
        if done >= count:
            break
    if parts is not None:
        return parts.close()
    if any(image.shape != images[0].shape for image in images):
        return SizedImages(tuple(images[:count]))
    column = Column(count, memory)
    for image in images:
        column.add(image[None])
    return column.close(unchanged)


class _Parts:
    """A column for each tensor of a batch that is as long as the batch."""

    def __init__(self, batch: Any, size: int, count: int, memory: int) -> None:
        leaves, self.spec = tree_flatten(batch)
        self.columns = [
            Column(count, memory // len(leaves)) if _per_sample(leaf, size) else leaf
            for leaf in leaves
        ]

    def add(self, batch: Any) -> None:
        leaves, spec = tree_flatten(batch)
        if spec != self.spec:
            raise InputError(
                "the batches of the loader are not built alike",
                why=f"the first one is {self.spec}, another one {spec}",
                fix="give a loader whose batches all have the same parts",
            )
        for column, leaf in zip(self.columns, leaves, strict=True):
            if isinstance(column, Column):
                column.add(leaf)

    def close(self) -> WaitingImages | Several:
        kept = [c.close(unchanged) if isinstance(c, Column) else c for c in self.columns]
        if isinstance(kept[0], WaitingImages) and self.spec.is_leaf():
            return kept[0]
        counts = [len(c) for c in kept if isinstance(c, WaitingImages)]
        return Several(tuple(kept), self.spec, min(counts, default=0))


def _per_sample(leaf: Any, size: int) -> bool:
    return isinstance(leaf, Tensor) and leaf.dim() > 0 and len(leaf) == size
