"""Reshapes: which of the dimensions that channels are taken apart into carries them on."""

from __future__ import annotations

import torch
from torch import Tensor

from seprune.graph.channel_ids import UnknownUse, Walker, varying
from seprune.graph.dataflow import COPIES, LEARNED, MAXES, MEANS, base, replayed
from seprune.graph.trace import Node

MOVES = COPIES | {
    "view", "_unsafe_view", "reshape", "_reshape_alias", "permute", "transpose", "unsqueeze",
}  # fmt: skip
ACROSS = MEANS | MAXES | {"select", "unbind", "_softmax", "_log_softmax"}
LOOK_AHEAD = 8  # operators


def reshape(walker: Walker, node: Node) -> None:
    """Channels follow where a dimension stays, is flattened, or is taken apart."""
    read = walker.ids(node.args[0].value)
    made = read.reshape(walker.trace.shape(node.outputs[0]))
    for old, new in _regrouped(tuple(read.shape), tuple(made.shape)):
        wide = [d for d in new if made.shape[d] > 1]
        if len(wide) < 2 or not set(varying(read)) & set(old):
            continue
        if _folds_into_batch(walker, read, old, made, new):
            made = made[: made.shape[0] // read.shape[0]]
            first = made[:1]
            walker.tie(made, first.expand_as(made), walker.place(node))
            walker.set(node, first)
            return
        if old == new == [0, 1] and _folds_into_batch(walker, made, new, read, old):
            walker.set(node, made[:1])  # and back: G times the same units
            return
        if len([d for d in old if read.shape[d] > 1]) > 1:
            raise UnknownUse("a reshape takes channels and positions apart")
        channel = _channel(walker, node, wide)
        first = made
        for d in wide:
            if d != channel:
                first = first.narrow(d, 0, 1)
        walker.tie(made, first.expand_as(made), walker.place(node))
        made = first.expand_as(made)
    walker.set(node, made)


def _channel(walker: Walker, node: Node, wide: list[int]) -> int:
    """The dimension that carries the channels on: the usual one, unless a reader rules it out.

    `view(B, C / k, k, H, W).amax(2)` and a pixel shuffle by hand carry them in the first of `wide`,
    groups and heads in the last.
    """
    usual = 1 if 1 in wide and _read_as_map(walker, node) else wide[-1]
    return next((d for d in (usual, *wide) if _carries(walker, node, d)), usual)


def _carries(walker: Walker, node: Node, dim: int) -> bool:
    """Whether all that reads a reshape finds what differs along `dim` where channels belong."""
    shape = walker.trace.shape(node.outputs[0])
    one = [-1 if d == dim else 1 for d in range(len(shape))]
    todo = [(node.outputs[0], torch.arange(shape[dim]).reshape(one).expand(shape))]
    for _ in range(LOOK_AHEAD):
        if not todo:
            break
        value, marks = todo.pop(0)
        for number in walker.readers.get(value, ()):
            reader = walker.trace.nodes[number]
            if base(reader) in MOVES:
                todo.append((reader.outputs[0], replayed(reader, marks, reader.outputs[0])))
            elif _lost(walker, reader, set(varying(marks))):
                return False
            elif _by_itself(walker, reader):
                todo.append((reader.outputs[0], marks))
    return True


def _by_itself(walker: Walker, reader: Node) -> bool:
    """Whether an operator leaves every value where it was."""
    same = {walker.trace.shape(v) for v in (reader.inputs()[0], *reader.outputs)}
    return len(reader.inputs()) == len(reader.outputs) == len(same) and base(reader) not in LEARNED


def _lost(walker: Walker, reader: Node, dims: set[int]) -> bool:
    """Whether an operator takes `dims` for positions, or for branches that it weighs or picks."""
    read = reader.inputs()[0]
    if base(reader) in ("convolution", "native_batch_norm"):
        return dims != {1}
    if base(reader) not in ACROSS or "pool" in reader.op or len(reader.args) < 2:
        return False
    over = reader.args[1] if isinstance(reader.args[1], (list, tuple)) else [reader.args[1]]
    return any(d % len(walker.trace.shape(read)) in dims for d in over or [])


def _read_as_map(walker: Walker, node: Node) -> bool:
    """Whether a convolution reads what a reshape made, so that dimension 1 is its channels."""
    todo, seen = list(node.outputs), set[int]()
    while todo:
        for number in walker.readers.get(todo.pop(), ()):
            reader = walker.trace.nodes[number]
            name = reader.op.split(".")[1].rstrip("_")
            same = all(len(walker.trace.shape(v)) == len(walker.trace.shape(node.outputs[0]))
                       for v in reader.outputs[:1])  # fmt: skip
            if number in seen or not same or name in ("permute", "transpose", "mm", "bmm"):
                continue
            if name == "convolution":
                return True
            seen.add(number)
            todo += reader.outputs[:1]
    return False


def _folds_into_batch(
    walker: Walker, read: Tensor, old: list[int], made: Tensor, new: list[int]
) -> bool:
    """Whether (B, C) becomes (B * G, C / G): the same channels of all G parts are one unit."""
    batch = walker.trace.batch
    return (
        old == new == [0, 1]
        and read.shape[0] == batch > 1
        and made.shape[0] % batch == 0
        and made.shape[0] > batch
        and varying(read) == [1]
    )


def _regrouped(old: tuple[int, ...], new: tuple[int, ...]) -> list[tuple[list[int], list[int]]]:
    """Pairs of dimension lists with equal products: how a reshape regroups dimensions."""
    pairs, i, j = [], 0, 0
    while i < len(old) or j < len(new):
        left, right = [], []
        a = b = 1
        while True:
            if a <= b and i < len(old):
                a *= old[i]
                left.append(i)
                i += 1
            elif j < len(new):
                b *= new[j]
                right.append(j)
                j += 1
            else:
                a *= old[i] if i < len(old) else 1
                i += 1
            if a == b and left and right:
                break
            if i >= len(old) and j >= len(new):
                break
        pairs.append((left, right))
    return pairs
