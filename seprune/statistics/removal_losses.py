"""What a network loses, to first order, without a gate's excursions or without a whole block.

z is a random projection of the outputs, as for `gate_logit`, so that the losses add up with its
scores. A gate g that is held at its mean m changes z by the sum over channels of dz/dg (g - m),
a block y = x + f(x) that is left out by the sum over everything of dz/dy (y - x).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from seprune.graph.gates import Gate
from seprune.graph.hooks import watch
from seprune.runtime.inference import evaluating
from seprune.statistics.batches import open_batches, sample_keys, start_graph
from seprune.statistics.gate_gradients import objective
from seprune.tasks import Task
from seprune.tasks.batches import leaves, map_tensors


@dataclass(frozen=True)
class RemovalLosses:
    """E[(change of z)^2] by gate and by block, and the means that gates are held at.

    Attributes:
        means: (channels,) by gate, float64.
    """

    gates: dict[str, float]
    means: dict[str, Tensor]
    blocks: dict[str, float]


def removal_losses(
    model: nn.Module,
    loader: Iterable[Any],
    *,
    gates: Sequence[Gate],
    blocks: Sequence[str],
    device: torch.device | str = "cpu",
) -> RemovalLosses:
    """The losses over the images of `loader`; one forward and backward for each batch."""
    collector = _Collector(blocks)
    task, _, batches = open_batches(loader, torch.device(device), 0, 1)
    model = model.to(device)
    with evaluating(model), ExitStack() as stack:
        stack.enter_context(watch(model, gates, collector.gate, derivatives=True))
        for name in blocks:
            hook = model.get_submodule(name).register_forward_hook(collector.block(name))
            stack.callback(hook.remove)
        for batch in batches:
            collector.add(model, task, map_tensors(batch, start_graph))
    return collector.losses()


class _Collector:
    def __init__(self, blocks: Sequence[str]) -> None:
        self.values: dict[str, list[Tensor]] = {}
        self.slopes: dict[str, list[Tensor]] = {}
        self.changes: dict[str, list[Tensor]] = {name: [] for name in blocks}
        self.seen: dict[str, Tensor] = {}
        self.ends: dict[str, tuple[Tensor, Tensor]] = {}

    def gate(self, gate: Gate, gate_BC: Tensor, features: Tensor | None) -> None:
        self.seen[gate.name] = gate_BC

    def block(self, name: str) -> Callable[[nn.Module, Any, Tensor], None]:
        def hook(module: nn.Module, inputs: Any, output: Tensor) -> None:
            self.ends[name] = (output.detach() - inputs[0].detach(), output)

        return hook

    def add(self, model: nn.Module, task: Task, batch: Any) -> None:
        """One batch."""
        sample = task.split(batch)
        inputs = [t for t in leaves((sample.args, sample.kwargs)) if t.requires_grad]
        with torch.enable_grad():
            flat = task.flat_outputs(model, batch)
            z = objective("logits", flat, None, sample_keys(inputs, len(flat), 0))
            ends = [*self.seen.values(), *(end for _, end in self.ends.values())]
            found = torch.autograd.grad(z, ends, allow_unused=True)
        slopes = [torch.zeros_like(e) if s is None else s for e, s in zip(ends, found)]
        for (name, value), slope in zip(self.seen.items(), slopes):
            self.values.setdefault(name, []).append(value.detach().double().cpu())
            self.slopes.setdefault(name, []).append(slope.double().cpu())
        for (name, (change, _)), slope in zip(self.ends.items(), slopes[len(self.seen) :]):
            self.changes[name].append((change.double() * slope).flatten(1).sum(1).cpu())
        self.seen, self.ends = {}, {}

    def losses(self) -> RemovalLosses:
        """Of all batches."""
        values = {name: torch.cat(parts) for name, parts in self.values.items()}
        means = {name: value.mean(0) for name, value in values.items()}
        gates = {}
        for name, value in values.items():
            change = (value - means[name]) * torch.cat(self.slopes[name])
            gates[name] = float(change.sum(1).square().mean())
        changes = {name: torch.cat(parts) for name, parts in self.changes.items() if parts}
        blocks = {name: float(change.square().mean()) for name, change in changes.items()}
        return RemovalLosses(gates, means, blocks)
