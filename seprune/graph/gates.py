"""Find every channel gate of a model by what it does.

A channel gate depends on the input through a squeeze over positions, holds one value per sample
and channel, and multiplies a feature map over those channels (Hu et al., arXiv:1709.01507).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from seprune.errors import InputError
from seprune.graph.channel_ids import ChannelIds, solve, varying
from seprune.graph.dataflow import LEARNED, SUMS, VIEWS, Excitation, Flow, base
from seprune.graph.gate_names import gate_name, inside
from seprune.graph.gate_products import Product, find_products, sampled
from seprune.graph.op_rules import assign_channel_ids
from seprune.graph.tap_points import Tap, Taps
from seprune.graph.trace import Trace, record


@dataclass(frozen=True)
class Gate:
    """One channel gate.

    Attributes:
        name: path of the gate's module (`layer1.0.se`), or of the block plus the operation
            (`layer1.0:sigmoid`); `[i]` for the i-th branch, `#i` for the i-th use.
        channels: values per sample; 0 where a gate that never ran takes any number.
        squeeze: `mean`, `max`, `mean+max` or another name.
        activation: `sigmoid`, `hardsigmoid`, `tanh`, `relu`, `softmax`, `identity`, ...
        placement: `residual` if the gated channels take part in a residual sum, else `inner`.
        scales: layers whose output channels the gate multiplies.
        excitation: layers between squeeze and gate.
        runs: False for a gate module that the forward never calls.
    """

    name: str
    channels: int
    squeeze: str
    activation: str
    placement: str
    scales: tuple[str, ...] = ()
    excitation: tuple[str, ...] = ()
    runs: bool = True
    tap: Tap | None = None
    features: Tap | None = None
    order: tuple[int, ...] = ()  # channel c is element order[c] of the tapped sample; () = as is
    size: int = 0  # elements of one sample of the tapped tensor
    ids: Tensor | None = None  # of the scaled channels, for `groups`
    node: int = -1  # the product in the recorded pass, for `score_sites`
    tapped: int = -1  # the value that the tap shows
    divides: bool = False  # the tap shows 1 over the gate
    excitation_nodes: frozenset[int] = frozenset()  # from the squeeze to the gate


def find_gates(model: nn.Module, inputs: Any) -> tuple[Gate, ...]:
    """Every channel gate of `model`, in the order of the forward pass.

    Args:
        inputs: one batch, or a tuple of positional arguments; at least two samples tell
            batch and channel apart best.

    Raises:
        InputError: the forward fails; names the layer.
    """
    return gates_in(record(model, inputs), model)


def gates_in(trace: Trace, model: nn.Module) -> tuple[Gate, ...]:
    """`find_gates` in a pass that was recorded already."""
    return gates_of(trace, assign_channel_ids(trace, model), model)


def gates_of(trace: Trace, channel_ids: ChannelIds, model: nn.Module) -> tuple[Gate, ...]:
    """The gates in a recorded and labelled pass, and the gate modules that it never called."""
    return tuple(_found(trace, channel_ids)) + tuple(_idle(trace, model))


def _found(trace: Trace, channel_ids: ChannelIds) -> list[Gate]:
    return _named(_Finder(trace, channel_ids).find())


def _named(found: Sequence[_Found]) -> list[Gate]:
    """Make names unique: `[i]` for the parts of one tensor, `#i` for one more use of a gate."""
    parts: dict[int, list[frozenset[int]]] = {}
    for part in found:
        known = parts.setdefault(part.root, [])
        if part.elements not in known:
            known.append(part.elements)
    uses: dict[str, int] = {}
    gates = []
    for part in found:
        name, known = part.gate.name, parts[part.root]
        name = f"{name}[{known.index(part.elements)}]" if len(known) > 1 else name
        uses[name] = uses.get(name, 0) + 1
        gates.append(replace(part.gate, name=name if uses[name] == 1 else f"{name}#{uses[name]}"))
    return gates


# -- modules that the forward never calls ---------------------------------------------------------


def _idle(trace: Trace, model: nn.Module) -> list[Gate]:
    """The gates inside the modules that were never called, found by running those alone."""
    called = {holder for call in trace.calls for holder in _holders(call.module)}
    done: list[str] = []
    gates: list[Gate] = []
    for name, module in model.named_modules():
        holds = type(module) in (nn.Sequential, nn.ModuleList)
        own = holds or "torch.nn" not in type(module).__module__
        if not name or name in called or not own or any(inside(name, d) for d in done):
            continue
        alone = _alone(module)
        if alone:
            done.append(name)
        for gate in alone:
            path = name + gate.name.removeprefix("module")
            gates.append(
                replace(gate, name=path, runs=False, scales=(), excitation=(), ids=None,
                        tap=None, features=None, node=-1, tapped=-1,
                        excitation_nodes=frozenset())
            )  # fmt: skip
    return gates


def _holders(path: str) -> list[str]:
    """A module and all that it lies in: one that is iterated over is never called itself."""
    parts = path.split(".")
    return [".".join(parts[:i]) for i in range(1, len(parts) + 1)]


def _alone(module: nn.Module) -> list[Gate]:
    """The gates of a module that is given a feature map of its own."""
    first = next((p for p in module.parameters() if p.dim() >= 2), None)
    if first is None or not hasattr(type(module), "forward"):
        return []
    layer = next((m for m in module.modules() if getattr(m, "weight", None) is first), None)
    channels = first.shape[1] * int(getattr(layer, "groups", 1))
    holder = _Scaled(module)
    for width in (channels, _ANY):  # ECA has one channel in its kernel and takes any number
        probe = torch.rand(2, width, 5, 7, dtype=first.dtype, device=first.device)
        try:
            trace = record(holder, probe, limit_seconds=5)
        except InputError:
            continue
        found = _found(trace, assign_channel_ids(trace, holder))
        if found:
            return found if width == channels else [replace(g, channels=0) for g in found]
    return []


_ANY = 12


class _Scaled(nn.Module):
    """Multiply what a lone excitation returns onto its input, as its block would have done."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.module(x)
        return out if out.shape == x.shape else x * out.reshape(x.shape[0], -1, 1, 1)


# -- gates of products -----------------------------------------------------------------------------


@dataclass(frozen=True)
class _Branch:
    """A feature map of a product, its ids, and which elements of the gate scale it."""

    features: int
    ids: Tensor
    elements: Tensor
    plain: bool  # features are (B, C, *)


@dataclass(frozen=True)
class _Found:
    """A gate before its name is unique: the elements it takes of the tensor `root`."""

    gate: Gate
    root: int
    elements: frozenset[int]


class _Finder:
    def __init__(self, trace: Trace, channel_ids: ChannelIds) -> None:
        self.trace, self.channel_ids = trace, channel_ids
        self.flow = Flow(trace, channel_ids)
        self.classes = solve(channel_ids)
        self.taps = Taps(trace)

    def find(self) -> list[_Found]:
        products = find_products(self.flow, self.channel_ids)
        residual = self.residual_classes(products)
        return [found for p in products for found in self.gates(p, residual)]

    # -- gates --------------------------------------------------------------------------------

    def gates(self, product: Product, residual: set[int]) -> list[_Found]:
        excitation = self.flow.excitation(product.root)
        activation, at = self.flow.activation(product.root)
        activation = "sigmoid" if product.divides else activation
        if not excitation.squeezes or not (excitation.learned or at >= 0):
            return []
        name = gate_name(self.flow, product, excitation, (activation, at))
        found = []
        for branch in self.branches(product, at):
            classes = set(self.classes[branch.ids[branch.ids > 0]].tolist())
            gate = Gate(
                name=name,
                channels=len(branch.elements),
                squeeze=excitation.kind,
                activation=activation,
                placement="residual" if classes & residual else "inner",
                scales=tuple(dict.fromkeys(self.flow.makers(branch.features))),
                excitation=self.layers(excitation),
                ids=branch.ids,
                node=product.node.id,
                divides=product.divides,
                excitation_nodes=excitation.nodes | set(excitation.squeezes),
                **self.tapped(product, branch),
            )
            found.append(_Found(gate, product.root, frozenset(branch.elements.tolist())))
        return found

    def layers(self, excitation: Excitation) -> tuple[str, ...]:
        nodes = [self.trace.nodes[n] for n in sorted(excitation.nodes)]
        names = [self.flow.layer(n) for n in nodes if base(n) in LEARNED]
        return tuple(dict.fromkeys(name for name in names if name))

    def branches(self, product: Product, at: int) -> list[_Branch]:
        """One branch, or one for each feature map that a stacked product gates."""
        shape = product.ids.shape
        one = [slice(None) if d in product.dims else 0 for d in range(len(shape))]
        ids, elements = product.ids[tuple(one)], product.elements.expand(shape)[tuple(one)]
        made = self.flow.producer(product.features)
        parts = made.inputs() if made and base(made) in ("stack", "cat") else []
        if product.dims == (1,) and len(parts) > 1 and self.over(at) == len(parts):
            sizes = [self.trace.shape(v)[1] for v in parts]  # a softmax over what was joined
            rows = zip(parts, torch.split(ids, sizes), torch.split(elements, sizes))
            return [_Branch(v, row, e, True) for v, row, e in rows]
        if len(product.dims) == 2 and len(parts) == len(ids):
            parts = [self.flow.strip(v)[0] for v in parts]
            return [_Branch(v, row, e, True) for v, row, e in zip(parts, ids, elements)]
        plain = product.dims == (1,) and self.trace.shape(product.features)[1] == len(elements)
        ids, elements = self.once(ids.reshape(-1), elements.reshape(-1))
        return [_Branch(product.features, ids, elements, plain)]

    def once(self, ids: Tensor, elements: Tensor) -> tuple[Tensor, Tensor]:
        """One channel for each number of a gate that scales all channels of a unit alike."""
        pairs = torch.stack([elements, self.classes[ids.clamp_min(0)]], 1)
        distinct = len(torch.unique(elements))
        if distinct == len(elements) or len(torch.unique(pairs, dim=0)) != distinct:
            return ids, elements
        known = elements.tolist()
        rows = torch.tensor([known.index(n) for n in dict.fromkeys(known)])
        return ids[rows], elements[rows]

    def over(self, at: int) -> int:
        """How many values a softmax weighs against each other; 0 for other activations."""
        node = self.trace.nodes[at]
        if at < 0 or base(node) != "_softmax":
            return 0
        return self.trace.shape(node.outputs[0])[int(node.args[1])]

    def residual_classes(self, products: Sequence[Product]) -> set[int]:
        """Channel classes that a residual sum adds up: one of maps that go on to the output.

        Sums of branches that were gated are fusions, and those that only a squeeze reads are
        part of the gate.
        """
        gates = {p.node.id: p.gate for p in products}
        gated = {p.node.outputs[0] for p in products}
        features = {p.features for p in products}
        for node in self.trace.nodes:  # a sum of gated branches is one, too
            terms = self.flow.live(node)
            if terms and base(node) in VIEWS | SUMS and gated.issuperset(terms):
                gated.update(node.outputs)
        used = set(self.trace.outputs)
        for node in reversed(self.trace.nodes):
            if used & set(node.outputs):
                used.update(v for v in self.flow.live(node) if v != gates.get(node.id))
        found: set[int] = set()
        for number, ids in self.channel_ids.sums:
            node = self.trace.nodes[number]
            live = set(self.flow.live(node)) - self.flow.squeezed
            fusion = live <= gated or (live & gated and live <= gated | features)
            if len(live) > 1 and not fusion and used & set(node.outputs):
                found.update(self.classes[ids[ids > 0]].tolist())
        return found

    # -- taps ---------------------------------------------------------------------------------

    def tapped(self, product: Product, branch: _Branch) -> dict[str, Any]:
        """Where the gate and, as (B, C, *), its features show themselves."""
        chain = self.flow.strip(product.gate)
        makers = [node.id for v in chain[1:] if (node := self.flow.producer(v)) is not None]
        uses = list(zip(chain, [*makers, product.node.id]))
        cut = [i for i, v in enumerate(chain) if self.detached(v)]
        behind = uses[max(cut, default=0) :]
        own = self.size(chain[0])  # a gate that is repeated at every position has other derivatives
        narrow = [(v, node) for v, node in behind if self.size(v) == own]
        seen = self.taps.before(narrow) or self.taps.before(behind) or self.taps.before(uses)
        if seen is None:
            return {}
        features = self.taps.first([branch.features]) if branch.plain else None
        place = self.order(chain[: chain.index(seen[0]) + 1], product, branch)
        return {
            "tap": replace(seen[1], batch_dim=place.pop("batch_dim")),
            "tapped": seen[0],
            "features": features[1] if features else None,
            **place,
        }

    def size(self, value: int) -> int:
        return math.prod(self.trace.shape(value))

    def detached(self, value: int) -> bool:
        """Whether derivatives end at a value, so that a gate has to be read behind it."""
        node = self.flow.producer(value)
        return node is not None and base(node) == "detach"

    def order(self, chain: list[int], product: Product, branch: _Branch) -> dict[str, Any]:
        """The tapped tensor's batch dimension, its size, and its element for every channel.

        () stands for the elements 0, 1, ...
        """
        ways = sampled(self.flow, chain[0])
        numbers = next(n for n in ways if n.batch_dim == product.batch_dim)
        samples = self.flow.positions(chain, numbers.samples)
        elements = self.flow.positions(chain, numbers.elements)
        lengths = enumerate(samples.shape)
        batch_dim = next(iter(varying(samples) or [d for d, n in lengths if n == 1]), 0)
        count = int(numbers.samples.max()) + 1
        rows = elements.movedim(batch_dim, 0).reshape(count, -1)[0].tolist()
        place = {element: i for i, element in reversed(list(enumerate(rows)))}
        order = tuple(place[e] for e in branch.elements.tolist())
        plain = order == tuple(range(len(rows)))
        return {"batch_dim": batch_dim, "size": len(rows), "order": () if plain else order}
