"""Which rows of a tensor belong to which sample, followed from the inputs on."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from seprune.graph.channel_ids import varying
from seprune.graph.dataflow import MAXES, MEANS, OTHERS, VIEWS, base, replayed
from seprune.graph.trace import Node, Trace

_ROWS = {"convolution", "addmm", "mm", "bmm", "baddbmm"}  # rows stay rows
_REDUCTIONS = (MEANS | MAXES | OTHERS) - {"bmm"}


@dataclass(frozen=True)
class Rows:
    """The dimension that samples lie along, and for every index of it the sample it is of."""

    dim: int
    samples: Tensor

    @property
    def in_turn(self) -> bool:
        """Whether the rows of each sample stand together, in the order of the samples."""
        return bool((self.samples.diff() >= 0).all())


def sample_rows(trace: Trace) -> dict[int, Rows]:
    """The rows of every value for which they are known."""
    found: dict[int, Rows] = {}
    for value in trace.values:
        if value.kind == "input" and value.shape[:1] == (trace.batch,):
            found[value.id] = Rows(0, torch.arange(trace.batch))
    for node in trace.nodes:
        known = [(v, found[v]) for v in node.inputs() if v in found]
        for output in node.outputs if known else ():
            rows = _of(trace, node, known, output)
            if rows is not None:
                found[output] = rows
    return found


def _of(trace: Trace, node: Node, known: list[tuple[int, Rows]], output: int) -> Rows | None:
    """The rows of one result; None where the operands or the operator leave them open."""
    if base(node) in VIEWS:
        return _viewed(trace, node, known, output) if len(known) == 1 else None
    places = {place for v, rows in known if (place := _place(trace, node, v, rows, output))}
    if len({dim for dim, _ in places}) != 1:
        return None
    dim = next(iter(places))[0]
    samples = known[0][1].samples
    if base(node) == "cat" and node.args[1:] and node.args[1] % len(trace.shape(output)) == dim:
        samples = torch.cat([rows.samples for _, rows in known])
    return Rows(dim, samples) if len(samples) == trace.shape(output)[dim] else None


def _viewed(trace: Trace, node: Node, known: list[tuple[int, Rows]], output: int) -> Rows | None:
    (value, rows) = known[0]
    shape = trace.shape(value)
    one = [-1 if d == rows.dim else 1 for d in range(len(shape))]
    moved = replayed(node, rows.samples.reshape(one).expand(shape), output)
    dims = varying(moved)
    if len(dims) != 1:
        return None
    for d in range(moved.dim()):
        if d != dims[0]:
            moved = moved.narrow(d, 0, 1)
    return Rows(dims[0], moved.reshape(-1))


def _place(trace: Trace, node: Node, value: int, rows: Rows, output: int) -> tuple[int, int] | None:
    """Where the rows of an operand lie in a result: the dimension, and its length."""
    before, after = trace.shape(value), trace.shape(output)
    dim = rows.dim
    if base(node) in _ROWS:
        dim = rows.dim if rows.dim == 0 else -1
    elif base(node) in _REDUCTIONS and len(after) < len(before):
        over = node.args[1] if len(node.args) > 1 else None
        gone = [d % len(before) for d in (over if isinstance(over, (list, tuple)) else [over])
                if isinstance(d, int)]  # fmt: skip
        dim = -1 if not gone or rows.dim in gone else rows.dim - sum(d < rows.dim for d in gone)
    elif base(node) == "stack":
        at = (node.args[1] if len(node.args) > 1 else 0) % len(after)
        dim = rows.dim + (at <= rows.dim)
    elif len(after) > len(before):  # broadcast
        dim = rows.dim + len(after) - len(before)
    return (dim, after[dim]) if 0 <= dim < len(after) else None
