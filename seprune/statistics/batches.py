"""Batches of images from anybody's loader, shared among the processes."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, DistributedSampler

from seprune.data import Loader
from seprune.data.placement import resolve_task
from seprune.errors import InputError
from seprune.statistics.gate_gradients import image_keys
from seprune.tasks import Classification, Task
from seprune.tasks.batches import to_device


def open_batches(
    loader: Iterable[Any],
    device: torch.device,
    rank: int,
    world: int,
    *,
    task: Task | None = None,
    labelled: bool = False,
) -> tuple[Task, Any, Iterator[Any]]:
    """The task, the first batch for looking at the model, and this process's part of all batches.

    Args:
        labelled: the task has to be known for sure, as its targets are going to be used.
    """
    alike = isinstance(loader, DataLoader) and not isinstance(loader.sampler, DistributedSampler)
    part = slice(rank, None, world) if alike else slice(None)
    shared = isinstance(loader, Loader)
    batches = iter(loader.on(device) if shared else loader)  # type: ignore[attr-defined]
    first = next(batches, None)
    if first is None:
        raise _no_images()
    known = resolve_task(task, loader, first, labelled=labelled)
    rest: Iterator[Any] = itertools.chain([first], batches)
    if shared and world > 1:
        rest = iter(loader.on(device, rank, world))  # type: ignore[attr-defined]
        part = slice(None)
    return known, to_device(first, device), _placed(rest, device, part, known)


def _placed(batches: Iterator[Any], device: torch.device, part: slice, task: Task) -> Iterator[Any]:
    """The part of every batch that is this process's, where it gets any."""
    for batch in batches:
        if part != slice(None):
            if task.size(batch) <= part.start:
                continue
            batch = task.part(batch, part)
        if task.size(batch):
            yield to_device(batch, device)


def class_labels(task: Task, batch: Any) -> Tensor | None:
    """Class numbers (B,), where the targets are such."""
    if not isinstance(task, Classification):
        return None
    target = task.split(batch).target
    if (
        not isinstance(target, Tensor)
        or target.shape != (task.size(batch),)
        or target.is_floating_point()
    ):
        return None
    return target.long()


def start_graph(tensor: Tensor) -> Tensor:
    """Where a graph begins; whole numbers have no derivative."""
    return tensor.detach().requires_grad_() if tensor.is_floating_point() else tensor


def sample_keys(inputs: list[Tensor], size: int, seed: int) -> Tensor:
    """A key for each sample, of its first input."""
    if len(inputs[0]) == size and inputs[0].dim() > 1:
        return image_keys(inputs[0].detach(), seed)
    return torch.cat([image_keys(own.detach()[None], seed) for own in inputs])


def _no_images() -> InputError:
    return InputError(
        "no images to collect from",
        why="the loader gives no batch (a set smaller than a batch is dropped by drop_last)",
        fix="give more images, a smaller batch size, or drop_last=False",
    )


def count_images(loader: Any) -> int:
    """How many images the loader gives, 0 if it does not say."""
    if isinstance(loader, Loader):
        return loader.count
    try:
        batches, size = len(loader), getattr(loader, "batch_size", None) or 0
        return min(batches * size, len(loader.dataset))
    except (TypeError, AttributeError):
        return 0
