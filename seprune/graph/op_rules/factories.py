"""Tensors that a forward makes from nothing: one value everywhere, as wide as what they meet."""

from __future__ import annotations

import torch

from seprune.graph.channel_ids import FIXED, NEUTRAL, Slot, Walker, along, varying
from seprune.graph.op_rules.replays import replay
from seprune.graph.trace import Node
from seprune.graph.written import SIZED

_SAME = ("_to_copy", "clone", "detach", "alias", "lift_fresh", "expand")
_RESHAPED = ("view", "_unsafe_view", "squeeze")


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
        dims = range(len(walker.trace.shape(call.output)))
        walker.stretchable[call.output] = frozenset(dims)


def constant_like(walker: Walker, node: Node) -> None:
    """A new tensor as wide as another one, into which that is written: circular padding."""
    constant(walker, node)
    read, shape = walker.ids(node.args[0].value), walker.trace.shape(node.outputs[0])
    vector = along(read, 1) if read.dim() == len(shape) > 1 else None
    if vector is not None and len(vector) == shape[1] and varying(read) == [1]:
        wide = vector.reshape([-1 if d == 1 else 1 for d in range(len(shape))])
        walker.set(node, wide.expand(shape))


def spread(walker: Walker, node: Node) -> None:
    """A dimension of length 1 is repeated: it may be as wide as what it meets."""
    replay(walker, node)
    value, read = node.outputs[0], walker.trace.shape(node.args[0].value)
    made, call = walker.trace.shape(value), walker.function_of.get(node.id)
    lead = len(made) - len(read)
    grown = {d for d, n in enumerate(made) if n > 1 and (d < lead or read[d - lead] == 1)}
    if call is not None and call.function in SIZED and not varying(walker.ids(value)):
        walker.stretchable[value] = frozenset(grown)


def stretch(walker: Walker, value: int, dim: int) -> None:
    """Give a constant channels of its own along a dimension, if it is one without.

    So does a parameter or buffer of several dimensions (a table of positions): it is cut.
    """
    chain = [(value, dim)]
    while chain[-1][1] not in walker.stretchable.get(chain[-1][0], ()):
        info = walker.trace.values[chain[-1][0]]
        if info.kind in ("parameter", "buffer"):
            break
        node = walker.trace.nodes[info.node] if info.node >= 0 else None
        before = None if node is None else _before(walker, node, chain[-1][1])
        if node is None or before is None:
            return
        chain.append((node.inputs()[0], before))
    root, along_dim = chain[-1]
    ids = walker.ids(root)
    if varying(ids):
        return
    walker.freeze(ids, "it is spread over channels")
    made = walker.fresh(ids.shape[along_dim])
    for link, place in chain:
        shape = walker.trace.shape(link)
        wide = made.reshape([-1 if d == place else 1 for d in range(len(shape))])
        walker.result.values[link] = wide.expand(shape)
    if walker.trace.values[root].kind in ("parameter", "buffer"):
        walker.slot(Slot(walker.trace.values[root].name, f"dim{along_dim}", made, -1))


def _before(walker: Walker, node: Node, dim: int) -> int | None:
    """Where a dimension of an operator's result was in what it read; None if it was not there."""
    name, made = node.op.split(".")[1], walker.trace.shape(node.outputs[0])
    if not node.inputs():
        return None
    read = walker.trace.shape(node.inputs()[0])
    if name == "unsqueeze":
        new = node.args[1] % len(made)
        return None if dim == new else dim - (dim > new)
    if name in _RESHAPED:
        wide, before = ([d for d, n in enumerate(s) if n > 1] for s in (made, read))
        alike = [made[d] for d in wide] == [read[d] for d in before]
        return before[wide.index(dim)] if alike and dim in wide else None
    same = name in _SAME and len(read) == len(made) and read[dim] == made[dim]
    return dim if same else None


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
