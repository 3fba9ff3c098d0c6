"""What else reads the tensor of a gate: a derivative by it belongs to all of its uses together."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from seprune.graph.dataflow import VIEWS, base
from seprune.graph.gates import Gate
from seprune.graph.trace import Trace


class GateUses:
    """The uses of all gates of a recorded pass.

    Args:
        readers: for each value the nodes that read it.
        classes: of the ids.
    """

    def __init__(
        self,
        trace: Trace,
        gates: Sequence[Gate],
        readers: Mapping[int, Sequence[int]],
        classes: np.ndarray[tuple[int, ...], np.dtype[np.int64]],
    ) -> None:
        self.trace, self.readers, self.classes = trace, readers, classes
        self.gates = {gate.name: gate for gate in gates}

    def settled(self, names: set[str]) -> bool:
        """Whether the tensors of some gates scale the channels of just these gates, alike."""
        for gate in (self.gates[name] for name in names):
            twins = [g for g in self.gates.values() if _same_numbers(gate, g)]
            if any(g.name not in names or self.scaled(g) != self.scaled(gate) for g in twins):
                return False
            products = {g.node for g in self.gates.values() if g.tap == gate.tap}
            if not self.only(gate, products):
                return False
        return True

    def scaled(self, gate: Gate) -> dict[int, int]:
        """The class of channels that each number of a gate's tensor scales."""
        assert gate.ids is not None  # of gates in a product
        classes = self.classes[gate.ids.clamp_min(0).numpy()]
        order = gate.order or tuple(range(gate.channels))
        return {element: int(c) for element, c in zip(order, classes.tolist())}

    def only(self, gate: Gate, products: set[int]) -> bool:
        """Whether nothing but `products` reads what is put in at the gate's tap."""
        todo, outputs = [gate.tapped], set(self.trace.outputs)
        while todo:
            value = todo.pop()
            if value in outputs:
                return False
            for number in self.readers.get(value, []):
                reader = self.trace.nodes[number]
                if number not in products and base(reader) not in VIEWS:
                    return False
                todo.extend(() if number in products else reader.outputs)
        return True

    def once(self, sites: Iterable[tuple[str, str]]) -> list[tuple[str, str]]:
        """Of sites (kind, name) one for each tensor: two uses of it have one derivative."""
        found: list[tuple[str, str]] = []
        for kind, name in sites:
            others = [self.gates[other] for k, other in found if k == "gate"]
            if kind != "gate" or not any(_same_numbers(self.gates[name], g) for g in others):
                found.append((kind, name))
        return found


def _same_numbers(one: Gate, two: Gate) -> bool:
    """Whether two gates take numbers of one tensor that are partly the same."""
    if one.tap is None or one.tap != two.tap:
        return False
    if not one.order or not two.order:
        return True
    return bool(set(one.order) & set(two.order))
