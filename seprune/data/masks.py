"""Masks beside images, checked before any work: their sizes, and the classes of their pixels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
from torch import Tensor

from seprune.data.loaders import in_threads
from seprune.errors import InputError
from seprune.runtime.progress import silent

IGNORED = 255  # of pixels that count nowhere


class MaskSplit(Protocol):
    """A split with a mask for each row."""

    labels: Tensor

    def target(self, row: int) -> np.ndarray[Any, Any]:
        """Class numbers (H, W)."""
        ...

    def size(self, row: int) -> tuple[int, int]:
        """(H, W) of the image."""
        ...

    def mask_name(self, row: int) -> str:
        """What people know the mask by."""
        ...


def classes_in(splits: Sequence[MaskSplit], names: Sequence[str] = ()) -> tuple[str, ...]:
    """The classes of all masks, each of which is read once: `names`, or as many as they show.

    Raises:
        InputError: a mask of another size than its image, without a class, or with one beyond
            `names`; names it.
    """
    largest = max(_largest(split, len(names)) for split in splits)
    return tuple(names) or tuple(str(number) for number in range(max(largest + 1, 2)))


def _largest(split: MaskSplit, classes: int) -> int:
    """The largest class of a split; of `classes` if there are any."""
    largest = [0] * len(split.labels)

    def look(row: int) -> None:
        mask, size = split.target(row), split.size(row)
        counted = mask[mask != IGNORED]
        wrong: tuple[str, str] | None = None
        if mask.shape != size:
            wrong = f"{mask.shape[0]}x{mask.shape[1]} pixels", f"its image has {size[0]}x{size[1]}"
        elif not counted.size:
            wrong = "an empty mask", f"every pixel is {IGNORED}, which counts nowhere"
        elif counted.min() < 0 or (classes and counted.max() >= classes):
            top = int(counted.max() if counted.min() >= 0 else counted.min())
            wrong = f"pixels of class {top}", f"classes.txt names {classes}, the first is 0"
        elif counted.max() > IGNORED:
            wrong = f"pixels of class {int(counted.max())}", "there can be 255 classes at most"
        if wrong:
            raise InputError(
                f"{split.mask_name(row)}: {wrong[0]}",
                why=wrong[1],
                fix="correct the mask, or remove it and its image",
                code="mask",
            )
        largest[row] = int(counted.max())

    in_threads(look, len(largest), label="checking masks", track=silent)
    return max(largest)
