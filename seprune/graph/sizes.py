"""Sizes written into a forward, such as `x.view(-1, 64)`: found, and set to other widths.

A side `view#2[1]` of a module means entry 1 of the numbers that the second call of `view` is given
in one call of the module (`written`), `__getitem__#2/3[1]` that there are three of them: wrong ends
of a slice would be no error. Setting it changes that argument in every forward from then on.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial, wraps
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from seprune.errors import InputError
from seprune.graph.channel_ids import along, compact
from seprune.graph.function_calls import function_name
from seprune.graph.trace import Trace
from seprune.graph.written import SIZED, changed, is_index, is_known

_SIDE = re.compile(r"(\w+)#(\d+)(?:/(\d+))?\[(\d+)\]")
_SIZES = "_seprune_sizes"


@dataclass(frozen=True)
class WrittenSize:
    """An entry among the sizes of a call whose dimension carries channels.

    Attributes:
        classes: of the channels along the dimension.
    """

    layer: str
    side: str
    classes: Tensor


def is_size(side: str) -> bool:
    """Whether a side is an argument of a call."""
    return "#" in side


def written_sizes(trace: Trace, values: Mapping[int, Tensor], classes: Tensor) -> list[WrittenSize]:
    """The entries that may have to change with the width of a group.

    Args:
        values: the channel ids of every value of the pass.
        classes: of every id, what it is tied to.
    """
    found: dict[tuple[str, str], WrittenSize] = {}
    clashing: set[tuple[str, str]] = set()
    for call in trace.functions:
        if call.function not in SIZED or call.output not in values:
            continue
        ids = compact(values[call.output])
        of_class = classes[ids.clamp_min(0)].expand(trace.shape(call.output))
        start, before = 0, trace.shape(call.inputs[0]) if call.inputs else ()
        if call.function == "unflatten":
            start = _unflattened(before, tuple(of_class.shape))
        for dim in range(start, of_class.dim()):
            vector = along(of_class, dim)
            if vector is None or not bool((vector > 0).any()):
                continue
            padded = (1,) * (of_class.dim() - len(before)) + before
            if call.function == "repeat" and padded[dim] > 1:
                continue  # a number of copies, which is the width only where one is copied
            side = f"{call.function}#{call.index}[{dim - start}]"
            known = found.setdefault((call.module, side), WrittenSize(call.module, side, vector))
            if not torch.equal(known.classes, vector):  # a shared module, called for other channels
                clashing.add((call.module, side))
    return [size for key, size in found.items() if key not in clashing]


def _unflattened(before: tuple[int, ...], after: tuple[int, ...]) -> int:
    """Which dimension was taken apart."""
    count = len(after) - len(before) + 1
    fitting = (
        d
        for d in range(len(before))
        if before[:d] == after[:d] and before[d + 1 :] == after[d + count :]
    )
    return next(fitting, 0)


# -- setting them ----------------------------------------------------------------------------------


def set_size(module: nn.Module, side: str, count: int) -> None:
    """Give a call of the module's forward another size.

    Raises:
        InputError: not a side of that kind, or a module whose forward is not Python.
    """
    match = _SIDE.fullmatch(side)
    if match is None or not is_known(match[1]):
        raise InputError(
            f"'{side}' names no size that a forward is given",
            why="the plan was edited or is of another kind",
            fix="restore the plan, or make it again",
            code="plan",
        )
    if isinstance(module, torch.jit.ScriptModule):
        raise InputError(
            f"a size in the forward of a {type(module).__name__} cannot be changed",
            why="it is compiled",
            fix="prune the eager model, and script it afterwards",
            code="uncuttable",
        )
    if not isinstance(module, _Resized):
        module.__class__ = _resized(type(module))
    setattr(module, _SIZES, {**getattr(module, _SIZES, {}), side: count})


def size_set(module: nn.Module, side: str) -> int | None:
    """What a side was set to before; None if it never was."""
    found: int | None = getattr(module, _SIZES, {}).get(side)
    return found


class _Resized:
    """Mixed into the class of a module whose forward gets other sizes."""

    def __init_subclass__(cls, **_: Any) -> None:
        """Without that of the module's class, which may keep a register of its subclasses."""

    def __reduce_ex__(self, protocol: Any) -> Any:
        return _again, (type(self).__mro__[2],), self.__dict__


_MADE: dict[type[nn.Module], Any] = {}


def _resized(kind: type[nn.Module]) -> Any:
    """The same class with other sizes in its forward; one for each class."""
    if kind not in _MADE:
        _MADE[kind] = _derived(kind)
    return _MADE[kind]


def _derived(kind: type[nn.Module]) -> Any:
    @wraps(kind.forward)  # exporters read its signature
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        with (sizes := _Sizes(getattr(self, _SIZES))):
            made = kind.forward(self, *args, **kwargs)
        sizes.require_path()
        return made

    names: dict[str, Any] = {"__module__": kind.__module__, "__qualname__": kind.__qualname__}
    names |= {"__doc__": kind.__doc__, "forward": forward}
    return type(kind.__name__, (_Resized, kind), names)


def _again(kind: type[nn.Module]) -> Any:
    return object.__new__(_resized(kind))


class _Sizes(TorchFunctionMode):
    """Changes the sizes that some calls are given, counted as `trace` counts them."""

    def __init__(self, sizes: Mapping[str, int]) -> None:
        super().__init__()
        self.wanted: dict[tuple[str, int], dict[int, int]] = {}
        self.totals: dict[str, int] = {}
        for side, count in sizes.items():
            name, index, total, entry = _SIDE.fullmatch(side).groups()  # type: ignore[union-attr]
            if total:
                self.totals[name] = int(total)
            self.wanted.setdefault((name, int(index)), {})[int(entry)] = count
        self.counts: Counter[str] = Counter()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name, kwargs = function_name(func), kwargs or {}
        wanted = self.wanted.get((name, self.counts[name] + 1))
        if wanted:
            change = _with_ends if is_index(name) else _with_entries
            args, kwargs = changed(name, args, kwargs, partial(change, wanted))
        result = func(*args, **kwargs)
        self.counts[name] += 1
        return result

    def require_path(self) -> None:
        """Refuse a forward on which other calls may have got the numbers."""
        for name, total in self.totals.items():
            if self.counts[name] != total:
                raise InputError(
                    f"this forward calls {name} {self.counts[name]} times",
                    why=f"{total} times when the network was cut: its numbers were set by these",
                    fix="use inputs of the size and the mode that the network was analysed with",
                    code="forward",
                )


def _with_entries(wanted: Mapping[int, int], sizes: list[Any]) -> list[Any]:
    return [size if size == -1 else wanted.get(i, size) for i, size in enumerate(sizes)]


def _with_ends(wanted: Mapping[int, int], ends: list[Any]) -> list[Any]:
    """Starts and stops, of which negative ones count from the end."""
    return [e if e is None or i not in wanted else -wanted[i] if int(e) < 0 else wanted[i]
            for i, e in enumerate(ends)]  # fmt: skip


# -- finding out which are written down ------------------------------------------------------------


class SizeTrial(TorchFunctionMode):
    """Runs a cut copy; finds sizes that do not follow, and gives it the right ones.

    Attributes:
        noted: (module, side) of what was found.

    Args:
        expected: (module, side) -> width of the cut copy.
    """

    def __init__(self, expected: Mapping[tuple[str, str], int]) -> None:
        super().__init__()
        self.expected, self.noted = expected, dict[tuple[str, str], None]()
        self.stack: list[tuple[str, Counter[str]]] = []

    @contextmanager
    def over(self, model: nn.Module) -> Iterator[None]:
        """Watch every forward of the model while the context is open."""
        handles = []
        for path, module in model.named_modules():
            if not isinstance(module, torch.jit.ScriptModule):  # it takes no hooks
                handles.append(module.register_forward_pre_hook(partial(self._enter, path)))
                handles.append(module.register_forward_hook(self._leave, always_call=True))
        try:
            with self:
                yield
        finally:
            self.stack.clear()
            for handle in handles:
                handle.remove()

    def _enter(self, path: str, *_: Any) -> None:
        self.stack.append((path, Counter()))

    def _leave(self, *_: Any) -> None:
        self.stack.pop()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name, kwargs = function_name(func), kwargs or {}
        if name in SIZED and self.stack:
            path, counts = self.stack[-1]
            right = partial(self._right, path, f"{name}#{counts[name] + 1}")
            args, kwargs = changed(name, args, kwargs, right)
        result = func(*args, **kwargs)
        for _, counts in self.stack:
            counts[name] += 1
        return result

    def _right(self, path: str, call: str, sizes: list[Any]) -> list[Any]:
        for entry, size in enumerate(sizes):
            right = self.expected.get((path, f"{call}[{entry}]"))
            if right is not None and type(size) is int and size not in (-1, right):
                sizes[entry] = right
                self.noted[path, f"{call}[{entry}]"] = None
        return sizes
