"""Images that wait for their turn: as bytes where they come from files, on disk if they are many.

Floats of a float loader stay floats. Whoever iterates over one part after the other gets float32
images, normalised.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from seprune.errors import InputError
from seprune.runtime.files import scratch

Finish = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class WaitingImages:
    """Images kept outside of the device.

    Attributes:
        kept: (N, ...) on the CPU or in a file without a name: uint8 pixels, or what a loader gave.
        finish: makes of a part of them what the network takes.
        arriving: where the images come from that are not there yet.
    """

    kept: Tensor
    finish: Finish
    arriving: Arriving | None = None

    def __len__(self) -> int:
        return len(self.kept)

    def part(self, start: int, stop: int) -> Tensor:
        """Images of these numbers, as the network takes them, on the CPU."""
        self._await(min(stop, len(self)))
        return self.finish(self.kept[start:stop])

    def rows(self, numbers: Sequence[int]) -> Tensor:
        """Images of any numbers."""
        self._await(max(numbers, default=-1) + 1)
        return self.finish(self.kept[list(numbers)])

    def _await(self, count: int) -> None:
        if self.arriving is not None:
            self.arriving.fill(count)


def wait_for(
    batches: Iterable[Tensor], count: int, *, memory: int, finish: Finish
) -> WaitingImages:
    """The first `count` images of `batches`; on disk where they take more than `memory`.

    They are read when they are asked for, so that the workers of a loader decode the next ones
    beside the computation.

    Raises:
        InputError: no images; as they come: images of several shapes, or fewer than `count`.
        EnvironmentFault: no space on the disk.
    """
    column = Column(count, memory)
    arriving = Arriving(iter(batches), column)
    arriving.fill(min(1, count))
    column.close(finish)
    assert column.kept is not None
    return WaitingImages(column.kept, finish, arriving)


@dataclass
class Arriving:
    """A column that is filled from batches as far as it is asked for."""

    batches: Iterator[Tensor] | None
    column: Column

    def fill(self, count: int) -> None:
        """Read on until so many images are there.

        Raises:
            InputError: there are not so many.
        """
        while self.batches is not None and self.column.done < count:
            batch = next(self.batches, None)
            if batch is None:
                raise InputError(
                    f"the loader ended after {self.column.done:,} images",
                    why=f"it says that it has {self.column.count:,} of them",
                    fix="give a loader whose length is the number of its images",
                )
            self.column.add(batch)
        if self.column.full:
            self.batches = None  # its workers end


class Column:
    """Tensors of samples, kept one behind the other until there are `count`."""

    def __init__(self, count: int, memory: int) -> None:
        self.count, self.memory, self.done = count, memory, 0
        self.kept: Tensor | None = None

    @property
    def full(self) -> bool:
        """Whether there is no place for more."""
        return self.done >= self.count

    def add(self, batch: Tensor) -> None:
        """Keep the samples of a batch, as far as there is place.

        Raises:
            InputError: they have another shape than those before.
            EnvironmentFault: no space on the disk.
        """
        part = batch[: self.count - self.done]
        if self.kept is None and len(part):
            self.kept = _space(self.count, part, self.memory)
        if self.kept is None:
            return
        if part.shape[1:] != self.kept.shape[1:]:
            raise InputError(
                f"images of several sizes: {_size(self.kept)} and {_size(part)}",
                why=f"image {self.done} is the first of another size",
                fix="give a loader that scales or crops its images to one size",
            )
        self.kept[self.done : self.done + len(part)] = part
        self.done += len(part)

    def close(self, finish: Finish) -> WaitingImages:
        """What was kept.

        Raises:
            InputError: nothing.
        """
        if self.kept is None or not self.done:
            raise InputError(
                "no images to refit on",
                why="the loader gives empty batches, or images=0 was asked for",
                fix="give a loader with calibration images",
            )
        return WaitingImages(self.kept[: self.done], finish)


def unchanged(images: Tensor) -> Tensor:
    """For images that a loader has made ready."""
    return images


def _space(count: int, like: Tensor, memory: int) -> Tensor:
    shape = (count, *like.shape[1:])
    size = like[0].numel() * like.element_size() * count
    if size <= memory:
        return torch.empty(shape, dtype=like.dtype)
    return scratch(size).view(like.dtype).view(shape)


def _size(images: Tensor) -> str:
    return "x".join(map(str, images.shape[1:]))
