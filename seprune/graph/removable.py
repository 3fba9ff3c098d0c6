"""Parts that a network can do without as a whole: gate modules, and blocks beside a shortcut.

A gate held at its mean is a factor for each channel, which a neighbouring layer can hold. A block
x + f(x) without its branch f is its input; so is relu(x + f(x)) where no x is below 0.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

from torch import nn

from seprune.graph.dataflow import base
from seprune.graph.groups import NetworkStructure
from seprune.graph.trace import Call, Node, Trace, record

_AFFINE = (nn.BatchNorm2d, nn.Conv2d)
_NOT_NEGATIVE = ("relu", "hardtanh", "sigmoid", "hardsigmoid")  # and pooling of those
_POOLS = ("max_pool2d_with_indices", "max_pool2d", "avg_pool2d", "mean")


@dataclass(frozen=True)
class Removable:
    """A module that returns a feature map of the size of the one that it is given.

    Attributes:
        kind: `gate`, which scales its input, or `block`, which adds to it.
        layer, side: of a gate: the layer that can hold its mean, in its outputs (`out`) or for
            its inputs (`in`).
    """

    module: str
    kind: Literal["gate", "block"]
    layer: str = ""
    side: Literal["in", "out"] = "out"


def find_removable(
    model: nn.Module, structure: NetworkStructure, inputs: Any
) -> tuple[Removable, ...]:
    """The gates whose mean a neighbouring layer can hold, and the residual blocks."""
    finder = _RemovableFinder(model, record(model, inputs))
    gates = [g.name for g in structure.gates if g.runs]
    return (*finder.gates(gates), *finder.blocks())


class _RemovableFinder:
    def __init__(self, model: nn.Module, trace: Trace) -> None:
        self.modules, self.trace = dict(model.named_modules()), trace
        self.readers = trace.consumers()
        calls: dict[str, list[Call]] = {}
        for call in trace.calls:
            calls.setdefault(call.module, []).append(call)
        self.once = {name: found[0] for name, found in calls.items() if len(found) == 1}

    def maps(self, names: Iterator[str]) -> Iterator[tuple[str, int, int, Call]]:
        """Modules that make one feature map of one of the same size, used nowhere else inside."""
        for name in names:
            call = self.once.get(name)
            if not name or call is None or len(call.inputs) != 1 or len(call.outputs) != 1:
                continue
            given, made = call.inputs[0], call.outputs[0]
            shape = self.trace.shape(given)
            if len(shape) == 4 and self.trace.shape(made) == shape and self.closed(call):
                yield name, given, made, call

    def closed(self, call: Call) -> bool:
        """Whether nothing behind the module reads what was made inside, but its output."""
        inside = self.trace.nodes[call.first_node : call.end_node]
        hidden = {v for n in inside for v in n.outputs} - set(call.outputs)
        after = (n for v in hidden for n in self.readers.get(v, ()))
        return all(n < call.end_node for n in after) and not hidden & set(self.trace.outputs)

    def producer(self, value: int) -> Node | None:
        number = self.trace.values[value].node
        return self.trace.nodes[number] if number >= 0 else None

    # -- gates --------------------------------------------------------------------------------

    def gates(self, names: list[str]) -> Iterator[Removable]:
        for name, given, made, call in self.maps(iter(names)):
            node = self.producer(made)
            if node is None or base(node) != "mul" or given not in node.inputs():
                continue
            held = self.holder(given, made, call)
            if held is not None:
                yield Removable(name, "gate", *held)

    def holder(self, given: int, made: int, call: Call) -> tuple[str, Literal["in", "out"]] | None:
        """The layer that can hold the mean: the only reader, or what made the feature map."""
        after = [self.trace.nodes[n] for n in self.readers.get(made, ())]
        if len(after) == 1 and made not in self.trace.outputs:
            module = self.alone(after[0])
            if isinstance(module, nn.Conv2d) and module.groups == 1:
                return after[0].module, "in"
        before = self.producer(given)
        readers = self.readers.get(given, ())
        own = all(call.first_node <= n < call.end_node for n in readers)
        if before is not None and own and isinstance(self.alone(before), _AFFINE):
            return before.module, "out"
        return None

    def alone(self, node: Node) -> nn.Module | None:
        """The layer that an operator belongs to, if it is called once and has weights."""
        module = self.modules.get(node.module)
        right = "convolution" in base(node) or "batch_norm" in base(node)
        known = right and node.module in self.once and getattr(module, "weight", None) is not None
        return module if known else None

    # -- blocks -------------------------------------------------------------------------------

    def blocks(self) -> Iterator[Removable]:
        inner = (name for name, module in self.modules.items() if any(module.children()))
        for name, given, made, _ in self.maps(inner):
            node = self.producer(made)
            rectified = node is not None and base(node) == "relu"
            if rectified and node is not None:
                node = self.producer(node.inputs()[0])
            adds = node is not None and base(node) == "add" and given in node.inputs()
            if adds and (not rectified or self.never_negative(given)):
                yield Removable(name, "block")

    def never_negative(self, value: int) -> bool:
        node = self.producer(value)
        while node is not None and base(node) in _POOLS:
            node = self.producer(node.inputs()[0])
        return node is not None and base(node) in _NOT_NEGATIVE
