"""Batches of images from anybody's loader, shared among the processes."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, DistributedSampler

from seprune.data import Loader
from seprune.data.waiting import WaitingImages, unchanged, wait_for
from seprune.errors import InputError

Pair = tuple[Tensor, Tensor | None]


def open_batches(
    loader: Iterable[Any], device: torch.device, rank: int, world: int
) -> tuple[Pair, Iterator[Pair]]:
    """The first batch, for looking at the model, and this process's part of all batches."""
    whole = isinstance(loader, DataLoader) and not isinstance(loader.sampler, DistributedSampler)
    part = (rank, world) if whole else (0, 1)
    shared = isinstance(loader, Loader)
    batches = iter(loader.on(device) if shared else loader)  # type: ignore[attr-defined]
    first = next(batches, None)
    if first is None:
        raise _no_images()
    rest: Iterator[Any] = itertools.chain([first], batches)
    if shared and world > 1:
        rest = iter(loader.on(device, rank, world))  # type: ignore[attr-defined]
    pairs = (_pair(batch, device, *part) for batch in rest)
    return _pair(first, device, 0, 1), (pair for pair in pairs if len(pair[0]))


def take_images(loader: Iterable[Any], count: int, *, memory: int) -> WaitingImages:
    """The first `count` images of a loader, or all of them; waiting as bytes where it reads files.

    Args:
        memory: bytes; where they take more they wait on disk.

    Raises:
        InputError: no images, or images of several sizes.
    """
    given = count_images(loader)
    count = min(count, given) if given else count
    if isinstance(loader, Loader) and not loader.augment.cutout:
        pixels = loader.on(torch.device("cpu")).pixels()
        return wait_for(pixels, count, memory=memory, finish=loader.frame.normalise)
    _, pairs = open_batches(loader, torch.device("cpu"), 0, 1)
    return wait_for((images for images, _ in pairs), count, memory=memory, finish=unchanged)


def _pair(batch: Any, device: torch.device, rank: int, world: int) -> Pair:
    """(images, labels) of one process; labels are None where they are no class numbers."""
    images, labels = batch, None
    if isinstance(batch, (tuple, list)) and batch:
        images, labels = batch[0], batch[1] if len(batch) > 1 else None
    if not isinstance(images, Tensor) or images.dim() < 2:
        raise InputError(
            f"a batch of the loader is {type(batch).__name__}, not images or (images, labels)",
            why=f"its first part is {type(images).__name__}",
            fix="give a loader of tensors (B, C, H, W), or of pairs of images and labels",
        )
    if (
        not isinstance(labels, Tensor)
        or labels.shape != images.shape[:1]
        or labels.is_floating_point()
    ):
        labels = None
    images = images[rank::world].to(device, non_blocking=True)
    return images, None if labels is None else labels[rank::world].to(
        device, non_blocking=True
    ).long()


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
