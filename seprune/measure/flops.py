"""What a network costs: multiply-adds and parameters, exact integers."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from seprune.errors import InputError, first_line

if TYPE_CHECKING:
    import torch
    from torch import nn


@dataclass(frozen=True)
class Cost:
    """Exact integers for one image: multiply-adds (FLOPs = 2 x MACs) and parameters."""

    macs: int
    params: int


def count(model: nn.Module, inputs: torch.Tensor | tuple[Any, ...]) -> Cost:
    """MACs (`FlopCounterMode` / 2) for the first image of `inputs`, and parameters.

    Raises:
        InputError: the model does not run on `inputs`.
    """
    from torch.utils.flop_counter import FlopCounterMode

    counter = FlopCounterMode(display=False)
    counter.mod_tracker = _NoTracker()  # type: ignore[assignment]
    with quietly(model), counter:
        _forward(model, inputs)
    params = sum(p.numel() for p in model.parameters())
    return Cost(macs=counter.get_total_flops() // 2, params=params)


class _NoTracker:
    """In the place of torch's tracker of modules, whose hooks fail at a parameter's views."""

    parents = frozenset(("Global",))

    def __enter__(self) -> None: ...

    def __exit__(self) -> None: ...


def not_counted(model: nn.Module, inputs: torch.Tensor | tuple[Any, ...]) -> list[str]:
    """Operators that ran and computed but have no MAC formula, sorted by name."""
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils.flop_counter import flop_registry

    seen: set[str] = set()

    class Listen(TorchDispatchMode):  # type: ignore[no-untyped-call]
        def __torch_dispatch__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            if func.overloadpacket not in flop_registry and not func.is_view:
                seen.add(str(func.overloadpacket))
            return func(*args, **(kwargs or {}))

    with quietly(model), Listen():  # type: ignore[no-untyped-call]
        _forward(model, inputs)
    return sorted(seen - _MOVES)


_MOVES = {f"aten.{name}" for name in ("cat", "clone", "copy_", "empty", "empty_like", "zeros")}


@contextlib.contextmanager
def quietly(model: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients; every module's own mode comes back."""
    import torch

    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, training in modes.items():
            module.training = training


def _forward(model: nn.Module, inputs: torch.Tensor | tuple[Any, ...]) -> None:
    from seprune.tasks.batches import leaves, to_device

    weight = next(model.parameters(), None)
    values = [_first(value) for value in (inputs if isinstance(inputs, tuple) else (inputs,))]
    if weight is not None:
        values = to_device(values, weight.device)
    try:
        model(*values)
    except (RuntimeError, ValueError, TypeError) as error:
        shapes = ", ".join(str(tuple(tensor.shape)) for tensor in leaves(values))
        raise InputError(
            f"{type(model).__name__} does not run on an input of shape {shapes}",
            why=first_line(error),
            fix="give the input shape that the network was made for: --input 3x224x224",
        ) from error


def _first(value: Any) -> Any:
    """What of an argument belongs to the first sample; single images are listed (C, H, W)."""
    from torch import Tensor

    from seprune.tasks.batches import map_tensors

    listed = isinstance(value, list) and all(isinstance(v, Tensor) and v.dim() == 3 for v in value)
    if listed:
        return value[:1]
    return map_tensors(value, lambda tensor: tensor[:1] if tensor.dim() else tensor)
