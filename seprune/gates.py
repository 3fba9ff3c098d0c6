"""Find every channel gate of a model by what it does, and watch the gates in every forward.

A channel gate depends on the input through a squeeze over positions, holds one value per sample
and channel, and multiplies a feature map over those channels (Hu et al., arXiv:1709.01507).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from seprune.dataflow import LEARNED, PRODUCTS, Excitation, Flow, base, common
from seprune.errors import InputError
from seprune.labels import Labelling, compact, solve, varying
from seprune.rules import label
from seprune.trace import Call, Node, Ref, Trace, record


@dataclass(frozen=True)
class Tap:
    """Where a tensor shows itself to Python: a module's output, its input, or a function in it."""

    module: str
    call: int
    kind: str  # "output" | "input" | "function"
    index: int


@dataclass(frozen=True)
class Gate:
    """One channel gate.

    Attributes:
        name: path of the gate's module (`layer1.0.se`), or of the block plus the operation
            (`layer1.0:sigmoid`); `[i]` for the i-th branch, `#i` for the i-th use.
        channels: values per sample.
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
    labels: Tensor | None = None  # of the scaled channels, for `groups`


def find_gates(model: nn.Module, inputs: Any) -> tuple[Gate, ...]:
    """Every channel gate of `model`, in the order of the forward pass.

    Args:
        inputs: one batch, or a tuple of positional arguments; at least two samples tell
            batch and channel apart best.

    Raises:
        InputError: the forward fails; names the layer.
    """
    trace = record(model, inputs)
    return gates_of(trace, label(trace, model), model)


def gates_of(trace: Trace, labelling: Labelling, model: nn.Module) -> tuple[Gate, ...]:
    """The gates in a recorded and labelled pass, and the gate modules that it never called."""
    finder = _Finder(trace, labelling, model)
    found = finder.find()
    return tuple(_numbered(found)) + tuple(_idle(trace, model))


def _numbered(gates: Sequence[Gate]) -> list[Gate]:
    seen: dict[str, int] = {}
    result = []
    for gate in gates:
        seen[gate.name] = seen.get(gate.name, 0) + 1
        use = seen[gate.name]
        result.append(gate if use == 1 else replace(gate, name=f"{gate.name}#{use}"))
    return result


def _idle(trace: Trace, model: nn.Module) -> list[Gate]:
    """Run every module that was never called on its own, and see whether it is a gate."""
    called = {call.module for call in trace.calls}
    tops = [
        (name, module)
        for name, module in model.named_modules()
        if name and name not in called and any(True for _ in module.children())
    ]
    gates: list[Gate] = []
    for name, module in tops:
        if any(name.startswith(g.name + ".") for g in gates):
            continue
        alone = _alone(module)
        if alone is not None and alone.name in ("", ":" + alone.name[1:]):
            gates.append(replace(alone, name=name, runs=False, scales=(), tap=None, features=None))
    return gates


def _alone(module: nn.Module) -> Gate | None:
    """The gate that `module` is when it is given a feature map, or None."""
    first = next((p for p in module.parameters() if p.dim() >= 2), None)
    if first is None:
        return None
    probe = torch.rand(2, first.shape[1], 5, 7, dtype=first.dtype, device=first.device)
    holder = _Scaled(module)
    try:
        trace = record(holder, probe)
    except InputError:
        return None
    found = _Finder(trace, label(trace, holder), holder).find()
    inside = [g for g in found if g.channels == first.shape[1]]
    return replace(inside[0], name="", placement="inner") if len(inside) == 1 else None


class _Scaled(nn.Module):
    """Multiply what a lone excitation returns onto its input, as its block would have done."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.module(x)
        if out.shape == x.shape:
            return out
        return x * out.reshape(x.shape[0], -1, 1, 1)



@dataclass(frozen=True)
class _Product:
    """A multiplication of a feature map by a squeezed tensor."""

    node: Node
    gate: int
    features: int
    elements: Tensor  # gate element of sample 0 at every position of sample 0 of the product
    dims: tuple[int, ...]  # dimensions of the product along which the gate varies


class _Finder:
    def __init__(self, trace: Trace, labelling: Labelling, model: nn.Module) -> None:
        self.trace, self.labelling, self.model = trace, labelling, model
        self.flow = Flow(trace, labelling.depends)
        self.classes = solve(labelling)
        self.outputs: dict[int, Tap] = {}
        self.inputs: dict[int, Tap] = {}
        self.functions: dict[int, Tap] = {}
        self._taps()

    def find(self) -> list[Gate]:
        products = [p for node in self.trace.nodes for p in self.products(node)]
        fused = {p.node.outputs[0] for p in products}
        residual = self.residual_classes(fused, {p.features for p in products})
        return [gate for p in products for gate in self.gates(p, residual)]

    # -- products -----------------------------------------------------------------------------

    def products(self, node: Node) -> list[_Product]:
        if base(node) not in PRODUCTS:
            return []
        pair = [a.value for a in node.args if isinstance(a, Ref)][-2:]
        if len(pair) < 2:
            return []
        found = []
        for gate, features in (pair, pair[::-1]):
            known = self.flow.depends
            if gate not in self.flow.squeezed or features in self.flow.squeezed:
                continue
            if gate in known and features in known and (p := self.product(node, gate, features)):
                found.append(p)
        return found[:1]

    def product(self, node: Node, gate: int, features: int) -> _Product | None:
        chain = self.flow.strip(gate)
        shape = self.trace.shape(node.outputs[0])
        size = torch.Size(self.trace.shape(chain[0])).numel()
        per_sample, rest = divmod(size, self.trace.batch)
        ids = self.flow.positions(chain).expand(shape)
        samples = ids // per_sample
        if rest or (self.trace.batch > 1 and varying(samples) != [0]):
            return None
        elements = compact(ids)[:1] % per_sample
        dims = tuple(d for d in varying(elements) if d > 0)
        return _Product(node, gate, features, elements, dims) if self.channelwise(
            dims, features, shape
        ) else None

    def channelwise(self, dims: tuple[int, ...], features: int, shape: tuple[int, ...]) -> bool:
        """Whether a gate that varies along `dims` varies with the channels of the features."""
        if not dims:
            return False
        labels = self.labelling.values[features].expand(shape)
        differ = [d for d in varying(labels) if d > 0]
        if int(labels.max()) <= 0:  # features of unknown origin: go by the usual layout
            return dims == (1,) and len(shape) > 2
        return bool(differ) and set(differ) <= set(dims) and dims[-1] in differ

    # -- gates --------------------------------------------------------------------------------

    def gates(self, product: _Product, residual: set[int]) -> list[Gate]:
        oldest = self.flow.strip(product.gate)[0]
        excitation = self.flow.excitation(oldest)
        activation, at = self.flow.activation(oldest)
        if not excitation.squeezes or not (excitation.learned or at >= 0):
            return []
        name = self.name(product, excitation, activation, at)
        gates = []
        for index, branch in enumerate(branches := self.branches(product)):
            classes = set(self.classes[branch.labels[branch.labels > 0]].tolist())
            gates.append(
                Gate(
                    name=name if len(branches) == 1 else f"{name}[{index}]",
                    channels=len(branch.order),
                    squeeze=excitation.kind,
                    activation=activation,
                    placement="residual" if classes & residual else "inner",
                    scales=tuple(dict.fromkeys(self.flow.makers(branch.features))),
                    excitation=self.layers(excitation),
                    labels=branch.labels,
                    **self.tapped(product, branch),
                )
            )
        return gates

    def layers(self, excitation: Excitation) -> tuple[str, ...]:
        nodes = [self.trace.nodes[n] for n in sorted(excitation.nodes)]
        return tuple(dict.fromkeys(n.module for n in nodes if base(n) in LEARNED and n.module))

    def branches(self, product: _Product) -> list[_Branch]:
        """One branch, or one for each feature map that a stacked product gates."""
        shape = self.trace.shape(product.node.outputs[0])
        labels = self.labelling.values[product.features].expand(shape)
        keep = [0, *product.dims]
        for d in range(len(shape)):
            if d not in keep:
                labels = labels.narrow(d, 0, 1)
        labels = labels[0].reshape([shape[d] for d in product.dims])
        elements = product.elements[0].reshape([shape[d] for d in product.dims])
        made = self.flow.producer(product.features)
        if len(product.dims) == 2 and made is not None and base(made) in ("stack", "cat"):
            parts = made.inputs()
            if len(parts) == len(labels):
                return [
                    _Branch(v, row, e, True) for v, row, e in zip(parts, labels, elements)
                ]
        return [_Branch(product.features, labels.reshape(-1), elements.reshape(-1), False)]

    def residual_classes(self, products: set[int], gated: set[int]) -> set[int]:
        """Channel classes that a residual sum adds up (not the fusion of gated branches)."""
        found: set[int] = set()
        for number, labels in self.labelling.sums:
            live = set(self.flow.live(self.trace.nodes[number])) - self.flow.squeezed
            fusion = live <= products or (live & products and live <= products | gated)
            if len(live) > 1 and not fusion:
                found.update(self.classes[labels[labels > 0]].tolist())
        return found

    # -- names --------------------------------------------------------------------------------

    def name(self, product: _Product, excitation: Excitation, activation: str, at: int) -> str:
        nodes = [self.trace.nodes[n] for n in excitation.nodes]
        core = [n for n in nodes if base(n) in LEARNED] or [
            self.trace.nodes[s] for s in excitation.squeezes
        ]
        if at >= 0:
            core.append(self.trace.nodes[at])
        path = common(n.module for n in core)
        if self.foreign(path, core[0], product):
            return f"{path}:{activation if at >= 0 else 'mul'}"
        whole = [product.node, *(self.trace.nodes[s] for s in excitation.squeezes)]
        while path and not all(_inside(n.module, path) for n in whole):
            parent = path.rpartition(".")[0]
            if not parent or self.foreign(parent, core[0], product):
                break
            path = parent
        return path or f":{activation}"

    def foreign(self, path: str, node: Node, product: _Product) -> bool:
        """Whether the module at `path` holds layers that do not belong to the gate."""
        call = next((c for c in self.trace.calls if _holds(c, path, node)), None)
        if call is None:
            return path == "" and self.foreign_nodes(0, len(self.trace.nodes), product)
        return self.foreign_nodes(call.first_node, call.end_node, product)

    def foreign_nodes(self, first: int, end: int, product: _Product) -> bool:
        own = self.flow.ancestors(product.gate, first=first)
        own -= self.flow.ancestors(product.features, first=first)
        return any(
            base(n) in LEARNED and n.id not in own and self.flow.live(n)
            for n in self.trace.nodes[first:end]
        )

    # -- taps ---------------------------------------------------------------------------------

    def _taps(self) -> None:
        for call in self.trace.calls:
            for index, value in enumerate(call.outputs):
                self.outputs.setdefault(value, Tap(call.module, call.call, "output", index))
            for index, value in enumerate(call.inputs):
                if call.module:
                    self.inputs.setdefault(value, Tap(call.module, call.call, "input", index))
        for call_ in self.trace.functions:
            self.functions.setdefault(
                call_.output, Tap(call_.module, call_.call, "function", call_.index)
            )

    def tapped(self, product: _Product, branch: _Branch) -> dict[str, Any]:
        chain = self.flow.strip(product.gate)
        for kind in (self.outputs, self.inputs, self.functions):
            for start, value in enumerate(chain):
                if value in kind:
                    order = self.order(chain[start:], product, branch)
                    return {"tap": kind[value], "order": order, **self.features(product, branch)}
        return {}

    def order(self, chain: list[int], product: _Product, branch: _Branch) -> tuple[int, ...]:
        """Element of the tapped sample for every channel of the branch; () if that is 0, 1, ..."""
        size = torch.Size(self.trace.shape(chain[0])).numel() // self.trace.batch
        shape = self.trace.shape(product.node.outputs[0])
        ids = compact(self.flow.positions(chain).expand(shape))[:1] % size
        spread = ids[0].reshape([shape[d] for d in product.dims])
        oldest = product.elements[0].reshape(spread.shape)
        wanted = {int(e): int(i) for e, i in zip(oldest.reshape(-1), spread.reshape(-1))}
        order = tuple(wanted[int(e)] for e in branch.order)
        return () if order == tuple(range(size)) else order

    def features(self, product: _Product, branch: _Branch) -> dict[str, Any]:
        """Where the gated feature map shows itself, if its channels are where (B, C, *) has them."""
        plain = branch.stacked or product.dims == (1,)
        for kind in (self.outputs, self.inputs, self.functions):
            if plain and branch.features in kind:
                return {"features": kind[branch.features]}
        return {}


@dataclass(frozen=True)
class _Branch:
    features: int
    labels: Tensor
    order: Tensor
    stacked: bool


def _inside(path: str, parent: str) -> bool:
    return path == parent or path.startswith(parent + ".")


def _holds(call: Call, path: str, node: Node) -> bool:
    return call.module == path and call.first_node <= node.id < call.end_node
