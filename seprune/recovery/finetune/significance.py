"""Whether a network is better than another on the same few images, beyond chance."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from seprune.data.placement import Batches, share
from seprune.measure.metrics import logits_of
from seprune.runtime.distributed import join, sum_over_processes
from seprune.runtime.inference import evaluating

SIGMAS = 2.0  # standard errors by which the mean difference has to exceed 0


def image_losses(model: nn.Module, loader: Batches, device: torch.device) -> Tensor:
    """Cross-entropy of every image of this process, (N,), float64."""
    rank, world = join(device)
    losses = []
    with evaluating(model, device), torch.no_grad():
        for images, labels in share(loader, device, rank, world):
            logits = logits_of(model(images)).float()
            losses.append(F.cross_entropy(logits, labels, reduction="none").double())
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
