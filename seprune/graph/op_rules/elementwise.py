"""Elementwise operators: channels that meet at one position are one channel."""

from __future__ import annotations

import torch
from torch import Tensor

from seprune.graph.channel_ids import FIXED, NEUTRAL, UnknownUse, Walker, compact
from seprune.graph.trace import Node


def elementwise(walker: Walker, node: Node) -> None:
    operands = walker.tensors(node)
    live = [v for v in node.inputs() if v in walker.result.depends]
    out = tie_all(walker, node, operands)
    if node.op.startswith(("aten.add", "aten.sub")) and len(set(live)) > 1:
        walker.result.sums.append((node.id, torch.unique(compact(out))))
    for index in range(len(node.outputs)):
        walker.set(node, out, index)


def unary(walker: Walker, node: Node) -> None:
    for index in range(len(node.outputs)):
        walker.set(node, walker.ids(node.args[0].value), index)


def fill(walker: Walker, node: Node) -> None:
    """New tensors: nothing in them follows a channel."""
    for index, value in enumerate(node.outputs):
        shape = walker.trace.shape(value)
        number = FIXED if torch.Size(shape).numel() > 1 else NEUTRAL
        walker.set(node, walker.uniform(number, shape), index)


def tie_all(walker: Walker, node: Node, operands: list[Tensor]) -> Tensor:
    shape = torch.broadcast_shapes(*[o.shape for o in operands])  # type: ignore[no-untyped-call]
    out: Tensor | None = None
    for operand in operands:
        wide = operand.expand(shape)
        if out is None:
            out = wide
            continue
        walker.tie(out, wide, walker.place(node))
        a, b = _narrow_together(out, wide)
        merged = torch.where(a > 0, a, torch.where(b > 0, b, torch.minimum(a, b)))
        out = merged.expand(shape)
    if out is None:
        raise UnknownUse("no tensor to read")
    return out


def _narrow_together(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    for d in range(a.dim()):
        if a.shape[d] > 1 and a.stride(d) == 0 and b.stride(d) == 0:
            a, b = a.narrow(d, 0, 1), b.narrow(d, 0, 1)
    return a, b
