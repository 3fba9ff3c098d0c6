"""Scores for channels without a gate, from the next scored channels through the weights.

Neuron importance score propagation (Yu et al., arXiv:1711.05908), with gates in place of the final
responses: s_c = sum_o |W_oc| s_o over the consumers' output channels o.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from seprune.graph.groups import ChannelGroup, NetworkStructure


def propagate(
    model: nn.Module, structure: NetworkStructure, scores: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Scores (units,) for every group; those given stay as they are."""
    modules = dict(model.named_modules())
    owners = _owners(structure)
    found = {name: value / value.mean().clamp_min(1e-300) for name, value in scores.items()}
    result = dict(scores)
    for group in reversed(structure.groups):
        if group.name in result:
            continue
        flows = []
        for member in group.members:
            module = modules.get(member.layer)
            if member.side == "in" and isinstance(module, (nn.modules.conv._ConvNd, nn.Linear)):
                influence = _influence(module)
                after = _outputs(module, member.layer, owners, found)
                flow = (influence * after[:, None]).sum(0)
                flows.append(flow[torch.from_numpy(member.index)].sum(1))
        ones = torch.ones(group.units, dtype=torch.float64)  # the classifier's outputs
        total = torch.stack(flows).sum(0) if flows else ones
        result[group.name] = total
        found[group.name] = total / total.mean().clamp_min(1e-300)
    return result


def _owners(structure: NetworkStructure) -> dict[str, list[tuple[ChannelGroup, torch.Tensor]]]:
    owners: dict[str, list[tuple[ChannelGroup, Tensor]]] = {}
    for group in structure.groups:
        for member in group.members:
            if member.side == "out":
                owners.setdefault(member.layer, []).append((group, torch.from_numpy(member.index)))
    return owners


def _influence(module: nn.Module) -> Tensor:
    """|W| summed over kernel positions, (outputs, inputs), also for grouped convolutions."""
    weight = module.get_parameter("weight").detach().double().cpu().abs()
    weight = weight.reshape(*weight.shape[:2], -1).sum(2)
    if getattr(module, "transposed", False):
        weight = weight.T
    groups = int(getattr(module, "groups", 1))
    if groups == 1:
        return weight
    rows, per = weight.shape[0] // groups, weight.shape[1]
    full = torch.zeros(weight.shape[0], per * groups, dtype=weight.dtype)
    for g in range(groups):
        full[g * rows : (g + 1) * rows, g * per : (g + 1) * per] = weight[g * rows : (g + 1) * rows]
    return full


def _outputs(
    module: nn.Module,
    layer: str,
    owners: Mapping[str, list[tuple[ChannelGroup, Tensor]]],
    found: Mapping[str, Tensor],
) -> Tensor:
    """The score of every output of a layer; 1 where none is known (the classifier)."""
    width = getattr(module, "out_channels", None) or module.out_features
    after = torch.ones(int(width), dtype=torch.float64)  # type: ignore[arg-type]
    for group, index in owners.get(layer, []):
        if group.name in found:
            after[index] = found[group.name][:, None].expand(index.shape)
    return after
