"""The parent of a cut network with the removed channels masked: what the cut has to equal."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from seprune.graph.groups import Member
from seprune.graph.sizes import is_size
from seprune.pruning.plan import PruningPlan
from seprune.runtime.module_copy import copy_module

_NORMS = (
    nn.modules.batchnorm._BatchNorm,
    nn.modules.instancenorm._InstanceNorm,
    nn.GroupNorm,
    nn.LayerNorm,
)


def checkable(model: nn.Module, *, seed: int = 0) -> nn.Module:
    """A float64 copy on the CPU in which no parameter is constant.

    A scale that starts at zero would hide whatever goes wrong before it.
    """
    twin = copy_module(model).cpu().double()
    draw = torch.Generator().manual_seed(seed)
    noisy = [p.data for p in twin.parameters() if p.is_floating_point()]
    for module in twin.modules():
        mean = getattr(module, "running_mean", None)
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and mean is not None:
            noisy.append(mean)
    for tensor in noisy:
        spread = float(tensor.std()) if tensor.numel() > 1 else 0.0
        size = 0.1 * spread if spread > 0 else 0.3
        tensor.add_(torch.randn(tensor.shape, generator=draw).to(tensor) * size)
    return twin


def mask_(model: nn.Module, plan: PruningPlan, *, producers: bool) -> None:
    """Zero, in place, the weights by which layers read the channels that `plan` removes.

    Channels that no layer reads are zeroed where they are made.

    Args:
        producers: zero the weights that make these channels as well.
    """
    modules = dict(model.named_modules())
    tensors: dict[str, Tensor] = {**dict(model.named_buffers()), **dict(model.named_parameters())}
    for layer, sides in plan.layers().items():
        for side, kept in sides.items():
            if side.startswith("dim"):
                tensor, dim = tensors[layer].data, int(side[3:])
                gone = _gone(kept, tensor.shape[dim])
                if producers or tensor.dim() > 1:
                    tensor.index_fill_(dim, gone, 0)
            elif side == "in":
                _mask_reads(modules[layer], kept)
            elif side == "out" and producers:
                _mask_outputs(modules[layer], kept)
    for member, kept in () if producers else _unread(plan):
        _mask_outputs(modules[member.layer], kept)


def _unread(plan: PruningPlan) -> Iterator[tuple[Member, Any]]:
    """Where groups are made that no layer reads: products of two maps read queries and keys."""
    for group in plan.groups:
        gone = sorted(set(range(group.units)) - set(group.keep))
        members = [m for m in group.members if not is_size(m.side)]
        if gone and all(m.side == "out" for m in members):
            for member in members:
                yield member, np.setdiff1d(np.arange(member.total), member.index[gone])


def _gone(kept: Any, total: int) -> Tensor:
    return torch.from_numpy(np.setdiff1d(np.arange(total), kept))


def _mask_reads(module: Any, kept: Any) -> None:
    weight = module.weight.data
    groups = int(getattr(module, "groups", 1))
    total = module.in_channels if hasattr(module, "in_channels") else module.in_features
    transposed = isinstance(module, nn.modules.conv._ConvTransposeNd)
    for channel in _gone(kept, total).tolist():
        if transposed:
            weight[channel] = 0
            continue
        block, column = divmod(channel, total // groups)
        rows = len(weight) // groups
        weight[block * rows : (block + 1) * rows, column] = 0


def _mask_outputs(module: Any, kept: Any) -> None:
    transposed = isinstance(module, nn.modules.conv._ConvTransposeNd)
    width = module.out_channels if hasattr(module, "out_channels") else None
    for name, parameter in module.named_parameters(recurse=False):
        data = parameter.data
        if transposed and name == "weight":
            _mask_transposed(module, data, kept)
        elif width is not None or isinstance(module, (nn.Linear, *_NORMS)):
            total = width or data.shape[0]
            if data.dim() and data.shape[0] == total:
                data.index_fill_(0, _gone(kept, total), 0)


def _mask_transposed(module: Any, weight: Tensor, kept: Any) -> None:
    each = module.out_channels // module.groups
    rows = len(weight) // module.groups
    for channel in _gone(kept, module.out_channels).tolist():
        block, column = divmod(channel, each)
        weight[block * rows : (block + 1) * rows, column] = 0
