"""What is known about a data set before any image is decoded."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from PIL import Image
from torch import Tensor

from seprune.data.augment import generator

SPLIT_SEED = 1998  # of what reports where a source has one part: the same images for everybody
REPORTED = 0.2
TRAINING = ("train", "training")  # names of the part, the best first
REPORTING = ("val", "valid", "validation", "test", "testing")


class Samples(Protocol):
    """A split: a PIL image for each row; `labels` (N,) spread rows evenly, and are class numbers.

    Splits of other tasks than classification give a target for each row.
    """

    labels: Tensor

    def __call__(self, row: int) -> Image.Image: ...


@runtime_checkable
class Targets(Samples, Protocol):
    """A split with a mask (H, W) or a dict of boxes for each row, in pixels of the image."""

    def target(self, row: int) -> Any: ...


@dataclass(frozen=True)
class Source:
    """A training and a reporting split with the same classes.

    `mirror`: a mirrored image still belongs to its class. `native`: the (H, W) that all sampled
    images share, or None. `notes`: what was left out, and how images of many bits are scaled.
    `task`: of the targets, as `--task` takes it.
    """

    name: str
    classes: tuple[str, ...]
    train: Samples
    val: Samples
    fingerprint: str
    mode: str = "RGB"
    mirror: bool = True
    native: tuple[int, int] | None = None
    notes: tuple[str, ...] = ()
    task: str = "classification"


def stratified(
    labels: Tensor, rows: Tensor, *, fraction: float, seed: int
) -> tuple[Tensor, Tensor]:
    """`rows` in two sorted parts, the second with `fraction` of every class, at least one image."""
    kept, taken = [], []
    for label in torch.unique(labels[rows]).tolist():
        members = rows[labels[rows] == label]
        members = members[torch.randperm(len(members), generator=generator(seed, label))]
        count = max(round(fraction * len(members)), 1) if fraction and len(members) > 1 else 0
        taken.append(members[:count])
        kept.append(members[count:])
    return torch.cat(kept).sort().values, torch.cat(taken).sort().values


def set_aside(count: int, total: int, *, of: str = "them") -> str:
    """The note on a data set that comes in one part."""
    return (
        f"there are no images to report on apart: {count:,} of {total:,}, {REPORTED:.0%} of {of} "
        "by a seed, are set aside"
    )
