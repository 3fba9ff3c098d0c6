"""Which channels are the same channel: ids that flow through a recorded pass.

Every output channel of a convolution or linear layer gets an id; views carry ids along,
elementwise operators make two ids equal, and the next layer reads them as its inputs. The
classes of equal ids are the channels that must be removed together. Whatever the rules do not
know freezes the ids that meet it, with a reason: nothing is guessed and nothing can hang.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from seprune.graph.function_calls import FunctionCall
from seprune.graph.trace import Node, Trace

FIXED = -1  # a position whose number cannot change
NEUTRAL = 0  # no channel at all: spatial positions, scalars, mixtures of channels


class UnknownUse(Exception):
    """An operator is used in a way that its rule does not know; the text says in which."""


@dataclass(frozen=True)
class Slot:
    """One side of one layer: position i carries the channel `ids[i]`."""

    layer: str  # module path, or parameter path for bare parameters
    side: str  # "out" | "in" | "dim0" ... of a bare parameter | "split#1/2[entry]"
    ids: Tensor
    node: int
    produces: bool = False


@dataclass(frozen=True)
class OpCost:
    """MACs of one operator on one sample: proportional to the length of every factor."""

    macs: int
    factors: tuple[Tensor, ...]
    layer: str


@dataclass
class ChannelIds:
    """The result: ids of all values, what reads and makes them, and what ties them."""

    values: dict[int, Tensor] = field(default_factory=dict)
    slots: list[Slot] = field(default_factory=list)
    costs: list[OpCost] = field(default_factory=list)
    edges: list[Tensor] = field(default_factory=list)  # each (n, 2)
    frozen: list[tuple[Tensor, str]] = field(default_factory=list)
    sums: list[tuple[int, Tensor]] = field(default_factory=list)  # (node, ids) of additions
    by_conv_group: set[str] = field(
        default_factory=set
    )  # grouped convolutions that give up conv groups
    transposed_groups: set[str] = field(default_factory=set)  # transposed ones
    even: list[tuple[Tensor, str]] = field(default_factory=list)  # rows keep as many; where
    depends: set[int] = field(default_factory=set)  # values that depend on the input
    count: int = 0


def along(ids: Tensor, dim: int) -> Tensor | None:
    """The ids along `dim` as a vector, or None where other dimensions change them, or are empty."""
    if not ids.numel():
        return None
    narrow = compact(ids)
    dim %= ids.dim()
    vector = narrow
    for other in range(ids.dim()):
        if other != dim:
            vector = vector.narrow(other, 0, 1)
    if narrow.shape != vector.shape and not bool((narrow == vector).all()):
        return None
    return vector.reshape(-1).expand(ids.shape[dim])


def varying(ids: Tensor) -> list[int]:
    """The dimensions along which ids differ."""
    narrow = compact(ids)
    return [
        d
        for d in range(ids.dim())
        if narrow.shape[d] > 1 and not bool((narrow == narrow.narrow(d, 0, 1)).all())
    ]


def compact(ids: Tensor) -> Tensor:
    """The same ids with every expanded dimension at length 1."""
    for d in range(ids.dim()):
        if ids.shape[d] > 1 and ids.stride(d) == 0:
            ids = ids.narrow(d, 0, 1)
    return ids


def solve(channel_ids: ChannelIds) -> Tensor:
    """The class of every id: the smallest id that it is tied to."""
    pairs = torch.cat([torch.zeros(0, 2, dtype=torch.int64), *channel_ids.edges])
    return joined(channel_ids.count + 1, pairs)


def joined(count: int, pairs: Tensor) -> Tensor:
    """For each of `count` numbers the smallest one that `pairs` (n, 2) connect it to."""
    root = torch.arange(count)
    while True:
        ends = root[pairs]
        low = ends.amin(1)
        new = root.scatter_reduce(0, ends[:, 0], low, "amin")
        new = new.scatter_reduce(0, ends[:, 1], low, "amin")
        new = new[new]
        if torch.equal(new, root):
            return root
        root = new


class Walker:
    """Carries ids from node to node; the rules in `rules/` say how each operator does it."""

    def __init__(self, trace: Trace, model: nn.Module) -> None:
        self.trace = trace
        self.modules = dict(model.named_modules())
        self.result = ChannelIds()
        self.readers = trace.consumers()
        self.function_of = {n: f for f in trace.functions for n in range(f.first_node, f.end_node)}
        self.called = {(c.module, c.call): c.functions for c in trace.calls}
        self.stretchable: dict[int, frozenset[int]] = {}  # constant along dimensions of free length
        self.states: set[int] = set()  # rows for each sample that do not depend on the input
        self.by_layer: dict[tuple[str, str], Tensor] = {}
        owners: dict[int, str] = {}
        self.first = {  # of the modules that hold the same weight
            path: owners.setdefault(id(module.weight), path)
            for path, module in self.modules.items()
            if isinstance(getattr(module, "weight", None), nn.Parameter)
        }

    # -- ids of values -------------------------------------------------------------------

    def ids(self, value: int) -> Tensor:
        """The ids of a value, in its shape."""
        known = self.result.values.get(value)
        if known is not None:
            return known
        info = self.trace.values[value]
        made = self.uniform(FIXED, info.shape)
        if info.kind == "input":
            self.result.depends.add(value)
        elif info.kind in ("parameter", "buffer"):
            made = self.parameter(info.name, info.shape)
        self.result.values[value] = made
        return made

    def uniform(self, number: int, shape: tuple[int, ...]) -> Tensor:
        """One id (`FIXED` or `NEUTRAL`) everywhere, without memory."""
        return torch.full((), number, dtype=torch.int64).expand(shape)

    def fresh(self, count: int) -> Tensor:
        """Labels (count,) that nothing carries yet."""
        first = self.result.count + 1
        self.result.count += count
        return torch.arange(first, first + count)

    def parameter(self, name: str, shape: tuple[int, ...]) -> Tensor:
        """Labels for a bare parameter that is added or multiplied: one per element."""
        wide = [d for d, n in enumerate(shape) if n > 1]
        if not wide:
            return self.uniform(NEUTRAL, shape)
        if len(wide) > 1:
            return self.uniform(FIXED, shape)
        ids = self.fresh(shape[wide[0]])
        self.slot(Slot(name, f"dim{wide[0]}", ids, -1))
        return ids.reshape(shape)

    def number(self, call: FunctionCall, entry: int, ids: Tensor, node: Node) -> None:
        """A number that a call is given counts the channels `ids`."""
        total = self.called[call.module, call.call][call.function]
        side = f"{call.function}#{call.index}/{total}[{entry}]"
        self.slot(Slot(call.module, side, ids, node.id))

    # -- ties -------------------------------------------------------------------------------

    def slot(self, slot: Slot) -> None:
        """Note a side of a layer; a second call of a shared layer ties its ids to the first.

        So does another layer with the same weight.
        """
        for layer in (slot.layer, self.first.get(slot.layer, slot.layer)):
            before = self.by_layer.get((layer, slot.side))
            if before is not None and before.shape == slot.ids.shape:
                self.tie(before, slot.ids, f"{layer}, which is shared")
                if layer == slot.layer:
                    return
        self.by_layer[slot.layer, slot.side] = slot.ids
        self.result.slots.append(slot)

    def tie(self, one: Tensor, two: Tensor, where: str) -> None:
        """Make two id tensors of one shape equal."""
        one, two = one.expand(two.shape), two.expand(one.shape)
        for d in range(one.dim()):
            if one.shape[d] > 1 and one.stride(d) == 0 and two.stride(d) == 0:
                one, two = one.narrow(d, 0, 1), two.narrow(d, 0, 1)
        pairs = torch.stack([one.reshape(-1), two.reshape(-1)], 1)
        pairs = pairs[pairs[:, 0] != pairs[:, 1]]
        both = (pairs > 0).all(1)
        if bool(both.any()):
            self.result.edges.append(torch.unique(pairs[both], dim=0))
        stiff = (pairs == FIXED).any(1)
        if bool(stiff.any()):
            self.freeze(pairs[stiff], f"it meets a tensor of fixed size in {where}")

    def freeze(self, ids: Tensor, reason: str) -> None:
        """Exclude from pruning the channels of `ids`, and all that they are or will be tied to."""
        numbers = torch.unique(compact(ids))
        numbers = numbers[numbers > 0]
        if len(numbers):
            self.result.frozen.append((numbers, reason))

    def place(self, node: Node) -> str:
        """Where a reason points to: `view in layer1.0`."""
        name = node.op.split(".")[1].rstrip("_")
        return f"{name} in {node.module or 'the model'}"

    # -- one operator -----------------------------------------------------------------------

    def depends(self, node: Node) -> bool:
        """Whether the node's results depend on the model's input; remembered for its readers."""
        inputs = node.inputs()
        self.result.depends.update(v for v in inputs if self.trace.values[v].kind == "input")
        live = any(v in self.result.depends for v in inputs)
        if live:
            self.result.depends.update(node.outputs)
        elif self._of_samples(node):
            self.states.update(node.outputs)
        return live

    def _of_samples(self, node: Node) -> bool:
        """Whether what does not depend on the input has a row for each sample all the same.

        So have the first state of a recurrent layer, and queries that are learned.
        """
        reads, name = node.inputs(), node.op.split(".")[1]
        made = self.trace.shape(node.outputs[0]) if node.outputs else ()
        if name in ("expand", "repeat"):
            read = self.trace.shape(reads[0])
            wide = zip((1,) * (len(made) - len(read)) + read, made, strict=True)
            return (1, self.trace.batch) in wide or reads[0] in self.states
        fresh = name in ("zeros", "ones", "full", "empty") and self.trace.batch in made
        return fresh or any(v in self.states for v in reads)

    def opaque(self, node: Node, why: str) -> None:
        """The last resort: exclude whatever goes in; what comes out has a fixed size."""
        for value in node.inputs():
            if self.trace.values[value].kind == "result" or value in self.result.values:
                self.freeze(self.ids(value), why)
        for value in node.outputs:
            shape = self.trace.shape(value)
            number = FIXED if torch.Size(shape).numel() > 1 else NEUTRAL
            self.result.values[value] = self.uniform(number, shape)
        self.cost(node, ())

    def set(self, node: Node, ids: Tensor, index: int = 0) -> None:
        """Give the node's result `index` its ids; they broadcast to its shape."""
        value = node.outputs[index]
        ids = ids.expand(self.trace.shape(value))
        if compact(ids).numel() > 100_000:  # a reshape copied what was expanded
            differ = varying(ids)
            for d in set(range(ids.dim())) - set(differ):
                ids = ids.narrow(d, 0, 1)
            ids = ids.expand(self.trace.shape(value))
        self.result.values[value] = ids

    def cost(self, node: Node, factors: Iterable[Tensor]) -> None:
        """Note the node's MACs: they fall with the length of every factor."""
        if node.macs:
            known = (self.result.depends, self.states)  # what is in none is made of weights alone
            rows = any(v in values for v in node.outputs for values in known)
            per_sample = node.macs // (self.trace.batch if rows else 1)
            self.result.costs.append(OpCost(per_sample, tuple(factors), node.module))

    def arg(self, node: Node, index: int, name: str = "", default: Any = None) -> Any:
        """An argument of the operator, by position or by name."""
        return node.args[index] if len(node.args) > index else node.kwargs.get(name, default)

    def tensors(self, node: Node) -> list[Tensor]:
        """The ids of everything that the operator reads."""
        return [self.ids(v) for v in node.inputs()]

    def parameter_name(self, value: int) -> tuple[str, bool]:
        """The parameter behind a weight argument, and whether it arrives transposed."""
        turned = False
        while self.trace.values[value].kind == "result":
            node = self.trace.nodes[self.trace.values[value].node]
            base = node.op.split(".")[1]
            if base in ("t", "transpose", "permute"):
                turned = not turned
            elif base not in ("detach", "alias", "_to_copy", "clone", "view"):
                return "", turned
            value = node.inputs()[0]
        return self.trace.values[value].name, turned
