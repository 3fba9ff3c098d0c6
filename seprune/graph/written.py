"""Numbers that Python code gives to torch functions: sizes, split sizes, ends of slices, groups.

Every function here has a row of numbers; entry i of a call is the i-th of them. An index has two
for each of its places, start and stop.
"""

from __future__ import annotations

from collections.abc import Callable
from operator import index  # of numbers in tensors and arrays too
from typing import Any

from seprune.graph.function_calls import FunctionCall
from seprune.graph.trace import Node

SIZED = {
    "view": 1, "reshape": 1, "expand": 1, "repeat": 1, "broadcast_to": 1, "unflatten": 2,
    "zeros": 0, "ones": 0, "empty": 0, "full": 0,
    "new_zeros": 1, "new_ones": 1, "new_empty": 1, "new_full": 1,
}  # fmt: skip
"""Functions that take the sizes of their result, and the first argument that is one."""
FACTORIES = frozenset(("zeros", "ones", "empty", "full"))
SPLITS = {"split": 1, "split_with_sizes": 1}
_NUMBERS = {
    **SIZED, **SPLITS, "tensor_split": 1, "narrow": 2, "group_norm": 1, "layer_norm": 1,
    "conv1d": 6, "conv2d": 6, "conv3d": 6,
}  # fmt: skip
_INDEXED = ("__getitem__", "__setitem__")
_KEYS = (
    "size", "shape", "sizes", "split_size_or_sections", "split_size", "split_sizes",
    "indices_or_sections", "indices", "num_groups", "normalized_shape", "groups",
)  # fmt: skip
_END = 2**62  # torch's slices to the end stop at the largest integer

Change = Callable[[list[Any]], list[Any]]


def is_known(function: str) -> bool:
    """Whether calls of a function have numbers that can be changed."""
    return function in _NUMBERS or function in _INDEXED


def is_index(function: str) -> bool:
    """Whether numbers of a function may count from the end."""
    return function in _INDEXED


def changed(name: str, args: Any, kwargs: Any, change: Change) -> tuple[Any, Any]:
    """The arguments of a call with other numbers: in a list, one by one, by name, in an index."""
    if name in _INDEXED:
        return (args[0], _index(args[1], change), *args[2:]), kwargs
    at, key = _NUMBERS[name], next((k for k in _KEYS if k in kwargs), None)
    if key is not None:
        return args, {**kwargs, key: _listed(kwargs[key], change)}
    if len(args) > at and isinstance(args[at], (list, tuple)):
        return (*args[:at], change(list(args[at])), *args[at + 1 :]), kwargs
    return (*args[:at], *change(list(args[at:]))), kwargs


def _listed(given: Any, change: Change) -> Any:
    return change(list(given)) if isinstance(given, (list, tuple)) else change([given])[0]


def _index(parts: Any, change: Change) -> Any:
    if isinstance(parts, list) and any(map(_is_slice, parts)):
        parts = tuple(parts)
    if not isinstance(parts, tuple):
        return _index((parts,), change)[0]
    ends = [end for i in parts for end in ((i.start, i.stop) if _is_slice(i) else (None, None))]
    new = change(ends)
    return tuple(
        slice(new[2 * n], new[2 * n + 1], i.step) if _is_slice(i) else i
        for n, i in enumerate(parts)
    )


def _is_slice(part: Any) -> bool:
    return isinstance(part, slice)


def slice_entries(call: FunctionCall, node: Node, length: int) -> list[tuple[int, int, int]] | None:
    """Which numbers of a call say where one of its nodes slices.

    Args:
        length: of the dimension that is sliced.

    Returns:
        (entry, first, end): the number counts the positions [first, end); None if not all are
        found.
    """
    start, stop = slice_range(node, length)
    if call.function in _INDEXED:
        return _index_entries(call, node, length)
    numbers = call.arguments[1:]
    if call.function == "narrow" and len(numbers) == 3:
        return [(0, 0, start), (1, start, stop)]
    if call.function == "tensor_split" and numbers and isinstance(numbers[0], (list, tuple)):
        places = list(numbers[0])
        ends = [c for c in (start, stop) if 0 < c < length]
        return [(places.index(c), 0, c) for c in ends] if set(ends) <= set(places) else None
    return None


def slice_range(node: Node, length: int) -> tuple[int, int]:
    """The positions [start, stop) that a slice takes."""
    start, stop, _ = slice(*node.args[2:4]).indices(length)
    return start, max(start, stop)


def _index_entries(
    call: FunctionCall, node: Node, length: int
) -> list[tuple[int, int, int]] | None:
    parts = call.arguments[1] if isinstance(call.arguments[1], tuple) else (call.arguments[1],)
    taken = sum(not (i is None or i is Ellipsis) for i in parts)
    dim = 0
    for place, part in enumerate(parts):
        if part is Ellipsis:
            dim += call.dims - taken
            continue
        if _is_slice(part) and dim == node.args[1] and _same(part, node):
            return _ends(part, place, length)
        dim += not isinstance(part, int) or isinstance(part, bool)
    return None


def _same(part: slice, node: Node) -> bool:
    """Whether a node does what a slice in an index says."""
    given = (part.start or 0, _END if part.stop is None else part.stop)
    return all(min(index(g), _END) == min(n or 0, _END)
               for g, n in zip(given, node.args[2:4]))  # fmt: skip


def _ends(part: slice, place: int, length: int) -> list[tuple[int, int, int]]:
    found = []
    for entry, end in ((2 * place, part.start), (2 * place + 1, part.stop)):
        end = 0 if end is None else index(end)
        if 0 < abs(end) < length:
            found.append((entry, 0, end) if end > 0 else (entry, length + end, length))
    return found
