"""Read every gate, and the feature map it scales, while a model runs.

Forward hooks on the modules found once by `gates.find_gates`; only a gate that no module returns
(functional code) needs a look at the functions of its own block.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from seprune.gates import Gate, Tap

GateCallback = Callable[[Gate, Tensor, Tensor | None], None]
TensorCallback = Callable[[Tensor], None]


@contextmanager
def watch(model: nn.Module, gates: Sequence[Gate], callback: GateCallback) -> Iterator[None]:
    """Call `callback(gate, gate_BC, features)` for every gate in every forward.

    `gate_BC` has shape (B, C) and is part of the autograd graph; `features` is the (B, C, *) map
    before the gate is applied, or None where no module and no function shows it. All hooks are
    removed at the end, whatever happens inside.
    """
    pending: dict[str, dict[str, Tensor]] = {}
    taps: list[tuple[Tap, TensorCallback]] = []
    for gate in gates:
        if gate.tap is None:
            continue
        taps.append((gate.tap, _receiver(gate, "gate", pending, callback)))
        if gate.features is not None:
            taps.append((gate.features, _receiver(gate, "features", pending, callback)))
    with tapped(model, taps):
        yield


@contextmanager
def tapped(model: nn.Module, taps: Sequence[tuple[Tap, TensorCallback]]) -> Iterator[None]:
    """Hand the tensor at every tap to its callback in every forward of `model`."""
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
    modes: list[_Functions] = []

    def enter(module: nn.Module, args: Any, kwargs: Any) -> None:
        call = calls.get(name, 0)
        calls[name] = call + 1
        _give(wanted, call, "input", (args, kwargs))
        functions = {t.index: g for t, g in wanted if t.kind == "function" and t.call == call}
        if functions:
            modes.append(_Functions(functions))
            modes[-1].__enter__()

    def leave(module: nn.Module, args: Any, output: Any) -> None:
        if modes:
            modes.pop().__exit__(None, None, None)
        if output is not None:
            _give(wanted, calls[name] - 1, "output", output)

    # always_call: a forward that raises must not leave its function mode behind
    return [
        module.register_forward_pre_hook(enter, with_kwargs=True),
        module.register_forward_hook(leave, always_call=True),
    ]


def _give(wanted: list[tuple[Tap, TensorCallback]], call: int, kind: str, tree: Any) -> None:
    leaves = None
    for tap, give in wanted:
        if tap.call == call and tap.kind == kind:
            if leaves is None:
                leaves = [t for t in tree_leaves(tree) if isinstance(t, Tensor)]
            with torch._C.DisableTorchFunction():
                give(leaves[tap.index])


class _Functions(TorchFunctionMode):
    """Counts the torch functions of one module call as `trace` did, and hands some results on."""

    def __init__(self, wanted: dict[int, TensorCallback]) -> None:
        super().__init__()
        self.wanted = wanted
        self.count = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor):
            self.count += 1
            give = self.wanted.get(self.count)
            if give is not None:
                with torch._C.DisableTorchFunction():
                    give(result)
        return result


def _receiver(
    gate: Gate, part: str, pending: dict[str, dict[str, Tensor]], callback: GateCallback
) -> TensorCallback:
    """Collect a gate and its features, whichever comes first, and report them together."""

    def receive(tensor: Tensor) -> None:
        held = pending.setdefault(gate.name, {})
        held[part] = tensor
        if len(held) == (2 if gate.features is not None else 1):
            del pending[gate.name]
            callback(gate, flat(gate, held["gate"]), held.get("features"))

    return receive


def flat(gate: Gate, tensor: Tensor) -> Tensor:
    """A tapped gate tensor as (B, C), in the order of the channels that it scales."""
    if not gate.order:
        return tensor.reshape(-1, gate.channels)
    rows = tensor.reshape(tensor.shape[0], -1)
    first = gate.order[0]
    if gate.order == tuple(range(first, first + gate.channels)):
        return rows[:, first : first + gate.channels]
    return rows[:, list(gate.order)]
