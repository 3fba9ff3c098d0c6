"""The only module that calls torch-pruning: taking channels out of one layer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch_pruning as tp
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.nn.utils.prune import BasePruningMethod
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from seprune.errors import InputError
from seprune.graph.sizes import is_size, set_size

_OUT = {
    nn.Linear: tp.prune_linear_out_channels,
    nn.LayerNorm: tp.prune_layernorm_out_channels,
    nn.GroupNorm: lambda norm, removed: _cut_group_norm(norm, removed),
    nn.PReLU: tp.prune_prelu_out_channels,
    nn.modules.batchnorm._BatchNorm: tp.prune_batchnorm_out_channels,
    nn.modules.instancenorm._InstanceNorm: tp.prune_instancenorm_out_channels,
}
_IN = {nn.Linear: tp.prune_linear_in_channels}


def cut_layer(model: nn.Module, layer: str, keep: Mapping[str, Tensor]) -> None:
    """Keep only the given positions on the given sides of one layer, in place.

    Args:
        layer: path of a module or of a bare parameter.
        keep: for each side (`out`, `in`, `dim0`, `view#1[1]`) the kept positions, ascending.

    Raises:
        InputError: a layer of a kind that cannot be cut.
    """
    for side in filter(is_size, keep):
        set_size(model.get_submodule(layer), side, len(keep[side]))
    for side in [s for s in keep if s.startswith("dim")]:
        _cut_parameter(model, layer, int(side[3:]), keep[side])
    sides = {s: k for s, k in keep.items() if s in ("out", "in")}
    if sides:
        _cut_module(model.get_submodule(layer), layer, sides)


def _cut_module(module: nn.Module, layer: str, keep: dict[str, Tensor]) -> None:
    if (undo := _undoing(module)) is not None:
        raise InputError(
            f"layer '{layer}' cannot be cut before torch.nn.utils.{undo}",
            why="its weights are computed from what is stored",
            fix=f"torch.nn.utils.{undo}, which leaves its outputs as they are",
            code="uncuttable",
        )
    frozen = [n for n, p in module.named_parameters(recurse=False) if not p.requires_grad]
    if isinstance(module, nn.modules.conv._ConvNd):
        _cut_convolution(module, keep)
    else:
        for side, table in (("in", _IN), ("out", _OUT)):
            if side in keep:
                _by_kind(module, layer, side, keep[side], table)
    for name in frozen:
        getattr(module, name).requires_grad_(False)


def _undoing(module: nn.Module) -> str | None:
    """The call that makes computed weights parameters again; None where they are."""
    if parametrize.is_parametrized(module):
        return "parametrize.remove_parametrizations(layer, 'weight')"
    for hook in module._forward_pre_hooks.values():
        if isinstance(hook, BasePruningMethod):
            return f"prune.remove(layer, {getattr(hook, '_tensor_name', 'weight')!r})"
        if isinstance(hook, (WeightNorm, SpectralNorm)):
            kind = "weight" if isinstance(hook, WeightNorm) else "spectral"
            return f"remove_{kind}_norm(layer)"
    return None


def _by_kind(
    module: nn.Module, layer: str, side: str, keep: Tensor, table: Mapping[Any, Any]
) -> None:
    for kind, prune in table.items():
        if isinstance(module, kind):
            width = {"in": "in_features", "out": "out_features"}[side]
            total = getattr(module, width, None) or _width(module)
            prune(module, _removed(keep, total))
            return
    raise InputError(
        f"layer '{layer}' of type {type(module).__name__} cannot be cut",
        why="seprune cuts convolutions, linear layers and normalisations",
        fix=f"protect it: plan.protect=['{layer}']",
        code="uncuttable",
    )


def _width(module: nn.Module) -> int:
    for name in ("num_features", "num_channels", "num_parameters"):
        if hasattr(module, name):
            return int(getattr(module, name))
    return int(module.normalized_shape[-1])  # type: ignore[index]


def _cut_convolution(conv: Any, keep: dict[str, Tensor]) -> None:
    outs = keep.get("out", torch.arange(conv.out_channels))
    ins = keep.get("in", torch.arange(conv.in_channels))
    extra = _extras(conv)
    removed = _removed(outs, conv.out_channels)
    if conv.groups == 1:
        tp.prune_conv_in_channels(conv, _removed(ins, conv.in_channels))
        tp.prune_conv_out_channels(conv, removed)
    elif conv.groups == conv.in_channels == conv.out_channels:
        tp.prune_depthwise_conv_out_channels(conv, removed)
    elif conv.transposed:
        _cut_transposed_groups(conv, outs, ins)
    else:
        _cut_conv_groups(conv, outs, ins)
    for name, tensor in extra.items():
        setattr(conv, name, nn.Parameter(tensor[outs.to(tensor.device)]))


def _extras(conv: Any) -> dict[str, Tensor]:
    """Per-channel parameters of a subclass, like the gain of a standardised convolution."""
    return {
        name: parameter.detach()
        for name, parameter in conv.named_parameters(recurse=False)
        if name not in ("weight", "bias") and parameter.shape[:1] == (conv.out_channels,)
    }


def _cut_conv_groups(conv: Any, outs: Tensor, ins: Tensor) -> None:
    """Grouped convolutions give up whole conv groups, or the same number inside each."""
    groups, per_in = conv.groups, conv.in_channels // conv.groups
    kept = torch.zeros(conv.in_channels, dtype=torch.bool)
    if per_in == 1:  # depthwise with a channel multiplier
        ins = torch.unique(outs // (conv.out_channels // groups))
    kept[ins] = True
    full = kept.view(groups, per_in)
    weight = conv.weight.detach()
    if bool((full.all(1) | ~full.any(1)).all()) and not bool(full.all()):
        conv.groups = int(full.any(1).sum())
        rows = weight[outs.to(weight.device)]
    else:
        columns = full.nonzero()[:, 1].view(groups, -1)
        block = (outs // (conv.out_channels // groups)).to(columns.device)
        index = columns[block].to(weight.device)
        rows = weight[outs.to(weight.device)]
        rows = torch.stack([row[i] for row, i in zip(rows, index)])
    conv.weight = nn.Parameter(rows)
    if conv.bias is not None:
        conv.bias = nn.Parameter(conv.bias.detach()[outs.to(weight.device)])
    conv.in_channels, conv.out_channels = len(ins), len(outs)


def _cut_transposed_groups(conv: Any, outs: Tensor, ins: Tensor) -> None:
    """The weight is (inputs, outputs of a conv group, ...): block by block."""
    groups, per_in, per_out = (
        conv.groups, conv.in_channels // conv.groups, conv.out_channels // conv.groups
    )  # fmt: skip
    if per_in == 1:  # depthwise with a channel multiplier
        ins = torch.unique(outs // per_out)
    weight, parts = conv.weight.detach(), []
    for block in range(groups):
        rows = ins[ins // per_in == block].to(weight.device)
        columns = outs[outs // per_out == block].to(weight.device) - block * per_out
        if len(columns):
            parts.append(weight[rows][:, columns])
    conv.weight, conv.groups = nn.Parameter(torch.cat(parts)), len(parts)
    if conv.bias is not None:
        conv.bias = nn.Parameter(conv.bias.detach()[outs.to(weight.device)])
    conv.in_channels, conv.out_channels = len(ins), len(outs)


def _cut_group_norm(norm: nn.GroupNorm, removed: list[int]) -> None:
    """Norm groups go whole, or lose as many channels each."""
    kept = torch.ones(norm.num_groups, norm.num_channels // norm.num_groups, dtype=torch.bool)
    kept.view(-1)[removed] = False
    if bool((kept.all(1) | ~kept.any(1)).all()):
        norm.num_groups = int(kept.any(1).sum())
    tp.prune_groupnorm_out_channels(norm, removed)


def _removed(keep: Tensor, total: int) -> list[int]:
    return sorted(set(range(total)) - set(keep.tolist()))


def _cut_parameter(model: nn.Module, path: str, dim: int, keep: Tensor) -> None:
    owner, _, name = path.rpartition(".")
    module = model.get_submodule(owner)
    tensor = getattr(module, name)
    made = tensor.detach().index_select(dim, keep.to(tensor.device))
    if isinstance(tensor, nn.Parameter):
        setattr(module, name, nn.Parameter(made, requires_grad=tensor.requires_grad))
        if isinstance(module, nn.PReLU):
            module.num_parameters = len(keep)
    else:
        module._buffers[name] = made
