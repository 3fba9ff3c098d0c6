"""Where one number per sample can stand for a channel: its gate, or a unit gate at its layer.

A channel that is made in several places (a residual sum) has one source at each of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from seprune.graph.channel_ids import Labelling, along
from seprune.graph.dataflow import ACTIVATIONS, PRODUCTS, Flow, base
from seprune.graph.gates import Gate
from seprune.graph.trace import Node, Trace

_NORMS = {"native_batch_norm", "native_group_norm", "native_layer_norm", "cudnn_batch_norm",
          "_native_batch_norm_legit_no_training"}  # fmt: skip
_SCALARS = {"mul", "div", "add", "sub"}


@dataclass(frozen=True)
class Site:
    """A gate, or the output of a module (`kind` is `gate` or `unit`), and the labels it carries."""

    kind: str
    name: str
    labels: Tensor
    squeezed: bool = False  # inside an excitation


def sites(trace: Trace, labelling: Labelling, gates: Sequence[Gate]) -> dict[int, Site]:
    """For every slot that makes channels, the last place before they are mixed or added."""
    walk = _Walk(trace, labelling, gates)
    found = {}
    for number, slot in enumerate(labelling.slots):
        if slot.produces and (site := walk.site(slot.node)) is not None:
            found[number] = site
    return found


class _Walk:
    def __init__(self, trace: Trace, labelling: Labelling, gates: Sequence[Gate]) -> None:
        self.trace, self.labelling = trace, labelling
        self.flow = Flow(trace, labelling)
        self.readers = trace.consumers()
        self.whole = labelling.whole
        self.by_node = {g.node: g for g in reversed(gates) if g.labels is not None}
        self.by_layer = {
            layer: g for g in reversed(gates) if g.labels is not None for layer in g.scales
        }
        counts: dict[str, int] = {}
        for call in trace.calls:
            counts[call.module] = counts.get(call.module, 0) + 1
        self.shown = {
            v: call.module
            for call in reversed(trace.calls)
            for v in call.outputs[:1]
            if call.module and counts[call.module] == 1
        }

    def site(self, start: int) -> Site | None:
        """Follow the channels from the layer that makes them while they stay themselves."""
        node: Node | None = self.trace.nodes[start]
        layer, unit = "", None
        while node is not None:
            value = node.outputs[0]
            if node.id in self.by_node and base(node) in PRODUCTS:
                return self.gate(self.by_node[node.id])
            if base(node) in ("convolution", "addmm", "mm", "linear"):
                layer = node.module
            labels = self.labelling.values.get(value)
            channels = along(labels, 1 if labels.dim() != 3 else -1) if labels is not None else None
            if value in self.shown and channels is not None and int(channels.max()) > 0:
                unit = Site("unit", self.shown[value], channels, value in self.flow.squeezed)
            node = self.next(value)
        return self.gate(self.by_layer[layer]) if layer in self.by_layer else unit

    def gate(self, gate: Gate) -> Site:
        assert gate.labels is not None  # by construction of the two tables
        return Site("gate", gate.name, gate.labels)

    def next(self, value: int) -> Node | None:
        """The one operator that reads the channels and keeps them apart, if there is just one."""
        nodes = [self.trace.nodes[n] for n in self.readers.get(value, [])]
        nodes = [n for n in nodes if n.outputs and n.outputs[0] not in self.flow.squeezed]
        if len(nodes) != 1:
            return None
        node, op = nodes[0], base(nodes[0])
        if op in PRODUCTS and node.id in self.by_node:
            return node
        live = set(self.flow.live(node)) - {value}
        depthwise = op == "convolution" and node.args[8] == self.trace.shape(value)[1] > 1
        depthwise = depthwise or node.module in self.whole  # conv groups go as one
        plain = op in _NORMS or op in ACTIVATIONS or depthwise or op == "clone"
        return node if plain or (op in _SCALARS and not live) else None
