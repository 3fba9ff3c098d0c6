"""The derivative that scores a dependency group, worked out image by image with masks.

A factor m_u = 1 multiplies every read of unit u by a layer outside the excitations, in the
functions that modules and forwards call.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from seprune.graph.groups import Member, NetworkStructure

_LAYERS = ("conv1d", "conv2d", "conv3d", "conv_transpose2d", "linear")
Objective = Callable[[Tensor, int], Tensor]


def masked_reads(
    model: nn.Module, structure: NetworkStructure, x: Tensor, z: Objective
) -> dict[str, Tensor]:
    """dz/dm (images, units) of every group of features that a layer reads."""
    inside = {layer for gate in structure.gates for layer in gate.excitation}
    reads = {
        g.name: found
        for g in structure.groups
        if g.role == "features" and (found := [m for m in g.members if _reads(m, inside)])
    }
    if not reads:
        return {}
    rows: dict[str, list[Tensor]] = {name: [] for name in reads}
    units = {g.name: g.units for g in structure.groups}
    for i in range(len(x)):
        masks = {n: torch.ones(units[n], dtype=x.dtype, requires_grad=True) for n in reads}
        with ExitStack() as stack:
            for name, members in reads.items():
                for member in members:
                    stack.enter_context(_masked(model, member, masks[name]))
            value = z(model(x[i : i + 1]), i)
        found = torch.autograd.grad(value, list(masks.values()), allow_unused=True)
        for (name, mask), gradient in zip(masks.items(), found, strict=True):
            rows[name].append(torch.zeros_like(mask) if gradient is None else gradient)
    return {name: torch.stack(own) for name, own in rows.items()}


def _reads(member: Member, inside: set[str]) -> bool:
    bare = member.side in ("dim1", "dim0") and member.index.size and member.layer.count(".") == 0
    return member.layer not in inside and (member.side == "in" or (bare and member.side == "dim1"))


@contextmanager
def _masked(model: nn.Module, member: Member, mask: Tensor) -> Iterator[None]:
    index = torch.from_numpy(member.index)

    def scaled(x: Tensor, dim: int) -> Tensor:
        full = torch.ones(member.total, dtype=x.dtype)
        full = full.index_put((index.reshape(-1),), mask[:, None].expand(index.shape).reshape(-1))
        shape = [1] * x.dim()
        shape[dim] = member.total
        return x * full.view(shape)

    path = member.layer if member.side.startswith("dim") else f"{member.layer}.weight"
    with _OnParameter(model.get_parameter(path), scaled):
        yield


class _OnParameter(TorchFunctionMode):
    def __init__(self, weight: Tensor, scaled: Callable[[Tensor, int], Tensor]) -> None:
        super().__init__()
        self.weight, self.scaled = weight, scaled

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        if name in _LAYERS and args[1] is self.weight:
            args = (self.scaled(args[0], -1 if name == "linear" else 1), *args[1:])
        return func(*args, **(kwargs or {}))
