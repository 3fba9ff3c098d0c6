"""Views: ids are rearranged as the tensor was."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils._pytree import tree_map

from seprune.graph.channel_ids import Walker
from seprune.graph.trace import Node, Ref


def replay(walker: Walker, node: Node) -> None:
    """A view: do to the ids what was done to the tensor."""
    overload = _overload(node.op)
    arguments = tree_map(lambda a: walker.ids(a.value) if isinstance(a, Ref) else a, node.args)
    keywords = {k: v for k, v in node.kwargs.items() if k in ("dim", "dims", "start", "end")}
    made = overload(*arguments, **keywords)
    for index, part in enumerate(made if isinstance(made, (tuple, list)) else [made]):
        walker.set(node, part, index)


def _overload(op: str) -> Any:
    space, name, overload = op.split(".")
    return getattr(getattr(getattr(torch.ops, space), name), overload)
