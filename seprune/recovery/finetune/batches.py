"""The batches that a training looks at before it begins: for its task, its norms and its rate."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

from seprune.data import Loader, in_turn
from seprune.data.placement import Batches, resolve_task
from seprune.errors import InputError
from seprune.tasks import Task


def task_of(task: Task | None, loader: Any) -> Task:
    """The task given, that of the loader, or what its first batch looks like.

    Raises:
        InputError: the loader gives nothing, or its targets do not say; names what fits.
    """
    known = task or getattr(loader, "task", None)
    if known is not None:
        return known
    batch = next(iter(loader), None)
    if batch is None:
        raise InputError(
            "the training loader gives no batch",
            why="its length says otherwise; drop_last leaves out a set smaller than a batch",
            fix="give more images, a smaller batch size, or drop_last=False",
        )
    return resolve_task(None, loader, batch)


class FirstBatches:
    """The first batches of a loader, until they hold `images`."""

    def __init__(self, loader: Any, images: int, *, task: Task | None = None):
        self.loader, self.images = loader, images
        self.task = task or getattr(loader, "task", None)

    def __iter__(self) -> Iterator[Any]:
        seen = 0
        for batch in self.loader:
            yield batch
            seen += resolve_task(self.task, self.loader, batch, labelled=False).size(batch)
            if seen >= self.images:
                return


def some_of(loader: Batches, images: int, *, seed: int) -> Batches:
    """About `images` images of a loader, of all classes alike where it is seprune's."""
    if not isinstance(loader, Loader):
        return FirstBatches(loader, images)
    smaller = copy.copy(loader)
    smaller.rows = in_turn(loader.store.labels, loader.rows, seed=seed)[:images]
    return smaller
