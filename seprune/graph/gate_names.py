"""The name that users would give a gate: the path of the smallest module that is the gate."""

from __future__ import annotations

from collections.abc import Iterable

from seprune.graph.dataflow import LEARNED, Excitation, Flow, base
from seprune.graph.gate_products import Product
from seprune.graph.trace import Call, Node


def gate_name(
    flow: Flow, product: Product, excitation: Excitation, activation: tuple[str, int]
) -> str:
    """`layer1.0.se`, or `layer1.0:sigmoid` where the block itself computes the gate.

    Args:
        activation: its name, and its node (-1 without one).
    """
    kind, at = activation
    squeezes = [flow.trace.nodes[s] for s in excitation.squeezes]
    nodes = [flow.trace.nodes[n] for n in excitation.nodes]
    core = [n for n in nodes if base(n) in LEARNED] or list(squeezes)
    if at >= 0:
        core.append(flow.trace.nodes[at])
    path = _common(n.module for n in core)
    if _foreign(flow, product, path, core[0]):
        return f"{path}:{kind if at >= 0 else 'mul'}"
    nodes = [product.node, *squeezes]
    while path and not all(inside(n.module, path) for n in nodes):
        parent = path.rpartition(".")[0]
        if not parent or _foreign(flow, product, parent, core[0]):
            break
        path = parent
    return path or f":{kind}"


def inside(path: str, parent: str) -> bool:
    """Whether a module is `parent` or lies in it."""
    return path == parent or path.startswith(parent + ".")


def _foreign(flow: Flow, product: Product, path: str, node: Node) -> bool:
    """Whether the module at `path`, called around `node`, holds layers of more than the gate."""
    call = next((c for c in flow.trace.calls if _holds(c, path, node)), None)
    if call is None and path:
        return False
    first, end = (call.first_node, call.end_node) if call else (0, len(flow.trace.nodes))
    own = flow.ancestors(product.gate, first=first) - flow.ancestors(product.features, first=first)
    return any(
        base(n) in LEARNED and n.id not in own and n is not product.node and flow.live(n)
        for n in flow.trace.nodes[first:end]
    )


def _holds(call: Call, path: str, node: Node) -> bool:
    return call.module == path and call.first_node <= node.id < call.end_node


def _common(paths: Iterable[str]) -> str:
    """The longest module path that holds all of `paths`."""
    split = [p.split(".") if p else [] for p in paths]
    parts = []
    for level in zip(*split):
        if len(set(level)) > 1:
            break
        parts.append(level[0])
    return ".".join(parts)
