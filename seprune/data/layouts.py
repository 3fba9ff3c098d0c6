"""Folders that hold more than classes: masks, boxes, or columns of a table."""

from __future__ import annotations

from pathlib import Path

from seprune.data.coco import find_boxes
from seprune.data.columns import find_columns
from seprune.data.pairs import find_masks
from seprune.data.source import Source
from seprune.errors import InputError

FITS = {  # what targets can be used for
    "classification": {"classification", "embedding"},
    "segmentation": {"segmentation"},
    "detection": {"detection"},
    "multi_label": {"multi_label", "regression"},
    "regression": {"regression"},
}


def find_layout(root: Path, mode: str, task: str | None) -> Source | None:
    """The data set in a folder with masks, boxes or a table; None for folders of classes.

    Raises:
        InputError: a folder of that kind that cannot be used.
    """
    if not root.is_dir():
        return None
    return find_masks(root, mode) or find_boxes(root, mode) or find_columns(root, mode, task)


def require_task(found: Source, task: str | None) -> Source:
    """The data set, if its targets are of this task.

    Raises:
        InputError: they are not; names the task that fits.
    """
    if task is None or task in FITS[found.task]:
        return found
    raise InputError(
        f"{found.name}: holds targets for {found.task}, not for {task}",
        why=f"--task {task} was asked for",
        fix=f"--task {found.task}, or give other data",
        code="task",
    )
