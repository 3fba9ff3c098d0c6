"""Rivals written from their formulas: OSSCAR, variance-based pruning, GRAIL's map.

All of them look at inputs of *consumers*: dense convolutions and linear layers that read a
dependency group's channels outside the excitations. They change the weights that read, not those
that make. Nothing here is needed by the package.

- OSSCAR (Meng et al., arXiv:2403.12983): S, W minimise |Y - X_S W|^2 / n + ridge |W - W_0|^2, Y the
  parent's outputs and X the inputs that the network cut so far gives; greedy removal by
  tr(W_c' [(H^-1)_cc]^-1 W_c) with downdates of H^-1, then swaps while they pay; layer after layer.
- VBP (Berisha et al., arXiv:2507.12988): the channels of the largest activation variance stay, in
  one ranking; the mean of what leaves moves into the consumer's bias or into its BatchNorm.
- GRAIL (Tang et al., arXiv:2602.23795): B = G_:P (G_PP + ridge I)^-1, G the Gram matrix of what a
  consumer reads; its weights W become W B.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from seprune.graph.groups import ChannelGroup, NetworkStructure
from seprune.pruning.plan import PruningPlan, plan_of
from seprune.pruning.prune import prune

Batches = Sequence[tuple[Tensor, Tensor]]
LEAST = 2  # channels of a group that stay
RIDGE = 1e-3  # of the mean square of an input
ROWS = 32  # output positions of an image that enter OSSCAR's regression
SWAPS = 8  # tried for a layer


def consumers(model: nn.Module, structure: NetworkStructure, group: ChannelGroup) -> list[str]:
    """The dense layers outside the excitations that read the group, one position a channel."""
    inside = {name for gate in structure.gates for name in gate.excitation}
    found = []
    for member in group.members:
        layer = model.get_submodule(member.layer) if member.side == "in" else None
        dense = isinstance(layer, nn.Linear) or (
            isinstance(layer, nn.Conv2d) and layer.groups == 1 and layer.padding_mode == "zeros"
        )
        if dense and member.layer not in inside and member.index.shape == (group.units, 1):
            found.append(member.layer)
    return found


def chains(model: nn.Module, structure: NetworkStructure) -> dict[str, str]:
    """Groups that a single consumer reads -> that layer; what OSSCAR and VBP can cut."""
    order = {name: number for number, (name, _) in enumerate(model.named_modules())}
    found = {}
    for group in structure.groups:
        readers = consumers(model, structure, group)
        if group.prunable and group.role == "features" and len(readers) == 1:
            found[group.name] = readers[0]
    return dict(sorted(found.items(), key=lambda item: order[item[1]]))


def width_scale(structure: NetworkStructure, names: Iterable[str], budget: float) -> dict[str, int]:
    """Units to keep of these groups: the same share of each, the largest within the budget."""
    units = {g.name: g.units for g in structure.groups if g.name in set(names)}
    full, limit = structure.full_widths(), budget * structure.costs()["macs"]

    def kept(share: float) -> dict[str, int]:
        return {n: max(min(LEAST, u), int(share * u)) for n, u in units.items()}

    return _largest(lambda share: kept(share), lambda k: structure.macs_at(full | k) <= limit)


def _largest(
    made: Callable[[float], dict[str, int]], fits: Callable[[dict[str, int]], bool]
) -> dict[str, int]:
    low, high = 0.0, 1.0
    if not fits(made(low)):
        raise ValueError("the budget is out of reach of these groups")
    for _ in range(30):
        middle = (low + high) / 2
        low, high = (middle, high) if fits(made(middle)) else (low, middle)
    return made(low)


# OSSCAR


def osscar(
    model: nn.Module, structure: NetworkStructure, batches: Batches, budget: float
) -> nn.Module:
    """The network cut and updated: the same share of every chain leaves."""
    readers, student = chains(model, structure), copy.deepcopy(model).eval()
    keep: dict[str, list[int]] = {}
    for name, width in width_scale(structure, readers, budget).items():
        group = next(g for g in structure.groups if g.name == name)
        layer = student.get_submodule(readers[name])
        index = _read(group, readers[name])
        quadratic = Quadratic.of(model, student, readers[name], batches)
        units = quadratic.select(index, width)
        keep[name] = units
        columns = torch.tensor([int(index[u]) for u in units])
        with torch.no_grad():
            weights = torch.zeros_like(layer.weight)
            weights[:, columns] = (
                quadratic.weights(columns).to(weights).reshape(weights[:, columns].shape)
            )
            layer.weight.copy_(weights)
            _silence(student, group, set(range(group.units)) - set(units), readers[name])
    return prune(student, plan_of(structure.groups, keep, {}))


def _read(group: ChannelGroup, layer: str) -> Tensor:
    index = next(m.index for m in group.members if (m.layer, m.side) == (layer, "in"))
    return torch.from_numpy(index[:, 0].copy())


def _silence(student: nn.Module, group: ChannelGroup, gone: set[int], but: str) -> None:
    """What else reads these units (an excitation) reads zeros from now on."""
    for member in group.members:
        if member.side == "in" and member.layer != but and gone:
            weight = student.get_submodule(member.layer).weight
            places = torch.from_numpy(member.index[sorted(gone)].reshape(-1).copy())
            if weight.dim() > 1 and weight.shape[1] == member.total:
                weight[:, places] = 0


@dataclass
class Quadratic:
    """|Y - X W|^2 / n + ridge |W - W_0|^2 as a quadratic form in W, `size` rows a channel."""

    gram: Tensor
    cross: Tensor
    size: int

    @classmethod
    def of(cls, parent: nn.Module, student: nn.Module, name: str, batches: Batches) -> Quadratic:
        """From sampled output positions; the same ones of both networks."""
        layer, random = student.get_submodule(name), torch.Generator().manual_seed(0)
        gram = cross = torch.zeros(())
        rows = 0
        for images, _ in batches:
            with _inputs(student, [name]) as seen, torch.no_grad():
                student(images)
            with _outputs(parent, name) as wanted, torch.no_grad():
                parent(images)
            x, y = patches(layer, seen[name]), wanted[0]
            y = y.flatten(2).transpose(1, 2) if y.dim() == 4 else y[:, None]
            y = y if layer.bias is None else y - layer.bias
            some = torch.randperm(x.shape[1], generator=random)[:ROWS]
            x, y = (t[:, some].flatten(0, 1).double() for t in (x, y))
            gram, cross, rows = gram + x.T @ x, cross + x.T @ y, rows + len(x)
        start = layer.weight.detach().flatten(1).T.double()
        gram, cross = gram / rows, cross / rows
        ridge = RIDGE * gram.diagonal().mean().clamp_min(1e-12)
        gram.diagonal().add_(ridge)
        return cls(gram, cross + ridge * start, len(start) // layer.weight.shape[1])

    def select(self, index: Tensor, width: int) -> list[int]:
        """The units to keep, by greedy removal and swaps."""
        units = list(range(len(index)))
        places = self.places(index[torch.tensor(units)])
        inverse = torch.linalg.inv(self.gram[places][:, places])
        weights = inverse @ self.cross[places]
        while len(units) > width:
            blocks = torch.arange(len(units) * self.size).reshape(len(units), self.size)
            own = inverse[blocks[:, :, None], blocks[:, None, :]]
            losses = (weights[blocks] * torch.linalg.solve(own, weights[blocks])).sum((1, 2))
            worst = int(losses.argmin())
            out, left = blocks[worst], torch.cat([blocks[:worst], blocks[worst + 1 :]]).reshape(-1)
            step = torch.linalg.solve(own[worst], inverse[out]).T
            weights = (weights - step @ weights[out])[left]
            inverse = (inverse - step @ inverse[out])[left][:, left]
            del units[worst]
        return self.swapped(units, index)

    def swapped(self, units: list[int], index: Tensor) -> list[int]:
        """One unit for another, as long as the objective falls."""
        gain, others = self.gain(units, index), [u for u in range(len(index)) if u not in units]
        for other in others[:SWAPS]:
            more = [*units, other]
            tries = [[u for u in more if u != out] for out in self.weakest(more, index)]
            best = max(tries, key=lambda found: self.gain(found, index))
            if self.gain(best, index) > gain:
                units, gain = best, self.gain(best, index)
        return sorted(units)

    def weakest(self, units: list[int], index: Tensor) -> list[int]:
        """The two units whose removal costs least."""
        places = self.places(index[torch.tensor(units)])
        inverse = torch.linalg.inv(self.gram[places][:, places])
        weights = (inverse @ self.cross[places]).reshape(len(units), self.size, -1)
        blocks = torch.arange(len(places)).reshape(len(units), self.size)
        own = inverse[blocks[:, :, None], blocks[:, None, :]]
        losses = (weights * torch.linalg.solve(own, weights)).sum((1, 2))
        return [units[int(i)] for i in losses.argsort()[:2]]

    def gain(self, units: list[int], index: Tensor) -> float:
        """tr(R_S' H_SS^-1 R_S): how far the best weights on these units lower the objective."""
        places = self.places(index[torch.tensor(units)])
        root = torch.linalg.cholesky(self.gram[places][:, places])
        return float(
            torch.linalg.solve_triangular(root, self.cross[places], upper=False)
            .square()
            .sum()
            .detach()
        )

    def weights(self, columns: Tensor) -> Tensor:
        """The best weights on these channels: (outputs, channels x rows a channel)."""
        places = self.places(columns)
        return torch.linalg.solve(self.gram[places][:, places], self.cross[places]).T

    def places(self, columns: Tensor) -> Tensor:
        return (columns[:, None] * self.size + torch.arange(self.size)).reshape(-1)


def patches(layer: nn.Module, inputs: Tensor) -> Tensor:
    """What every output position reads: (batch, positions, channels x kernel)."""
    if isinstance(layer, nn.Linear):
        return inputs.reshape(len(inputs), -1, inputs.shape[-1])
    assert isinstance(layer, nn.Conv2d)
    unfolded = F.unfold(
        inputs, layer.kernel_size, dilation=layer.dilation, padding=layer.padding,  # type: ignore[arg-type]
        stride=layer.stride,
    )  # fmt: skip
    return unfolded.transpose(1, 2)


# Variance-based pruning


def variance_pruned(
    model: nn.Module, structure: NetworkStructure, batches: Batches, budget: float
) -> nn.Module:
    """The network cut by the variance of its activations, means moved into what follows."""
    readers = chains(model, structure)
    moments = {n: _Moments() for n in readers.values()}
    for images, _ in batches:
        with _inputs(model, list(moments)) as seen, torch.no_grad():
            model(images)
        for name, value in seen.items():
            moments[name].add(_channels_last(value))
    scores = {
        group: moments[reader].variance()[_read(_named(structure, group), reader)]
        for group, reader in readers.items()
    }
    ranking = torch.cat(list(scores.values())).sort().values
    limit, full = budget * structure.costs()["macs"], structure.full_widths()

    def kept(share: float) -> dict[str, int]:
        bar = ranking[min(len(ranking) - 1, int((1 - share) * len(ranking)))]
        return {n: max(min(LEAST, len(s)), int((s >= bar).sum())) for n, s in scores.items()}

    widths = _largest(kept, lambda k: structure.macs_at(full | k) <= limit)
    keep = {n: sorted(scores[n].argsort(descending=True)[:w].tolist()) for n, w in widths.items()}
    moved = copy.deepcopy(model)
    with torch.no_grad():
        for group, reader in readers.items():
            columns = _read(_named(structure, group), reader)
            gone = [int(columns[u]) for u in range(len(columns)) if u not in keep[group]]
            layer = moved.get_submodule(reader)
            shift = layer.weight.flatten(2).sum(2) if layer.weight.dim() > 2 else layer.weight
            _add(moved, reader, shift[:, gone] @ moments[reader].mean()[gone].float())
    return prune(moved, plan_of(structure.groups, keep, {}))


def _named(structure: NetworkStructure, name: str) -> ChannelGroup:
    return next(g for g in structure.groups if g.name == name)


def _add(model: nn.Module, name: str, shift: Tensor) -> None:
    """Add to a layer's output: to its bias, or off the mean of the BatchNorm registered next."""
    layer = model.get_submodule(name)
    if layer.bias is not None:
        layer.bias += shift
        return
    names = [n for n, m in model.named_modules() if not list(m.children())]
    norm = model.get_submodule(names[names.index(name) + 1])
    assert isinstance(norm, nn.BatchNorm2d), name
    assert norm.num_features == len(shift), name
    norm.running_mean -= shift


class _Moments:
    def __init__(self) -> None:
        self.sums: Tensor | None = None
        self.count = 0

    def add(self, rows: Tensor) -> None:
        new = torch.stack([rows.double().sum(0), rows.double().square().sum(0)])
        self.sums = new if self.sums is None else self.sums + new
        self.count += len(rows)

    def mean(self) -> Tensor:
        assert self.sums is not None
        return self.sums[0] / self.count

    def variance(self) -> Tensor:
        assert self.sums is not None
        return self.sums[1] / self.count - self.mean().square()


# GRAIL


def mapped(
    model: nn.Module, structure: NetworkStructure, plan: PruningPlan, batches: Batches
) -> nn.Module:
    """The plan's network, its consumers' weights merged with GRAIL's map."""
    return mapped_by(model, structure, plan, grams(model, structure, batches))


def grams(model: nn.Module, structure: NetworkStructure, batches: Batches) -> dict[str, Tensor]:
    """Gram matrices over channels of what every consumer reads, in the dense network."""
    inside = {name for gate in structure.gates for name in gate.excitation}
    names = {n for g in structure.groups for n in consumers(model, structure, g)} - inside
    found: dict[str, Tensor] = {}
    for images, _ in batches:
        with _inputs(model, sorted(names)) as seen, torch.no_grad():
            model(images)
        for name, value in seen.items():
            rows = _channels_last(value)
            gram = (rows.T @ rows).double()
            found[name] = found[name] + gram if name in found else gram
    return found


def mapped_by(
    model: nn.Module, structure: NetworkStructure, plan: PruningPlan, gram: Mapping[str, Tensor]
) -> nn.Module:
    """`mapped`, with the Gram matrices at hand."""
    small = prune(model, plan)
    with torch.no_grad():
        for name, sides in plan.layers().items():
            if name not in gram or "in" not in sides:
                continue
            keep = torch.from_numpy(sides["in"])
            weight = model.get_submodule(name).weight
            made = torch.from_numpy(sides["out"]) if "out" in sides else slice(None)
            wide = weight[made].double()
            whole = gram[name]
            inner = whole[keep][:, keep]
            ridge = RIDGE * inner.diagonal().mean() * torch.eye(len(keep), dtype=inner.dtype)
            back = torch.linalg.solve(inner + ridge, whole[keep]).T  # (all, kept)
            merged = torch.einsum("oc...,cp->op...", wide, back)
            target = small.get_submodule(name).weight
            target.copy_(merged.to(target))
    return small


def _channels_last(value: Tensor) -> Tensor:
    return value.movedim(1, -1).flatten(0, -2) if value.dim() == 4 else value.flatten(0, -2)


@contextmanager
def _inputs(model: nn.Module, names: Sequence[str]) -> Iterator[dict[str, Tensor]]:
    seen: dict[str, Tensor] = {}

    def keep(name: str) -> Callable[[nn.Module, Any], None]:
        return lambda _, given: seen.__setitem__(name, given[0].detach())

    handles = [model.get_submodule(n).register_forward_pre_hook(keep(n)) for n in names]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def _outputs(model: nn.Module, name: str) -> Iterator[list[Tensor]]:
    seen: list[Tensor] = []
    handle = model.get_submodule(name).register_forward_hook(
        lambda _, __, output: seen.append(output.detach().clone())
    )
    try:
        yield seen
    finally:
        handle.remove()
