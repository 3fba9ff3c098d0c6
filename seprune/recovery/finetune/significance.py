"""Whether a network is better than another on the same few images, beyond chance."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from seprune.data.placement import Batches, resolve_task, share
from seprune.runtime.distributed import join, sum_over_processes
from seprune.runtime.inference import evaluating
from seprune.tasks import Task

SIGMAS = 2.0  # standard errors by which the mean difference has to exceed 0


def image_losses(
    model: nn.Module, loader: Batches, device: torch.device, *, task: Task | None = None
) -> Tensor:
    """The loss of every image of this process, (N,), float64."""
    rank, world = join(device)
    losses = []
    with evaluating(model, device), torch.no_grad():
        for batch in share(loader, device, rank, world, task=task):
            task = resolve_task(task, loader, batch)
            outputs = task.forward(model, batch, training=task.name == "detection")
            losses.append(task.losses(outputs, task.split(batch).target).double())
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
