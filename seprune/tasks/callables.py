"""A task made of the user's own functions."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from seprune.runtime.distributed import sum_over_processes
from seprune.tasks.batches import leaves
from seprune.tasks.protocol import BaseTask, Meter


@dataclass(frozen=True)
class FromCallables(BaseTask):
    """A task of three functions.

    Attributes:
        forward_fn: (model, batch) -> outputs.
        loss_fn: (outputs, target) -> a mean loss, or a dict of losses, which are added.
        metric_fn: (outputs, target) -> a number, mean over the samples of a batch; batches count
            by their size.
        target_fn: batch -> target; by default what a tuple or a dict holds beside the inputs.
        name, metric, higher_is_better: for reports.
    """

    forward_fn: Callable[[nn.Module, Any], Any]
    loss_fn: Callable[[Any, Any], Tensor | Mapping[str, Tensor]]
    metric_fn: Callable[[Any, Any], Tensor | float]
    target_fn: Callable[[Any], Any] | None = None
    name: str = "callables"  # type: ignore[misc]
    metric: str = "metric"  # type: ignore[misc]
    higher_is_better: bool = True  # type: ignore[misc]

    def split(self, batch: Any) -> Any:
        """As every task; the target by `target_fn` where one is given."""
        sample = super().split(batch)
        if self.target_fn is None:
            return sample
        return type(sample)(sample.args, sample.kwargs, self.target_fn(batch))

    def unlabelled(self, batch: Any) -> Any:
        """The batch with its target: the user's forward takes it apart."""
        return batch

    def forward(self, model: nn.Module, batch: Any, *, training: bool = False) -> Any:
        """The user's forward."""
        return self.forward_fn(model, batch)

    def loss(self, outputs: Any, target: Any) -> Tensor:
        """The user's loss, or the sum of several."""
        return total_of(self.loss_fn(outputs, target))

    def losses(self, outputs: Any, target: Any) -> Tensor:
        """The batch's mean loss for each sample: the user's function does not tell them apart."""
        size = len(next(leaves(outputs)))
        return self.loss(outputs, target).expand(size)

    def meter(self) -> Meter:
        """The mean of the user's metric."""
        return _Mean(self)


class _Mean:
    def __init__(self, task: FromCallables) -> None:
        self.task = task
        self.total, self.count = 0.0, 0

    def update(self, outputs: Any, target: Any) -> None:
        size = len(next(leaves(outputs)))
        self.total += float(self.task.metric_fn(outputs, target)) * size
        self.count += size

    def compute(self) -> dict[str, float]:
        sums = torch.tensor([self.total, self.count], dtype=torch.float64)
        total, count = sum_over_processes(sums).tolist()
        return {self.task.metric: total / count}


def total_of(losses: Tensor | Mapping[str, Tensor]) -> Tensor:
    """A loss, or the sum of a dict of losses."""
    if isinstance(losses, Tensor):
        return losses
    return torch.stack([value.float() for value in losses.values()]).sum()
