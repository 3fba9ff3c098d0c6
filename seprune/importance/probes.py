"""Probes: SE gates for channels that have none, trained for a short while, read, and thrown away.

Yamamoto and Maeno, PCAS, arXiv:1806.05382: attention modules are put into a trained network, they
alone are trained, and what they say about its channels decides which go.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from seprune.data import Loader
from seprune.data.placement import Batches, Placed, length, resolve_task, share
from seprune.errors import InputError
from seprune.graph.groups import NetworkStructure
from seprune.runtime.distributed import resolve_device
from seprune.runtime.inference import device_of
from seprune.runtime.progress import Track, silent
from seprune.runtime.random_state import cpu_random
from seprune.tasks import Task

PROBE = "probe"  # the name under which a module holds its probe
_OPEN = 2.0  # where a new probe's logits lie: it lets 0.88 of every channel through


@dataclass(frozen=True)
class ProbeSettings:
    """How probes are made and trained.

    Attributes:
        epochs: over the training images, at a learning rate that falls to nothing (cosine).
        lr: Adam's.
        reduction: of the channels by the hidden layer.
        device: `auto`, `cpu`, `cuda`, ...
        seed: of the probes' first weights.
        task: whose loss they are trained by; by default what the targets look like.
    """

    epochs: int = 1
    lr: float = 0.01
    reduction: int = 16
    device: str | torch.device = "auto"
    seed: int = 0
    task: Task | None = None


class Probe(nn.Module):
    """x times a gate that looks at the mean over positions of all channels."""

    def __init__(self, channels: int, reduction: int) -> None:
        super().__init__()
        hidden = max(4, channels // reduction)
        self.fc1, self.fc2 = nn.Linear(channels, hidden), nn.Linear(hidden, channels)
        nn.init.normal_(self.fc2.weight, std=0.01)
        nn.init.constant_(self.fc2.bias, _OPEN)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, *) as (B, C, *)."""
        squeezed = x.flatten(2).mean(2) if x.dim() > 2 else x
        gate = torch.sigmoid(self.fc2(F.relu(self.fc1(squeezed))))
        return x * gate.view(*gate.shape, *[1] * (x.dim() - 2))


def probed(model: nn.Module, structure: NetworkStructure, settings: ProbeSettings) -> nn.Module:
    """A copy of `model` with a probe wherever a group without a gate makes its channels.

    Raises:
        InputError: there is no such place.
    """
    where = places(structure)
    if not where:
        raise InputError(
            "there is nothing to probe",
            why="every group that can be cut has a gate of its own",
            fix="leave out importance.probe",
        )
    twin = copy.deepcopy(model)
    with cpu_random(settings.seed):
        for name, channels in where.items():
            module = twin.get_submodule(name)
            probe = Probe(channels, settings.reduction).to(device_of(twin))
            module.add_module(PROBE, probe.train(module.training))
            module.register_forward_hook(_through_probe)
    return twin


def _through_probe(module: nn.Module, _inputs: Any, output: Any) -> Any:
    return getattr(module, PROBE)(output)


def places(structure: NetworkStructure) -> dict[str, int]:
    """Modules whose outputs are to be probed, and their channels."""
    found: dict[str, int] = {}
    for group in structure.groups:
        if group.prunable and group.role == "features" and not group.gates:
            units = {s.name: s.total for s in group.sources if s.kind == "unit"}
            first = {m.layer: m.total for m in group.members if m.layer == group.name}
            found |= units or first  # a group that is scored where it is read
    return found


def train_probes(
    model: nn.Module,
    loader: Batches,
    settings: ProbeSettings,
    *,
    track: Track = silent,
) -> float:
    """Train the probes of `model` in place and nothing else, by the task's loss; the mean loss.

    Raises:
        InputError: the loss is not finite.
    """
    device = resolve_device(settings.device)
    home, wanted = device_of(model), {p: p.requires_grad for p in model.parameters()}
    own = [p for m in model.modules() if isinstance(m, Probe) for p in m.parameters()]
    model.to(device).eval().requires_grad_(False)
    for parameter in own:
        parameter.requires_grad_()
    optimizer, steps = torch.optim.Adam(own, settings.lr), settings.epochs * length(loader)
    total, count = torch.zeros((), device=device), 0
    task, placed = settings.task, share(loader, device, 0, 1, task=settings.task)
    work = track(_batches(placed, settings.epochs), label="probing", total=steps,
                 unit="batches")  # fmt: skip
    try:
        for step, batch in enumerate(work):
            for group in optimizer.param_groups:
                group["lr"] = settings.lr * (1 + math.cos(math.pi * step / max(steps, 1))) / 2
            task = task or resolve_task(None, placed, batch)
            outputs = task.forward(model, batch, training=True)
            loss = task.loss(outputs, task.split(batch).target)
            gradients = torch.autograd.grad(loss, own)
            for parameter, gradient in zip(own, gradients):
                parameter.grad = gradient
            optimizer.step()
            total, count = total + loss.detach(), count + 1
    finally:
        for parameter, want in wanted.items():
            parameter.requires_grad_(want)
            parameter.grad = None
        model.to(home)
    mean = float(total) / max(count, 1)
    if not math.isfinite(mean):
        raise InputError(
            "the probes' loss is not finite",
            why=f"a learning rate of {settings.lr:g}, or the network's own answer",
            fix="importance.probe.lr=0.001",
            code="nonfinite",
        )
    return mean


def _batches(loader: Loader | Placed, epochs: int) -> Iterator[Any]:
    for epoch in range(epochs):
        loader.set_epoch(epoch)
        yield from loader
