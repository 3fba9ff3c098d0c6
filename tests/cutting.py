"""What the tests of groups, plans and cuts share: random plans, and the parent with masks."""

from __future__ import annotations

import copy
import random
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from seprune.graph.groups import NetworkStructure
from seprune.pruning.plan import PruningPlan, plan_of


def random_plan(structure: NetworkStructure, seed: int = 0, share: float = 2 / 3) -> PruningPlan:
    """Keep about `share` of the units of every prunable group, drawn by `seed`."""
    draw = random.Random(seed)
    keep = {
        g.name: draw.sample(range(g.units), max(1, int(g.units * share)))
        for g in structure.groups
        if g.prunable
    }
    return plan_of(structure.groups, keep, {})


def kept(plan: PruningPlan) -> dict[str, int]:
    return {g.name: len(g.keep) for g in plan.groups}


def counted(model: nn.Module, inputs: Any) -> tuple[int, int]:
    """MACs of one sample as FlopCounterMode counts them, and parameters."""
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(inputs[:1])
    return counter.get_total_flops() // 2, sum(p.numel() for p in model.parameters())


def masked(model: nn.Module, plan: PruningPlan) -> nn.Module:
    """A copy whose consumers do not hear the channels that the plan removes."""
    parent = copy.deepcopy(model)
    with torch.no_grad():
        for weight, dim, gone in _deaf(parent, plan):
            weight.index_fill_(dim, gone, 0)
    return parent


def _deaf(model: nn.Module, plan: PruningPlan) -> Iterator[tuple[Tensor, int, Tensor]]:
    modules, parameters = dict(model.named_modules()), dict(model.named_parameters())
    for layer, side, stay, total in _sides(plan):
        gone = torch.tensor(sorted(set(range(total)) - set(stay.tolist())), dtype=torch.long)
        if side == "dim1" and layer in parameters:
            yield parameters[layer], 1, gone
        if side != "in":
            continue
        weight, groups = modules[layer].weight, getattr(modules[layer], "groups", 1)
        dim = 0 if getattr(modules[layer], "transposed", False) else 1
        per, rows = total // groups, weight.shape[0] // groups
        for g in range(groups) if groups > 1 and dim == 1 else ():
            inside = gone[(gone >= g * per) & (gone < (g + 1) * per)] - g * per
            yield weight[g * rows : (g + 1) * rows], 1, inside
        if groups == 1 or dim == 0:
            yield weight, dim, gone


def _sides(plan: PruningPlan) -> Iterator[tuple[str, str, Any, int]]:
    totals = {(m.layer, m.side): m.total for g in plan.groups for m in g.members}
    for layer, sides in plan.layers().items():
        for side, stay in sides.items():
            yield layer, side, stay, totals[layer, side]


def assert_kept(small: nn.Module, model: nn.Module, plan: PruningPlan) -> None:
    """Every parameter and buffer of `small` is bit-equal to the parent's where the plan says."""
    cuts = plan.layers()
    parents = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    found = {**dict(small.named_parameters()), **dict(small.named_buffers())}
    assert found.keys() == parents.keys()
    for name, tensor in found.items():
        layer, _, leaf = name.rpartition(".")
        module = dict(model.named_modules())[layer]
        expected = _cut(parents[name].detach(), cuts.get(layer, {}), leaf, module)
        for side, stay in cuts.get(name, {}).items():
            expected = expected.index_select(int(side[3:]), torch.from_numpy(stay))
        assert torch.equal(tensor.detach(), expected), name


def _cut(tensor: Tensor, sides: dict[str, Any], leaf: str, module: Any) -> Tensor:
    """Written out once more, independently of `cut.py`: rows by `out`, columns by `in`."""
    groups, turned = getattr(module, "groups", 1), getattr(module, "transposed", False)
    out = sides.get("out")
    out = torch.from_numpy(out) if out is not None else None
    if tensor.dim() == 0 or leaf in ("num_batches_tracked",):
        return tensor
    if leaf != "weight" or tensor.dim() == 1:
        return tensor if out is None or tensor.shape[0] == 1 else tensor[out]
    rows = list(tensor.transpose(0, 1) if turned and groups == 1 else tensor)
    chosen = range(len(rows)) if out is None else out.tolist()
    made = []
    for o in chosen:
        row = rows[o]
        if "in" in sides:
            per, block = row.shape[0], o // (len(rows) // groups)
            stay = [int(i) - block * per for i in sides["in"] if int(i) // per == block]
            row = row[stay]
        made.append(row)
    whole = torch.stack(made)
    return whole.transpose(0, 1) if turned and groups == 1 else whole
