"""Which task a batch is of: by name, or by what its target looks like."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from seprune.errors import InputError, UsageError
from seprune.tasks.classification import Classification
from seprune.tasks.detection import Detection
from seprune.tasks.embedding import Embedding
from seprune.tasks.multi_label import MultiLabel
from seprune.tasks.protocol import Task
from seprune.tasks.regression import Regression
from seprune.tasks.segmentation import Segmentation

TASKS: dict[str, type[Task]] = {
    "classification": Classification,
    "multi_label": MultiLabel,
    "regression": Regression,
    "segmentation": Segmentation,
    "detection": Detection,
    "embedding": Embedding,
}


def task_by_name(name: str) -> Task:
    """The task of this name, with its defaults.

    Raises:
        UsageError: there is none.
    """
    if name not in TASKS:
        raise UsageError(
            f"{name!r} is no task",
            why=f"tasks are {', '.join(TASKS)}",
            fix="for example --task segmentation",
        )
    return TASKS[name]()


def infer_task(batch: Any) -> Task:
    """The task that a batch's target is of; classification where there is no target.

    Embeddings have the targets of classes, and are never inferred.

    Raises:
        InputError: no task fits, or several do; names them.
    """
    target = _target(batch)
    if target is None:
        return Classification()
    if isinstance(target, (tuple, list)) and target and all(map(_is_boxes, target)):
        return Detection()
    if isinstance(target, Tensor) and not target.is_floating_point():
        if target.dim() == 1:
            return Classification()
        if target.dim() == 3 or (target.dim() == 4 and target.shape[1] == 1):
            return Segmentation()
        if target.dim() == 2:
            raise _several(target, ("multi_label", "regression"))
    if isinstance(target, Tensor) and target.is_floating_point() and target.dim() in (1, 2):
        return _of_floats(target)
    if isinstance(target, Tensor) and target.is_floating_point() and target.dim() > 2:
        raise InputError(
            f"the task is not clear from targets of floats {tuple(target.shape)}",
            why="they are numbers to be met (regression), or masks in a type of numbers",
            fix="say which: task=Regression() or --task regression; masks with target.long()",
        )
    shape = f"tensor {tuple(target.shape)}" if isinstance(target, Tensor) else type(target).__name__
    raise InputError(
        f"no task fits targets that are a {shape}",
        why="known are class numbers (B,), numbers (B,) or (B, K), masks of integers (B, H, W), "
        "and lists of dicts with boxes and labels",
        fix="give a task of your own: FromCallables(forward, loss, metric)",
    )


def unlabelled_task(batch: Any) -> Task:
    """The task that takes a batch apart where no target is needed."""
    if isinstance(batch, (tuple, list)) and batch:
        target = _target(batch)
        boxes = isinstance(target, (tuple, list)) and target and all(map(_is_boxes, target))
        if boxes or all(isinstance(x, Tensor) and x.dim() == 3 for x in batch):
            return Detection()
    return Classification()


def _target(batch: Any) -> Any:
    if isinstance(batch, (tuple, list)) and len(batch) == 2:
        second = batch[1]
        if isinstance(second, (tuple, list)) and second and all(map(_is_boxes, second)):
            return second
    try:
        return Classification().split(batch).target
    except InputError:
        return None


def _is_boxes(target: Any) -> bool:
    return isinstance(target, Mapping) and {"boxes", "labels"} <= set(target)


def _of_floats(target: Tensor) -> Task:
    if bool((target < 0).any() | (target > 1).any()):
        return Regression()
    binary = bool(((target == 0) | (target == 1)).all())
    if binary and target.dim() == 2 and target.shape[1] > 1 and bool((target.sum(1) != 1).any()):
        return MultiLabel()
    one_hot = target.dim() == 2 and target.shape[1] > 1
    raise _several(target, (*(("classification",) if one_hot else ()), "multi_label", "regression"))


def _several(target: Tensor, names: tuple[str, ...]) -> InputError:
    return InputError(
        f"the task is not clear from targets {tuple(target.shape)} within "
        f"{float(target.min()):g}..{float(target.max()):g}",
        why=f"{' and '.join(names)} have such targets",
        fix=f"say which: task={TASKS[names[0]].__name__}() or --task {names[0]}"
        + "".join(f", --task {name}" for name in names[1:]),
    )
