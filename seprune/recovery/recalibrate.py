"""BatchNorm statistics measured again on the calibration set."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from seprune.data.placement import Batches, length, resolve_task, share
from seprune.errors import InputError
from seprune.runtime.distributed import join, resolve_device, sum_over_processes
from seprune.runtime.inference import evaluating
from seprune.runtime.progress import Track, silent
from seprune.tasks import Task


def recalibrate(
    model: nn.Module,
    loader: Batches,
    *,
    task: Task | None = None,
    device: str | torch.device = "auto",
    track: Track = silent,
) -> nn.Module:
    """A copy of `model` whose BatchNorm statistics are the mean over the batches of `loader`.

    Batches count by their images; the variance is the mean of the unbiased variances within
    batches. All other layers run in eval mode. Targets are not looked at.

    Raises:
        InputError: an empty loader, or statistics that are not finite; names the layer.
    """
    place = resolve_device(device)
    rank, world = join(place)
    fresh = copy.deepcopy(model)
    norms = {n: m for n, m in fresh.named_modules() if _measures(m)}
    if not norms:
        return fresh
    momenta = {name: norm.momentum for name, norm in norms.items()}
    seen = 0
    with evaluating(fresh, place), torch.no_grad():
        for norm in norms.values():
            norm.reset_running_stats()
            norm.train()
        part = share(loader, place, rank, world, task=task)
        for batch in track(
            part, label="recalibrating BatchNorm", total=length(part), unit="batches"
        ):
            own = resolve_task(task, part, batch, labelled=False)
            size = own.size(batch)
            seen += size
            for norm in norms.values():
                norm.momentum = size / seen
            own.forward(fresh, batch)
        count = _pool(norms, seen, place) if world > 1 else seen
    if count == 0:
        raise InputError(
            "BatchNorm cannot be recalibrated without images",
            why="the loader is empty",
            fix="give a loader that has batches",
        )
    for name, norm in norms.items():
        norm.momentum = momenta[name]
        _require_finite(name, norm)
    return fresh


def _measures(module: nn.Module) -> bool:
    return isinstance(module, _BatchNorm) and module.track_running_stats


def _pool(norms: dict[str, Any], seen: int, device: torch.device) -> float:
    """Average the statistics over the processes, each by its images; returns all images."""
    total = sum_over_processes(torch.tensor(float(seen), dtype=torch.float64, device=device))
    for norm in norms.values():
        for value in (norm.running_mean, norm.running_var):
            value.copy_(sum_over_processes(value.double() * seen) / total)
    return float(total)


def _require_finite(name: str, norm: Any) -> None:
    if not (norm.running_mean.isfinite().all() and norm.running_var.isfinite().all()):
        raise InputError(
            f"{name}: recalibrated BatchNorm statistics are not finite",
            why="a weight before it or an image holds NaN or infinity, or a batch holds one value",
            fix="check the checkpoint and the calibration images",
        )
