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
from seprune.tasks.protocol import require_same_shape

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
        self.teacher = teacher if isinstance(task, Classification) else None
        self._known: Tensor | None = None

    def clearly_better(self, candidate: nn.Module, images: Batches) -> bool:
        """Whether one of the two fell by more than two standard errors; all processes call it."""
        if self._known is None:
            self._known = self._losses(self.given, images)
        pairs = zip(self._losses(candidate, images), self._known, strict=True)
        return any(clearly_lower(after, before) for after, before in pairs)

    def _losses(self, model: nn.Module, images: Batches) -> Tensor:
        return image_losses(model, images, self.device, task=self.task, teacher=self.teacher)


def image_losses(
    model: nn.Module,
    loader: Batches,
    device: torch.device,
    *,
    task: Task | None = None,
    teacher: nn.Module | None = None,
) -> Tensor:
    """The loss of every image of this process, (1, N), float64; with a teacher (2, N).

    Args:
        teacher: a classifier. The second row has its probabilities in the place of the labels, so
            that two networks differ by the difference of their KL divergences from the teacher.

    Raises:
        InputError: a teacher for other classes.
    """
    rank, world = join(device)
    losses = [torch.zeros(1 if teacher is None else 2, 0, dtype=torch.float64, device=device)]
    with evaluating(model, device), torch.no_grad():
        for batch in share(loader, device, rank, world, task=task):
            task = resolve_task(task, loader, batch)
            outputs = task.forward(model, batch, training=task.name == "detection")
            targets = [task.split(batch).target]
            if teacher is not None:
                taught = logits_of(task.forward(teacher, batch)).float()
                require_same_shape(logits_of(outputs), taught)
                targets.append(taught.softmax(1))
            losses.append(torch.stack([task.losses(outputs, t).double() for t in targets]))
    return torch.cat(losses, 1)


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
