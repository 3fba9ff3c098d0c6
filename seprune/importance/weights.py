"""Scores that weights alone give: the baselines, through the same door as the gates."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from seprune.groups import ChannelGroup, Member

WeightScore = Callable[[nn.Module, ChannelGroup, int], Tensor | None]


def l1(model: nn.Module, group: ChannelGroup, seed: int) -> Tensor | None:
    """Mean over the group's layers of the L1 norm of each unit's weights (1608.08710)."""
    return _norms(model, group, 1)


def l2(model: nn.Module, group: ChannelGroup, seed: int) -> Tensor | None:
    """Mean over the group's layers of the squared L2 norm of each unit's weights (2301.12900)."""
    return _norms(model, group, 2)


def bn_scale(model: nn.Module, group: ChannelGroup, seed: int) -> Tensor | None:
    """Mean |gamma| of the group's norms (Liu et al., 1708.06519); None without a norm."""
    found = [
        _by_unit(module.weight.abs(), member)
        for member, module in _modules(model, group)
        if isinstance(module, (nn.modules.batchnorm._BatchNorm, nn.LayerNorm, nn.GroupNorm))
        and module.weight is not None
    ]
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
    """Sum of distances to all other filters of the first layer (He et al., 1811.00250)."""
    for rows in _rows(model, group):
        return torch.cdist(rows, rows).sum(1)
    return None


def random(model: nn.Module, group: ChannelGroup, seed: int) -> Tensor:
    """Uniform numbers that depend on the seed and the group's name alone."""
    key = sum((i + 1) * ord(c) for i, c in enumerate(group.name))
    generator = torch.Generator().manual_seed(seed * 1_000_003 + key)
    return torch.rand(group.units, generator=generator, dtype=torch.float64)


def _norms(model: nn.Module, group: ChannelGroup, p: int) -> Tensor | None:
    norms = [rows.abs().pow(p).sum(1) for rows in _rows(model, group)]
    return torch.stack(norms).mean(0) if norms else None


def _rows(model: nn.Module, group: ChannelGroup) -> Iterator[Tensor]:
    """For every convolution and linear layer of the group its weights by unit: (units, *)."""
    parameters = dict(model.named_parameters())
    for member in group.members:
        bare = parameters.get(member.layer)
        if bare is not None and bare.dim() > 1 and member.side.startswith("dim"):
            yield _by_unit(bare.movedim(int(member.side[3:]), 0).flatten(1), member)
    for member, module in _modules(model, group):
        if not isinstance(module, (nn.modules.conv._ConvNd, nn.Linear)):
            continue
        weight = module.weight.detach().double().cpu()
        groups = getattr(module, "groups", 1)
        if getattr(module, "transposed", False) and groups == 1:
            weight = weight.transpose(0, 1)
        if member.side == "out":
            yield _by_unit(weight.flatten(1), member)
        elif groups == 1:
            yield _by_unit(weight.transpose(0, 1).flatten(1), member)
        else:
            per = weight.shape[1]
            spread = weight.reshape(groups, -1, per, *weight.shape[2:]).transpose(1, 2)
            yield _by_unit(spread.flatten(0, 1).flatten(1), member)


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
