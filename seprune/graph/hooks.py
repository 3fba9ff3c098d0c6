"""Read every gate, and the feature map it scales, while a model runs.

Forward hooks on the modules found once by `gates.find_gates`; only a gate that no module returns
(functional code) needs a look at the functions of its own block.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_flatten, tree_unflatten

from seprune.graph.function_calls import function_name
from seprune.graph.gates import Gate
from seprune.graph.tap_points import Tap

GateCallback = Callable[[Gate, Tensor, Tensor | None], None]
TensorCallback = Callable[[Tensor], Tensor | None]


@contextmanager
def watch(
    model: nn.Module,
    gates: Sequence[Gate],
    callback: GateCallback,
    *,
    derivatives: bool = False,
) -> Iterator[None]:
    """Call `callback(gate, gate_BC, features)` for every gate in every forward.

    `gate_BC` has shape (B, C) and is what the network goes on with: `gate_BC.register_hook` sees
    the derivative of the loss. `features` is the (B, C, *) map
    before the gate is applied, or None where no module and no function shows it. All hooks are
    removed at the end, whatever happens inside. B counts frames where those are folded into the
    batch.

    Args:
        derivatives: a gate that was made without a graph (detached, under `no_grad`) starts one.
    """
    pending: dict[str, dict[str, Tensor]] = {}
    receive = partial(_receive, pending, callback, derivatives)
    taps: list[tuple[Tap, TensorCallback]] = []
    for gate in gates:
        if gate.tap is None:
            continue
        taps.append((gate.tap, partial(receive, gate, "gate")))
        if gate.features is not None:
            taps.append((gate.features, partial(receive, gate, "features")))
    fresh = model.register_forward_pre_hook(lambda *_: pending.clear(), prepend=True)
    try:  # a forward that raised has left half a pair behind
        with tapped(model, taps):
            yield
    finally:
        fresh.remove()


@contextmanager
def tapped(model: nn.Module, taps: Sequence[tuple[Tap, TensorCallback]]) -> Iterator[None]:
    """Hand the tensor at every tap to its callback in every forward of `model`.

    The network goes on with the tensor that the callback returns, unless that is None.
    """
    by_module: dict[str, list[tuple[Tap, TensorCallback]]] = {}
    for tap, give in taps:
        by_module.setdefault(tap.module, []).append((tap, give))
    calls: dict[str, int] = {}
    handles = [model.register_forward_pre_hook(lambda *_: calls.clear(), prepend=True)]
    try:
        for name, wanted in by_module.items():
            module = model.get_submodule(name)
            handles += _hook(module, name, calls, wanted)
        yield
    finally:
        for handle in handles:
            handle.remove()


def _hook(
    module: nn.Module, name: str, calls: dict[str, int], wanted: list[tuple[Tap, TensorCallback]]
) -> list[Any]:
    modes: list[_FunctionHooks] = []

    def enter(module: nn.Module, args: Any, kwargs: Any) -> Any:
        call = calls.get(name, 0)
        calls[name] = call + 1
        given = _give(wanted, call, "input", (args, kwargs))
        functions, arguments = (_functions(wanted, call, k) for k in ("function", "argument"))
        if functions or arguments:
            modes.append(_FunctionHooks(functions, arguments))
            modes[-1].__enter__()  # type: ignore[no-untyped-call]
        return given

    def leave(module: nn.Module, args: Any, output: Any) -> Any:
        if modes:
            modes.pop().__exit__(None, None, None)  # type: ignore[no-untyped-call]
        return _give(wanted, calls[name] - 1, "output", output)

    # always_call: a forward that raises must not leave its function mode behind
    return [
        module.register_forward_pre_hook(enter, with_kwargs=True),
        module.register_forward_hook(leave, always_call=True),
    ]


def _give(wanted: list[tuple[Tap, TensorCallback]], call: int, kind: str, tree: Any) -> Any:
    """Show the wanted tensors of a tree; returns the tree with the new ones, None without any."""
    here = [(tap.index, give) for tap, give in wanted if tap.call == call and tap.kind == kind]
    return _changed(here, tree) if here and tree is not None else None


def _changed(here: list[tuple[int, TensorCallback]], tree: Any) -> Any:
    """A tree with new tensors at some places among its tensors; None if all stay."""
    leaves, spec = tree_flatten(tree)
    places = [i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]
    changed = False
    for index, give in here:
        place = places[index]
        with torch._C.DisableTorchFunction():
            new = give(leaves[place])
        if new is not None:
            leaves[place], changed = new, True
    return tree_unflatten(leaves, spec) if changed else None


Wanted = dict[tuple[str, int], list[tuple[int, TensorCallback]]]


def _functions(wanted: list[tuple[Tap, TensorCallback]], call: int, kind: str) -> Wanted:
    found: Wanted = {}
    for tap, give in wanted:
        if tap.kind == kind and tap.call == call:
            found.setdefault((tap.function, tap.index), []).append((tap.argument, give))
    return found


class _FunctionHooks(TorchFunctionMode):
    """Counts the torch functions of one module call as `trace` did, and hands some tensors on."""

    def __init__(self, results: Wanted, arguments: Wanted) -> None:
        super().__init__()
        self.results, self.arguments = results, arguments
        self.counts: Counter[str] = Counter()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, name = kwargs or {}, function_name(func)
        here = self.arguments.get((name, self.counts[name] + 1))
        if here:
            args, kwargs = _changed(here, (args, kwargs)) or (args, kwargs)
        result = func(*args, **kwargs)
        self.counts[name] += 1
        if isinstance(result, Tensor):
            for _, give in self.results.get((name, self.counts[name]), ()):
                with torch._C.DisableTorchFunction():
                    new = give(result)
                result = result if new is None else new
        return result


def _receive(
    pending: dict[str, dict[str, Tensor]],
    callback: GateCallback,
    derivatives: bool,
    gate: Gate,
    part: str,
    tensor: Tensor,
) -> Tensor | None:
    """Collect a gate and its features, whichever comes first, and report them together."""
    parts = pending.setdefault(gate.name, {})
    new = None
    if part == "features":
        parts[part] = tensor
    else:
        if derivatives and not tensor.requires_grad and tensor.is_floating_point():
            with torch.enable_grad():
                tensor = new = tensor.detach().requires_grad_().clone()
        with torch.set_grad_enabled(torch.is_grad_enabled() or new is not None):
            parts[part], through = _through(gate, tensor)
        new = new if through is None else through
    if len(parts) == (2 if gate.features is not None else 1):
        del pending[gate.name]
        callback(gate, parts["gate"], parts.get("features"))
    return new


def flat(gate: Gate, tensor: Tensor) -> Tensor:
    """A tapped gate tensor as (B, C), in the order of the channels that it scales."""
    rows = _rows(gate, tensor)
    start = _start(gate) if gate.order else -1
    if start >= 0:
        rows = rows[:, start : start + gate.channels]
    elif gate.order:
        rows = rows[:, list(gate.order)]
    return rows.reciprocal() if gate.divides else rows


def _through(gate: Gate, tensor: Tensor) -> tuple[Tensor, Tensor | None]:
    """The gate as (B, C) and, where there is a graph, the tapped tensor made from that."""
    gate_BC = flat(gate, tensor)
    if not gate_BC.requires_grad or gate_BC is tensor:
        return gate_BC, None
    rows, new = _rows(gate, tensor), gate_BC.reciprocal() if gate.divides else gate_BC
    if gate.order and (start := _start(gate)) >= 0:
        end = start + gate.channels
        new = torch.cat([rows[:, :start], new, rows[:, end:]], 1)
    elif gate.order:
        new = rows.index_copy(1, torch.tensor(gate.order, device=rows.device), new)
    dim = gate.tap.batch_dim if gate.tap else 0
    shape = tensor.movedim(dim, 0).shape
    return gate_BC, new.reshape(shape).movedim(0, dim)


def _rows(gate: Gate, tensor: Tensor) -> Tensor:
    dim = gate.tap.batch_dim if gate.tap else 0
    if dim:
        tensor = tensor.movedim(dim, 0)
    size = gate.size or gate.channels
    return tensor if tensor.dim() == 2 and tensor.shape[1] == size else tensor.reshape(-1, size)


def _start(gate: Gate) -> int:
    """Where a gate lies in one piece in the tapped tensor; -1 if it does not."""
    first = gate.order[0]
    return first if gate.order == tuple(range(first, first + gate.channels)) else -1
