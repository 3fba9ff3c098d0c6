"""Whether a network is better than another on the same few images, beyond chance."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from seprune.data.placement import Batches, resolve_task, share
from seprune.measure.metrics import logits_of
from seprune.runtime.distributed import join, sum_over_processes
from seprune.runtime.inference import evaluating
from seprune.tasks import Classification, Task

SIGMAS = 2.0  # standard errors by which the mean difference has to exceed 0


class PairedTest:
    """Whether candidates are clearly better than the network given, on the same few images.

    What counts is the loss and, for a classifier with a teacher, the distance from the teacher's
    probabilities: luck with single labels is not in it, so fewer images tell two networks apart.
    """

    def __init__(
        self, given: nn.Module, task: Task, teacher: nn.Module | None, device: torch.device
    ) -> None:
        self.given, self.task, self.device = given, task, device
        self.teachers: list[nn.Module | None] = [None]
        if teacher is not None and isinstance(task, Classification):
            self.teachers.append(teacher)
        self._known: list[Tensor] = []

    def clearly_better(self, candidate: nn.Module, images: Batches) -> bool:
        """Whether one of the two fell by more than two standard errors; all processes call it."""
        self._known = self._known or self._measured(self.given, images)
        pairs = zip(self._measured(candidate, images), self._known, strict=True)
        return any(clearly_lower(after, before) for after, before in pairs)

    def _measured(self, model: nn.Module, images: Batches) -> list[Tensor]:
        return [
            image_losses(model, images, self.device, task=self.task, teacher=teacher)
            for teacher in self.teachers
        ]


def image_losses(
    model: nn.Module,
    loader: Batches,
    device: torch.device,
    *,
    task: Task | None = None,
    teacher: nn.Module | None = None,
) -> Tensor:
    """The loss of every image of this process, (N,), float64.

    Args:
        teacher: a classifier whose probabilities stand for the labels: then two networks differ
            image by image by the difference of their KL divergences from the teacher.
    """
    rank, world = join(device)
    losses = []
    with evaluating(model, device), torch.no_grad():
        for batch in share(loader, device, rank, world, task=task):
            task = resolve_task(task, loader, batch)
            outputs = task.forward(model, batch, training=task.name == "detection")
            target = task.split(batch).target
            if teacher is not None:
                target = logits_of(task.forward(teacher, batch)).float().softmax(1)
            losses.append(task.losses(outputs, target).double())
    return torch.cat(losses) if losses else torch.zeros(0, dtype=torch.float64, device=device)


def clearly_lower(after: Tensor, before: Tensor) -> bool:
    """Whether losses fell by more than two standard errors of the mean, image by image.

    Args:
        after, before: losses (N,) of the same images; of this process, all processes call it.
    """
    gain = before - after
    sums = torch.stack([torch.ones_like(gain).sum(), gain.sum(), gain.square().sum()])
    count, total, squares = sum_over_processes(sums).tolist()
    if count < 2 or not math.isfinite(squares):
        return False
    mean = total / count
    variance = max(squares / count - mean**2, 0.0) * count / (count - 1)
    return bool(mean > SIGMAS * math.sqrt(variance / count))
