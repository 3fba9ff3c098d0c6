"""The work of a forward pass as single operators whose sizes follow from the layers' widths."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from seprune.graph.dataflow import VIEWS, base
from seprune.graph.groups import NetworkStructure
from seprune.graph.trace import Node, Ref, Trace, record

LINEAR = ("addmm", "mm", "linear")
UNARY = ("relu", "hardswish", "silu", "sigmoid", "hardsigmoid", "gelu", "hardtanh", "tanh")
BINARY = ("add", "sub", "mul", "div")
POOLS = ("mean", "_adaptive_avg_pool2d", "adaptive_avg_pool2d", "max_pool2d_with_indices",
         "avg_pool2d", "max_pool2d")  # fmt: skip


@dataclass(frozen=True, order=True)
class Operator:
    """One operator on one image, as a latency table names it.

    Attributes:
        kind: `conv`, `linear`, `norm`, `pool`, `cat`, `binary`, or an activation such as `relu`.
        inputs, outputs: channels; equal for what is neither convolution nor linear layer.
        size: (height, width) of the input, (1, 1) for vectors.
    """

    kind: str
    inputs: int
    outputs: int
    size: tuple[int, int] = (1, 1)
    kernel: tuple[int, int] = (1, 1)
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (0, 0)
    groups: int = 1

    def name(self) -> str:
        """The operator's key in a table: `conv 16>64 14x14 k3x3 s1x1 p1x1 g1`."""
        pairs = (("", self.size), ("k", self.kernel), ("s", self.stride), ("p", self.padding))
        sizes = " ".join(f"{letter}{a}x{b}" for letter, (a, b) in pairs)
        return f"{self.kind} {self.inputs}>{self.outputs} {sizes} g{self.groups}"

    def at(self, inputs: int, outputs: int) -> Operator:
        """The same operator with other widths; conv groups keep their width."""
        if self.groups == 1:
            return replace(self, inputs=inputs, outputs=outputs)
        groups = max(1, round(inputs * self.groups / self.inputs))
        each, made = self.inputs // self.groups, self.outputs // self.groups
        return replace(self, inputs=groups * each, outputs=groups * made, groups=groups)


@dataclass(frozen=True)
class Side:
    """A width: `total` channels, of which each removed unit of a group takes some away."""

    total: int
    units: tuple[tuple[str, int, int], ...] = ()  # group, its units, channels per unit

    def at(self, kept: Mapping[str, int]) -> int:
        """Channels with `kept` units in each group."""
        return self.total - sum((units - kept[name]) * each for name, units, each in self.units)


@dataclass(frozen=True)
class WorkItem:
    """An operator of the pass and the widths that it follows."""

    operator: Operator
    inputs: Side
    outputs: Side
    layer: str = ""  # of a convolution or linear layer
    module: str = ""  # whose forward called it

    @property
    def groups(self) -> frozenset[str]:
        """The dependency groups that its time depends on."""
        return frozenset(name for side in (self.inputs, self.outputs) for name, *_ in side.units)

    def at(self, kept: Mapping[str, int]) -> Operator:
        """The operator with `kept` units in each group."""
        return self.operator.at(self.inputs.at(kept), self.outputs.at(kept))


def work_items(model: nn.Module, structure: NetworkStructure, inputs: Any) -> list[WorkItem]:
    """Every operator of one forward pass of `model` that takes time, in order."""
    return list(_WorkReader(record(model, inputs), structure).items())


class _WorkReader:
    """Reads operators off a recorded pass, and follows widths from layer to layer."""

    def __init__(self, trace: Trace, structure: NetworkStructure) -> None:
        self.trace = trace
        self.sides: dict[tuple[str, str], list[tuple[str, int, int]]] = {}
        for group in structure.groups:
            for member in group.members:
                entry = (group.name, group.units, member.index.shape[1])
                self.sides.setdefault((member.layer, member.side), []).append(entry)
        self.widths: dict[int, Side] = {}  # value -> its channels

    def side(self, layer: str, which: str, total: int) -> Side:
        return Side(total, tuple(self.sides.get((layer, which), ())))

    def items(self) -> Iterator[WorkItem]:
        for node in self.trace.nodes:
            item = self.item(node)
            if item is not None:
                self.widths.update(dict.fromkeys(node.outputs, item.outputs))
                yield replace(item, module=node.module)
            elif (read := self.carried(node)) is not None:
                self.widths.update(dict.fromkeys(node.outputs, read))

    def item(self, node: Node) -> WorkItem | None:
        name = base(node).rstrip("_")
        if name == "convolution":
            return self.convolution(node)
        if name in LINEAR:
            return self.linear(node, name)
        kind = _kind(name)
        carried = self.carried(node)
        if kind is None or name in VIEWS or carried is None:
            return None
        shape = max((self.trace.shape(v) for v in node.inputs()), key=_positions, default=())
        size = (shape[2], shape[3]) if len(shape) == 4 else (1, 1)
        width = _concatenated(self.read(node)) if kind == "cat" else carried
        return WorkItem(Operator(kind, width.total, width.total, size), width, width)

    def convolution(self, node: Node) -> WorkItem | None:
        data, weight, _, stride, padding, _, transposed, _, groups = node.args[:9]
        shape, kernel = self.trace.shape(data.value), self.trace.shape(weight.value)
        if transposed or len(shape) != 4:
            return None
        outputs = kernel[0]
        operator = Operator("conv", shape[1], outputs, (shape[2], shape[3]), (kernel[2], kernel[3]),
                            _pair(stride), _pair(padding), int(groups))  # fmt: skip
        into = self.side(node.module, "in", shape[1])
        out = self.side(node.module, "out", outputs)
        if groups > 1 and not into.units:  # depthwise: what goes in follows what comes out
            into = replace(out, total=shape[1]) if shape[1] == outputs else into
        return WorkItem(operator, into, out, node.module)

    def linear(self, node: Node, name: str) -> WorkItem | None:
        operands = [a for a in node.args if isinstance(a, Ref)]
        data = operands[1 if name == "addmm" else 0]
        into, outputs = self.trace.shape(data.value)[-1], self.trace.shape(node.outputs[0])[-1]
        return WorkItem(
            Operator("linear", into, outputs),
            self.side(node.module, "in", into),
            self.side(node.module, "out", outputs),
            node.module,
        )

    def read(self, node: Node) -> list[Side]:
        return [self.widths[v] for v in node.inputs() if v in self.widths]

    def carried(self, node: Node) -> Side | None:
        """The width of the largest operand: a gate scales a feature map, not the reverse."""
        known = [v for v in node.inputs() if v in self.widths]
        largest = max(known, key=lambda v: _positions(self.trace.shape(v)), default=None)
        return None if largest is None else self.widths[largest]


def _kind(name: str) -> str | None:
    if "batch_norm" in name:
        return "norm"
    if name in POOLS:
        return "pool"
    if name in BINARY:
        return "binary"
    return name if name in UNARY or name == "cat" else None


def _concatenated(sides: Sequence[Side]) -> Side:
    return Side(sum(s.total for s in sides), tuple(u for s in sides for u in s.units))


def _positions(shape: tuple[int, ...]) -> int:
    return math.prod(shape)


def _pair(value: Any) -> tuple[int, int]:
    first, *rest = value if isinstance(value, (list, tuple)) else (value,)
    return int(first), int(rest[0] if rest else first)
