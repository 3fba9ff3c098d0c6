"""Elementwise operators: channels that meet at one position are one channel."""

from __future__ import annotations

import torch
from torch import Tensor

from seprune.graph.channel_ids import NEUTRAL, UnknownUse, Walker, compact, varying
from seprune.graph.op_rules.factories import stretch_operands
from seprune.graph.trace import Node


def elementwise(walker: Walker, node: Node) -> None:
    """Channels that meet at one position are one channel."""
    stretch_operands(walker, node)
    operands = walker.tensors(node)
    live = [v for v in node.inputs() if v in walker.result.depends]
    out = tie_all(walker, node, operands)
    if node.op.startswith(("aten.add", "aten.sub")) and len(set(live)) > 1:
        walker.result.sums.append((node.id, torch.unique(compact(out))))
    for index in range(len(node.outputs)):
        walker.set(node, out, index)


def unary(walker: Walker, node: Node) -> None:
    """Every value for itself: channels stay."""
    for index in range(len(node.outputs)):
        walker.set(node, walker.ids(node.args[0].value), index)


def tie_all(walker: Walker, node: Node, operands: list[Tensor]) -> Tensor:
    shape = torch.broadcast_shapes(*[o.shape for o in operands])  # type: ignore[no-untyped-call]
    out: Tensor | None = None
    for operand in _without_broadcasts(walker, node, operands, len(shape)):
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


def _without_broadcasts(
    walker: Walker, node: Node, operands: list[Tensor], dims: int
) -> list[Tensor]:
    """The operands, without ids where one number meets many channels: that couples nothing.

    A spatial gate (B, 1, H, W) or a mask over positions multiplies every channel alike. If it is
    a channel itself, it has to stay, for without it nothing would be left to multiply by.
    """
    places = [{d + dims - o.dim() for d in varying(o)} for o in operands]
    kept = []
    for number, operand in enumerate(operands):
        others = set().union(*(p for n, p in enumerate(places) if n != number))
        one = int(operand.reshape(-1)[0]) if not places[number] and operand.numel() else NEUTRAL
        sizes = (1,) * (dims - operand.dim()) + compact(operand).shape
        if one == NEUTRAL or not any(one > 0 or sizes[d] == 1 for d in others):
            kept.append(operand)
            continue
        if one > 0:
            walker.freeze(
                torch.tensor([one]), f"it is spread over channels in {walker.place(node)}"
            )
        kept.append(walker.uniform(NEUTRAL, operand.shape))
    return kept


def _narrow_together(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    for d in range(a.dim()):
        if a.shape[d] > 1 and a.stride(d) == 0 and b.stride(d) == 0:
            a, b = a.narrow(d, 0, 1), b.narrow(d, 0, 1)
    return a, b
