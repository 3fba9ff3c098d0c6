"""Tensors that a forward makes from nothing: one value everywhere, as wide as what they meet."""

from __future__ import annotations

import torch

from seprune.graph.channel_ids import FIXED, NEUTRAL, Walker, along, varying
from seprune.graph.trace import Node
from seprune.graph.written import SIZED

_SAME = ("_to_copy", "clone", "detach", "alias", "lift_fresh", "expand")


def fill(walker: Walker, node: Node) -> None:
    """New tensors: nothing in them follows a channel."""
    for index, value in enumerate(node.outputs):
        shape = walker.trace.shape(value)
        number = FIXED if torch.Size(shape).numel() > 1 else NEUTRAL
        walker.set(node, walker.uniform(number, shape), index)


def constant(walker: Walker, node: Node) -> None:
    """`fill`, with one value everywhere: its width is free where the call says it."""
    fill(walker, node)
    call = walker.function_of.get(node.id)
    if call is not None and call.function in SIZED and call.output == node.outputs[0]:
        walker.stretchable.add(node.outputs[0])


def constant_like(walker: Walker, node: Node) -> None:
    """A new tensor as wide as another one, into which that is written: circular padding."""
    constant(walker, node)
    read, shape = walker.ids(node.args[0].value), walker.trace.shape(node.outputs[0])
    vector = along(read, 1) if read.dim() == len(shape) > 1 else None
    if vector is not None and len(vector) == shape[1] and varying(read) == [1]:
        wide = vector.reshape([-1 if d == 1 else 1 for d in range(len(shape))])
        walker.set(node, wide.expand(shape))


def stretch(walker: Walker, value: int, dim: int) -> None:
    """Give a constant channels of its own along a dimension, if it is one without."""
    chain = [value]
    while chain[-1] not in walker.stretchable:
        made_by = walker.trace.values[chain[-1]].node
        node = walker.trace.nodes[made_by] if made_by >= 0 else None
        if node is None or node.op.split(".")[1] not in _SAME or not node.inputs():
            return
        chain.append(node.inputs()[0])
    shapes = [walker.trace.shape(v) for v in chain]
    dims = {len(s) for s in shapes}
    if dims != {len(shapes[0])} or any(s[dim] != shapes[0][dim] for s in shapes):
        return
    if int(walker.ids(chain[-1]).reshape(-1)[0]) != FIXED:
        return
    walker.stretchable.discard(chain[-1])
    made = walker.fresh(shapes[0][dim])
    wide = made.reshape([-1 if d == dim else 1 for d in range(len(shapes[0]))])
    for link, shape in zip(chain, shapes):
        walker.result.values[link] = wide.expand(shape)


def stretch_operands(walker: Walker, node: Node) -> None:
    """Constants among the operands get channels where those of another operand lie."""
    operands = [(v, len(walker.trace.shape(v)), varying(walker.ids(v))) for v in node.inputs()]
    places = {tuple(d - dims for d in differ) for _, dims, differ in operands if differ}
    if len(places) != 1 or len(place := next(iter(places))) != 1:
        return
    for value, dims, differ in operands:
        at = dims + place[0]
        if not differ and at >= 0 and walker.trace.shape(value)[at] > 1:
            stretch(walker, value, at)
