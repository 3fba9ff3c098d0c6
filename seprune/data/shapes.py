"""Coloured shapes on textured grounds, drawn from a seed: a small data set for any machine.

Shapes lie over each other, colours are independent of classes, and every pixel is noisy. The same
images serve classification (one shape each), segmentation and detection.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from functools import cached_property
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from seprune.data.source import Source
from seprune.errors import InputError

SHAPES = ("circle", "square", "triangle", "ring")
SIDE = 64  # pixels of an image
TRAIN, VAL = 1200, 300
MOST = 4  # shapes in an image
_LEAST_VISIBLE = 40  # pixels; a shape of which less is seen is not drawn
_VERSION = "1"  # of the drawing, a part of the fingerprint

Array = np.ndarray[Any, Any]


class Plain:
    """A split of drawn images of one shape each."""

    def __init__(self, task: str, part: int, count: int) -> None:
        self.task, self.part, self.count = task, part, count
        self.labels: Tensor = torch.arange(count) % len(SHAPES)  # of the first shape

    @cached_property
    def drawn(self) -> list[tuple[Array, Array]]:
        """Pixels (H, W, 3) and the number of the shape that every pixel shows, from 1."""
        single = self.task == "classification"
        return [
            _draw(np.random.default_rng((self.part, row)), row, single=single)
            for row in range(self.count)
        ]

    def __call__(self, row: int) -> Image.Image:
        return Image.fromarray(self.drawn[row][0])


class Drawn(Plain):
    """A split of drawn images with their masks or boxes."""

    def target(self, row: int) -> Array | Mapping[str, Array]:
        """The class of every pixel, 0 where there is no shape; or boxes and their classes."""
        which = self.drawn[row][1]
        classes = which % 256
        if self.task == "segmentation":
            return np.asarray(classes)
        boxes, labels = [], []
        for number in np.unique(which[which > 0]):
            rows, columns = np.nonzero(which == number)
            boxes.append([columns.min(), rows.min(), columns.max() + 1, rows.max() + 1])
            labels.append(number % 256)
        return {
            "boxes": np.array(boxes, np.float32).reshape(-1, 4),
            "labels": np.array(labels, np.int64),
        }


def shapes(task: str) -> Source:
    """The data set with targets of a task.

    Raises:
        InputError: a task that shapes have no targets for.
    """
    if task not in ("classification", "segmentation", "detection"):
        raise InputError(
            f"shapes have no targets for {task}",
            why="they are drawn for classification, segmentation and detection",
            fix="--task segmentation",
            code="task",
        )
    classes = SHAPES if task == "classification" else ("background", *SHAPES)
    kind = Plain if task == "classification" else Drawn
    about = f"shapes {_VERSION} {task} {SIDE} {TRAIN} {VAL}"
    return Source(
        name="shapes",
        classes=classes,
        train=kind(task, 1, TRAIN),
        val=kind(task, 2, VAL),
        fingerprint=hashlib.sha256(about.encode()).hexdigest(),
        native=(SIDE, SIDE),
        task=task,
    )


def _draw(random: np.random.Generator, row: int, *, single: bool) -> tuple[Array, Array]:
    image = _texture(random, 0.25)
    which = np.zeros((SIDE, SIDE), np.int64)
    count = 1 if single else int(random.integers(1, MOST + 1))
    kinds = [row % len(SHAPES), *random.integers(0, len(SHAPES), count - 1).tolist()]
    drawn = 0
    for kind in kinds:
        inside = _inside(random, kind)
        after = np.where(inside, (drawn + 1) * 256 + kind + 1, which)
        seen = np.unique(after[after > 0], return_counts=True)[1]
        hidden = len(seen) <= drawn or seen.min() < _LEAST_VISIBLE
        if drawn and hidden:  # it would hide another shape, or is hardly in the image
            continue
        which, drawn = after, drawn + 1
        colour = random.uniform(0, 1, 3) + (_texture(random, 0.1) - 0.5)
        image = np.where(inside[:, :, None], colour, image)
    noisy = image + random.normal(0, 0.06, image.shape)
    return (noisy.clip(0, 1) * 255).astype(np.uint8), which


def _texture(random: np.random.Generator, depth: float) -> Array:
    """Random colours on a coarse grid, blended in between: (H, W, 3) around one half."""
    cells = int(random.integers(3, 9))
    grid = (random.uniform(0.5 - depth, 0.5 + depth, (cells, cells, 3)) * 255).astype(np.uint8)
    smooth = Image.fromarray(grid).resize((SIDE, SIDE), Image.Resampling.BICUBIC)
    return np.asarray(smooth).astype(np.float64) / 255


def _inside(random: np.random.Generator, kind: int) -> Array:
    """Which pixels (H, W) a shape of a random size, place and turn covers."""
    radius = random.uniform(0.12, 0.26) * SIDE
    x, y = random.uniform(0.6 * radius, SIDE - 0.6 * radius, 2)
    angle = random.uniform(0, 2 * np.pi)
    rows, columns = np.mgrid[:SIDE, :SIDE] + 0.5
    across, down = columns - x, rows - y
    distance = np.hypot(across, down)
    if SHAPES[kind] == "circle":
        return np.asarray(distance < radius)
    if SHAPES[kind] == "ring":
        return np.asarray((distance < radius) & (distance > 0.55 * radius))
    corners = 4 if SHAPES[kind] == "square" else 3
    reach = radius * np.cos(np.pi / corners)  # from the middle to a side
    turns = angle + 2 * np.pi * np.arange(corners) / corners
    sides = [across * np.cos(t) + down * np.sin(t) < reach for t in turns]
    return np.asarray(np.logical_and.reduce(sides))
