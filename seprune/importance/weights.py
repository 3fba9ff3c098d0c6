"""Scores that weights alone give: the baselines, by the same interface as the gates."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from seprune.graph.groups import ChannelGroup, Member

Moments = Mapping[str, Mapping[str, Tensor]]
_NORMS = (nn.modules.batchnorm._BatchNorm, nn.LayerNorm)


def l1(model: nn.Module, group: ChannelGroup, seed: int) -> Tensor | None:
    """Mean over the group's layers and norms of the L1 norm of each unit's weights (1608.08710)."""
    return _norms(model, group, 1)


def l2(model: nn.Module, group: ChannelGroup, seed: int) -> Tensor | None:
    """Mean over the group's layers and norms of each unit's squared L2 norm (2301.12900)."""
    return _norms(model, group, 2)


def bn_scale(model: nn.Module, group: ChannelGroup, seed: int) -> Tensor | None:
    """Mean |gamma| of the group's norms (Liu et al., 1708.06519); None without a norm."""
    kinds = (*_NORMS, nn.GroupNorm)
    found = [_by_unit(gamma.abs(), member) for member, gamma in _gammas(model, group, kinds)]
    return torch.stack(found).mean(0) if found else None


def lamp(model: nn.Module, group: ChannelGroup, seed: int) -> Tensor | None:
    """Squared norm over the sum of all squared norms that are not smaller (2010.07611)."""
    norms = _norms(model, group, 2)
    if norms is None:
        return None
    order = norms.argsort(descending=True)
    larger = norms[order].cumsum(0)  # of this one and all that are not smaller
    scores = torch.empty_like(norms)
    scores[order] = norms[order] / larger.clamp_min(1e-300)
    return scores


def fpgm(model: nn.Module, group: ChannelGroup, seed: int) -> Tensor | None:
    """Mean over the layers of the distances to all other units' weights (1811.00250).

    As torch-pruning has it: between the weights squared, on both sides of the group.
    """
    found = [torch.cdist(r.square(), r.square()).sum(1) for r in _rows(model, group)]
    return torch.stack(found).mean(0) if found else None


def uniform(model: nn.Module, group: ChannelGroup, seed: int) -> Tensor:
    """Width scaling: one ranking takes the same share of every group, from its last unit on."""
    return 1 - torch.arange(group.units, dtype=torch.float64) / group.units


def taylor(model: nn.Module, group: ChannelGroup, moments: Moments) -> Tensor | None:
    """Mean over the layers of sum |w dL/dw| (Molchanov et al., 1906.10771); norms do not count."""
    found = [rows.sum(1) for rows in _rows(model, group, _of(moments, "taylor"))]
    return torch.stack(found).mean(0) if found else None


def hessian(model: nn.Module, group: ChannelGroup, moments: Moments) -> Tensor | None:
    """Mean over the layers and norms of sum w^2 E[(dL/dw)^2] (LeCun et al., 1989)."""
    table = _of(moments, "hessian")
    found = [rows.sum(1) for rows in _rows(model, group, table)]
    found += [_by_unit(values, member) for member, values in _gammas(model, group, _NORMS, table)]
    return torch.stack(found).mean(0) if found else None


def _of(moments: Moments, which: str) -> dict[str, Tensor]:
    return {name: own[which] for name, own in moments.items()}


def random(model: nn.Module, group: ChannelGroup, seed: int) -> Tensor:
    """Uniform numbers that depend on the seed and the group's name alone."""
    key = sum((i + 1) * ord(c) for i, c in enumerate(group.name))
    generator = torch.Generator().manual_seed(seed * 1_000_003 + key)
    return torch.rand(group.units, generator=generator, dtype=torch.float64)


def gamma_of(model: nn.Module, group: ChannelGroup, layers: Collection[str]) -> Tensor:
    """|gamma| of the norms that come right after one of `layers`, by unit; 1 without a norm."""
    after, found = False, []
    for member, module in _modules(model, group):
        if member.side == "out" and not isinstance(module, (*_NORMS, nn.GroupNorm)):
            after = member.layer in layers
        elif after and member.side == "out" and module.weight is not None:
            found.append(_by_unit(module.weight.abs(), member) / member.index.shape[1])
    ones = torch.ones(group.units, dtype=torch.float64)
    return torch.stack(found).mean(0) if found else ones


def _norms(model: nn.Module, group: ChannelGroup, p: int) -> Tensor | None:
    """Norms count like layers, as in torch-pruning."""
    norms = [rows.abs().pow(p).sum(1) for rows in _rows(model, group)]
    gammas = _gammas(model, group, _NORMS)
    norms += [_by_unit(gamma.abs().pow(p), member) for member, gamma in gammas]
    return torch.stack(norms).mean(0) if norms else None


def _gammas(
    model: nn.Module,
    group: ChannelGroup,
    kinds: tuple[type[Any], ...],
    table: Mapping[str, Tensor] | None = None,
) -> Iterator[tuple[Member, Tensor]]:
    """The scale of every norm of the group, or the numbers that a table has for it."""
    for member, module in _modules(model, group):
        weight = module.weight if isinstance(module, kinds) else None
        if weight is not None:
            values = weight if table is None else table.get(f"{member.layer}.weight")
            if values is not None:
                yield member, values


def _rows(
    model: nn.Module, group: ChannelGroup, table: Mapping[str, Tensor] | None = None
) -> Iterator[Tensor]:
    """For every convolution and linear layer of the group its weights by unit: (units, *).

    Depthwise convolutions do not count, as in torch-pruning.

    Args:
        table: numbers (outputs, inputs, ...) that stand in for the weights of that name.
    """
    parameters = dict(model.named_parameters())
    for member in group.members if table is None else ():
        bare = parameters.get(member.layer)
        if bare is not None and bare.dim() > 1 and member.side.startswith("dim"):
            yield _by_unit(bare.movedim(int(member.side[3:]), 0).flatten(1), member)
    for member, module in _modules(model, group):
        if not isinstance(module, (nn.modules.conv._ConvNd, nn.Linear)):
            continue
        weight = module.weight if table is None else table.get(f"{member.layer}.weight")
        if weight is not None and not _is_depthwise(module):
            yield _by_unit(_side(weight.detach().double().cpu(), module, member), member)


def _side(weight: Tensor, module: Any, member: Member) -> Tensor:
    """The weights of one side of a layer, one row a channel."""
    groups = getattr(module, "groups", 1)
    if getattr(module, "transposed", False) and groups == 1:
        weight = weight.transpose(0, 1)
    if member.side == "out":
        return weight.flatten(1)
    if groups == 1:
        return weight.transpose(0, 1).flatten(1)
    per = weight.shape[1]
    spread = weight.reshape(groups, -1, per, *weight.shape[2:]).transpose(1, 2)
    return spread.flatten(0, 1).flatten(1)


def _is_depthwise(module: Any) -> bool:
    groups = getattr(module, "groups", 1)
    return groups > 1 and groups == module.in_channels == module.out_channels


def _by_unit(values: Tensor, member: Member) -> Tensor:
    """Positions put together by unit: (units, *); vectors become the sum over positions."""
    index = torch.from_numpy(member.index)
    picked = values.detach().double().cpu()[index]
    return picked.flatten(1) if picked.dim() > 2 else picked.sum(1)


def _modules(model: nn.Module, group: ChannelGroup) -> Iterator[tuple[Member, Any]]:
    modules = dict(model.named_modules())
    for member in group.members:
        if member.side in ("out", "in") and member.layer in modules:
            yield member, modules[member.layer]
