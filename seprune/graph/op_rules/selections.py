"""Picking and sorting along positions: channels stay what they are."""

from __future__ import annotations

import torch
from torch import Tensor

from seprune.graph.channel_ids import UnknownUse, Walker, varying
from seprune.graph.op_rules.factories import stretch
from seprune.graph.trace import Node, Ref


def along_positions(walker: Walker, node: Node) -> None:
    """Sort, topk, cumulative sums of a dimension without channels."""
    _positions(walker, node, _dim_argument(node))


def _dim_argument(node: Node) -> int:
    """Where an operator has its dimension."""
    name = node.op.split(".")[1].rstrip("_")
    after = {"topk": 2, "kthvalue": 2, "renorm": 2, "sort": 1}
    at = after.get(name, 1)
    return at + 1 if name == "sort" and node.op.endswith(".stable") else at


def _positions(walker: Walker, node: Node, at: int) -> None:
    read = walker.ids(node.args[0].value)
    dims = walker.arg(node, at, "dim", -1)
    for dim in dims if isinstance(dims, (list, tuple)) else [dims]:
        if dim % max(read.dim(), 1) in varying(read):
            raise UnknownUse("channels change their order")
        read = read.narrow(dim, 0, 1) if read.dim() else read
    for index, value in enumerate(node.outputs):
        shape = walker.trace.shape(value)
        made = read if read.dim() == len(shape) else read.squeeze(dims)
        walker.set(node, made, index)


def transform(walker: Walker, node: Node) -> None:
    """A Fourier transform over positions."""
    _positions(walker, node, 1)


def unfold(walker: Walker, node: Node) -> None:
    """Windows along a dimension of positions."""
    read = walker.ids(node.args[0].value)
    dim = node.args[1] % read.dim()
    if dim in varying(read):
        raise UnknownUse("windows of channels")
    walker.set(node, read.narrow(dim, 0, 1).unsqueeze(-1))


def index_select(walker: Walker, node: Node) -> None:
    """Some positions of one dimension."""
    read = walker.ids(node.args[0].value)
    dim = node.args[1] % read.dim()
    if dim in varying(read):
        raise UnknownUse("channels are picked by number")
    walker.set(node, read.narrow(dim, 0, 1))


def gather(walker: Walker, node: Node) -> None:
    """Values at positions that a tensor says, in every channel."""
    dim, (read, picks) = _by_position(walker, node)
    if varying(picks):
        _tie_alike(walker, node, read, picks)
    walker.set(node, read.narrow(dim, 0, 1))


def scatter(walker: Walker, node: Node) -> None:
    """Values put at positions that a tensor says, in every channel."""
    _, (read, picks, *others) = _by_position(walker, node)
    for other in (picks, *others):
        if other is not picks or varying(picks):
            _tie_alike(walker, node, read, other)
    walker.set(node, walker.ids(node.args[0].value))


def _by_position(walker: Walker, node: Node) -> tuple[int, list[Tensor]]:
    """The dimension of positions, and the ids of all tensors with length 1 where none differ."""
    dim = node.args[1] % len(walker.trace.shape(node.args[0].value))
    read, picks, *others = (walker.ids(a.value) for a in node.args if isinstance(a, Ref))
    if any(dim in varying(ids) for ids in (read, picks, *others) if ids.dim() > dim):
        raise UnknownUse("channels are picked by number")
    if any(picks.dim() > d and picks.shape[d] != read.shape[d] for d in varying(read)):
        raise UnknownUse("channels are picked by number")
    return dim, [_short(read), _short(picks), *map(_short, others)]


def _short(ids: Tensor) -> Tensor:
    for d in set(range(ids.dim())) - set(varying(ids)):
        ids = ids.narrow(d, 0, min(1, ids.shape[d]))
    return ids


def _tie_alike(walker: Walker, node: Node, one: Tensor, two: Tensor) -> None:
    shape = torch.broadcast_shapes(one.shape, two.shape)  # type: ignore[no-untyped-call]
    walker.tie(one.expand(shape), two.expand(shape), walker.place(node))


def index(walker: Walker, node: Node) -> None:
    """`x[i, j]` with tensors: the dimensions that they index go, their own come."""
    read = walker.ids(node.args[0].value)
    walker.set(node, _picked(walker, node, read))


def index_put(walker: Walker, node: Node) -> None:
    """`x[i] = y`: what is put in is the same channels."""
    target, values = node.args[0].value, node.args[2].value
    put = walker.ids(values)
    shape = walker.trace.shape(target)
    if len(node.args[1]) == 1 and put.dim() == len(shape):  # boxes of all levels in one tensor
        for dim in varying(put):
            if dim > 0:
                stretch(walker, target, dim)
    read = walker.ids(target)
    made = _picked(walker, node, read)
    if made.numel() and put.numel():
        _tie_alike(walker, node, made, _short(put))
    walker.set(node, read)


def _picked(walker: Walker, node: Node, read: Tensor) -> Tensor:
    """The ids of what an index picks, with length 1 along dimensions that it makes."""
    indices: list[slice | Tensor] = []
    dim = 0
    for given in node.args[1]:
        if given is None:
            indices.append(slice(None))
            dim += 1
            continue
        value = walker.trace.values[given.value]
        masks = len(value.shape) if value.mask else 0
        if varying(walker.ids(given.value)):
            raise UnknownUse("channels say what is picked")
        for d in range(dim, dim + max(masks, 1)):
            if d in varying(read):
                raise UnknownUse("channels are picked by number")
            read = read.narrow(d, 0, 1)
            ones = (1,) if masks else (1,) * max(len(value.shape), 0)
            indices.append(torch.zeros(ones, dtype=torch.int64))
        dim += max(masks, 1)
    found: Tensor = read[tuple(indices)]
    return found


def regions(walker: Walker, node: Node) -> None:
    """RoIAlign and RoIPool: boxes cut out of every channel."""
    read = walker.ids(node.args[0].value)
    if set(varying(read)) - {1}:
        raise UnknownUse("channels lie along positions")
    for d in (0, 2, 3):
        read = read.narrow(d, 0, 1)
    for number in range(len(node.outputs)):
        walker.set(node, read, number)
