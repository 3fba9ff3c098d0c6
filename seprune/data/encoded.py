"""Images that lie in memory or in the middle of a file, with their classes or masks."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol, Self

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from seprune.data import fingerprint
from seprune.data.decode import (
    encoded_size,
    mode_of,
    range_of,
    read_encoded,
    read_encoded_indices,
)
from seprune.data.deep_pixels import Range, scale_notes
from seprune.data.source import REPORTED, SPLIT_SEED, Source, set_aside, stratified

LOOKED_AT = 16  # images, to know their mode and their size
MOST_CLASSES = 100_000
DEEP = 256  # images that may tell the scale of those with more than 8 bits


class Contents(Protocol):
    """Where the bytes of images are."""

    def read(self, row: int) -> bytes: ...

    def name(self, row: int) -> str:
        """What people know an image by."""
        ...

    def holders(self) -> Sequence[Path]:
        """The files that hold the images; none where they are in memory."""
        ...


@dataclass
class Encoded:
    """A split whose images are read as the bytes of their files.

    Attributes:
        labels: (N,) int64.
        rows: of `contents`, one for each label.
        scale: of images with more than 8 bits.
    """

    contents: Contents
    labels: Tensor
    rows: Tensor
    mode: str = "RGB"
    scale: Range | None = None

    def __call__(self, row: int) -> Image.Image:
        name = self.contents.name(int(self.rows[row]))
        return read_encoded(self.read(row), name, self.mode, self.scale)

    def read(self, row: int) -> bytes:
        """The bytes of an image."""
        return self.contents.read(int(self.rows[row]))

    def sample(self, row: int) -> bytes:
        """What tells a sample, beside its label, from another one."""
        return self.read(row)

    def take(self, rows: Tensor) -> Self:
        """Some of the images, in this order."""
        return replace(self, labels=self.labels[rows], rows=self.rows[rows])

    def without(self, rows: set[int]) -> Self:
        """All but some, which are damaged."""
        return self.take(torch.tensor([i for i in range(len(self.labels)) if i not in rows]))


@dataclass(kw_only=True)
class EncodedMasks(Encoded):
    """The same with a mask for each image.

    Attributes:
        masks: as `contents`, of the same rows.
    """

    masks: Contents

    def target(self, row: int) -> np.ndarray[Any, Any]:
        """Class numbers (H, W)."""
        number = int(self.rows[row])
        return read_encoded_indices(self.masks.read(number), self.masks.name(number))

    def size(self, row: int) -> tuple[int, int]:
        """(H, W) of the image."""
        return encoded_size(self.read(row), self.contents.name(int(self.rows[row])))

    def mask_name(self, row: int) -> str:
        """What people know the mask by."""
        return self.masks.name(int(self.rows[row]))

    def sample(self, row: int) -> bytes:
        """Both."""
        both = (self.read(row), self.masks.read(int(self.rows[row])))
        return b"".join(hashlib.sha256(content).digest() for content in both)


def encoded(contents: Contents, labels: Sequence[int]) -> Encoded:
    """Images with the number of their class each."""
    numbers = torch.tensor(labels, dtype=torch.int64)
    return Encoded(contents, numbers, torch.arange(len(numbers)))


def masked(contents: Contents, masks: Contents, count: int) -> EncodedMasks:
    """So many images with a mask each."""
    rows = torch.arange(count)
    return EncodedMasks(contents, torch.zeros_like(rows), rows, masks=masks)


def numbered(labels: Iterable[int]) -> tuple[str, ...]:
    """The classes 0 to the largest of these numbers, but for those that can be no class."""
    numbers = [n for n in labels if 0 <= n < MOST_CLASSES]
    return tuple(map(str, range(max(numbers, default=-1) + 1)))


def as_source(
    name: str,
    classes: Sequence[str],
    parts: Sequence[Encoded],
    *,
    mode: str | None,
    notes: Sequence[str] = (),
) -> Source:
    """A data set of one or two parts; of one, a fifth of every class is set aside to report.

    Args:
        parts: what trains, and what reports.
        mode: that images are read as; None: grey where all that are looked at are grey.
    """
    given = list(parts)
    collected = list(notes)
    facts = f"{tuple(classes)} {[p.labels.tolist() for p in given]}"
    digests = [
        fingerprint.of_samples(facts, len(p.labels), p.sample, p.contents.holders()) for p in given
    ]
    masks = isinstance(given[0], EncodedMasks)
    if len(given) == 1:
        whole = given[0]
        everything = torch.arange(len(whole.labels))
        rows = stratified(whole.labels, everything, fraction=REPORTED, seed=SPLIT_SEED)
        given = [whole.take(own) for own in rows]
        of = "them" if masks else "every class"
        collected.append(set_aside(len(given[1].labels), len(everything), of=of))
    mode = mode or _mode(given[0])
    scale = range_of((f"image {n}", io.BytesIO(given[0].read(n))) for n in _some(given[0], DEEP))
    train, val = (replace(part, mode=mode, scale=scale) for part in given)
    sizes = {(i.height, i.width) for i in map(train, _some(train))}
    return Source(
        name=name,
        classes=tuple(classes),
        train=train,
        val=val,
        fingerprint=digests[0] if len(digests) == 1 else _joined(digests),
        mode=mode,
        native=sizes.pop() if len(sizes) == 1 else None,
        notes=(*collected, *scale_notes(scale)),
        task="segmentation" if masks else "classification",
    )


def _joined(digests: Sequence[str]) -> str:
    """One fingerprint of several, of the same two parts."""
    parts = zip(*(digest.split("-") for digest in digests))
    return "-".join(hashlib.sha256("".join(p).encode()).hexdigest()[:32] for p in parts)


def _some(part: Encoded, count: int = LOOKED_AT) -> range:
    return range(0, len(part.labels), max(len(part.labels) // count, 1))


def _mode(part: Encoded) -> str:
    """Grey where the images that are looked at are; damaged ones are named when they are used."""
    found = {mode_of(part.read(row)) for row in _some(part)} - {None}
    return "L" if found and found <= {"1", "L", "I;16", "I"} else "RGB"
