"""What a model is worth on images with targets: the loss and the metrics of its task."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from seprune.data.placement import Batches, length, resolve_task, share
from seprune.errors import InputError
from seprune.runtime.distributed import join, resolve_device, sum_over_processes
from seprune.runtime.inference import autocast, evaluating
from seprune.runtime.progress import Track, silent
from seprune.tasks import Meter, Task
from seprune.tasks.batches import leaves
from seprune.tasks.classification import logits_of

__all__ = ["Evaluation", "evaluate", "logits_of"]


@dataclass(frozen=True)
class Evaluation:
    """How good a model is on `count` images.

    Attributes:
        loss: mean of the images with finite outputs.
        nonfinite: images with a NaN or an infinite output; a classifier is wrong on them.
        metrics: by name, as the task computes them.
        task, metric, higher_is_better: the task, its metric that decides, and which way it goes.
        by_class: the deciding metric of every class by its number, NaN for classes that are
            nowhere; none where the task does not know it.
    """

    loss: float
    count: int
    nonfinite: int
    metrics: Mapping[str, float] = field(default_factory=dict)
    task: str = "classification"
    metric: str = "top1"
    higher_is_better: bool = True
    by_class: tuple[float, ...] = ()

    @property
    def top1(self) -> float:
        """Of a classifier; NaN for other tasks."""
        return self.metrics.get("top1", math.nan)

    @property
    def top5(self) -> float:
        """Of a classifier; NaN for other tasks."""
        return self.metrics.get("top5", math.nan)

    @property
    def value(self) -> float:
        """The metric that decides."""
        return self.metrics[self.metric]

    @property
    def rank(self) -> float:
        """The metric that decides, turned so that higher is better."""
        return self.value if self.higher_is_better else -self.value

    def plain(self) -> dict[str, Any]:
        """As `evaluate --json` prints it; classifiers have `top1` and `top5` beside."""
        top = {name: self.metrics[name] for name in ("top1", "top5") if name in self.metrics}
        return {
            "task": self.task,
            "metrics": dict(self.metrics),
            "loss": self.loss,
            "count": self.count,
            "nonfinite": self.nonfinite,
            **top,
        }


def evaluate(
    model: nn.Module,
    loader: Batches,
    *,
    task: Task | None = None,
    device: str | torch.device = "auto",
    precision: str = "no",
    track: Track = silent,
) -> Evaluation:
    """Score `model` on all images of `loader`; under `torchrun` every process has to call it.

    Args:
        loader: gives batches with targets; a `Loader` or a `DataLoader` is shared among the
            processes, anything else has to give each process its own part.
        task: by default what the targets of the first batch look like.
        precision: `no`, `bf16` or `fp16` autocast.

    Raises:
        InputError: no images, or targets that do not fit the task or the model's outputs.
        EnvironmentFault: the packages of the task's metrics are not installed.
    """
    place = resolve_device(device)
    rank, world = join(place)
    sums = torch.zeros(3, dtype=torch.float64, device=place)  # loss, count, nonfinite
    meter: Meter | None = None
    with evaluating(model, place), torch.no_grad(), autocast(place, precision):
        part = share(loader, place, rank, world, task=task)
        for batch in track(part, label="evaluating", total=length(part), unit="batches"):
            if task is None or meter is None:
                task = resolve_task(task, part, batch)
                meter = task.meter()
            target = _target(task, batch)
            outputs = task.forward(model, batch)
            sums += _sums(task, model, batch, outputs)
            meter.update(outputs, target)
    loss, count, nonfinite = sum_over_processes(sums).tolist()
    if count == 0 or task is None:
        raise InputError(
            "there are no images to evaluate on",
            why="the loader gave no batch",
            fix="give a loader that has batches",
        )
    meter = meter or task.meter()
    metrics = meter.compute()
    by_class = tuple(meter.by_class()) if hasattr(meter, "by_class") else ()
    finite = count - nonfinite
    return Evaluation(
        loss=loss / finite if finite else float("nan"),
        count=int(count),
        nonfinite=int(nonfinite),
        metrics=metrics,
        task=task.name,
        metric=task.metric,
        higher_is_better=task.higher_is_better,
        by_class=by_class,
    )


def _target(task: Task, batch: Any) -> Any:
    target = task.split(batch).target
    if target is None:
        raise InputError(
            "the batches hold no targets to evaluate against",
            why="a batch is images alone",
            fix="give a loader of (images, targets), or of dicts with labels",
        )
    return target


def _sums(task: Task, model: nn.Module, batch: Any, outputs: Any) -> Tensor:
    """Loss of the images with finite outputs, all images, and those without."""
    target, size = task.split(batch).target, task.size(batch)
    own = outputs
    if task.name == "detection":  # its losses come from a pass of their own
        own = task.forward(model, batch, training=True)
    losses = task.losses(own, target).double()
    finite = losses.isfinite() & _finite(outputs, size)
    columns = (losses.where(finite, losses.new_zeros(())), torch.ones_like(finite), ~finite)
    return torch.stack([column.double().sum() for column in columns])


def _finite(outputs: Any, size: int) -> Tensor:
    """Which of `size` images have finite outputs."""
    tensors = [t for t in leaves(outputs) if t.is_floating_point()]
    device = tensors[0].device if tensors else torch.device("cpu")
    finite = torch.ones(size, dtype=torch.bool, device=device)
    for tensor in tensors:
        if tensor.dim() and len(tensor) == size:
            finite &= tensor.reshape(size, -1).isfinite().all(1)
    return finite
