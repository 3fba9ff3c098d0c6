"""Gates that are held at their mean and blocks that are left out, as a plan has them."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

import torch
from torch import nn

from seprune.errors import InputError
from seprune.runtime.text import within


@dataclass(frozen=True)
class FrozenGate:
    """A gate module that is taken out: the mean of its gate scales a neighbouring layer.

    Attributes:
        mean: of the gate by channel, over the calibration set.
        layer, side: what holds it: a layer's outputs (`out`) or its weights by input (`in`).
    """

    module: str
    layer: str
    side: Literal["in", "out"]
    mean: tuple[float, ...]

    def __post_init__(self) -> None:
        if not all(map(math.isfinite, self.mean)):
            raise ValueError(f"the mean of gate {self.module} is not finite")


@dataclass(frozen=True)
class Part:
    """A module that a plan may take out.

    Attributes:
        name: tells it from the dependency groups in a search.
        loss: of taking it out, in the currency of additive scores.
        gate: how its gate is held, None for a block.
    """

    name: str
    module: str
    loss: float
    gate: FrozenGate | None = None


@dataclass(frozen=True)
class Removals:
    """Modules that a plan takes out as a whole: each then returns its input."""

    gates: tuple[FrozenGate, ...] = ()
    blocks: tuple[str, ...] = ()

    def __bool__(self) -> bool:
        return bool(self.gates or self.blocks)

    @property
    def modules(self) -> tuple[str, ...]:
        """Paths of everything that is taken out."""
        return (*(g.module for g in self.gates), *self.blocks)

    def names(self) -> dict[str, list[str]]:
        """The modules by kind, where there are any."""
        return (
            {"gates": [g.module for g in self.gates], "blocks": list(self.blocks)} if self else {}
        )

    def covers(self, layer: str) -> bool:
        """Whether a layer lies in something that is taken out."""
        return any(within(layer, module) for module in self.modules)

    def with_unit_means(self) -> Removals:
        """The same with every gate held at 1: what is left takes as long, and no layer changes."""
        gates = (replace(gate, mean=(1.0,) * len(gate.mean)) for gate in self.gates)
        return replace(self, gates=tuple(gates))

    @classmethod
    def of_parts(cls, parts: Iterable[Part]) -> Removals:
        """What takes these parts out."""
        parts = list(parts)
        gates = tuple(part.gate for part in parts if part.gate is not None)
        return cls(gates, tuple(part.module for part in parts if part.gate is None))

    def plain(self) -> dict[str, Any]:
        """As JSON."""
        gates = [asdict(gate) | {"mean": list(gate.mean)} for gate in self.gates]
        return {"gates": gates, "blocks": list(self.blocks)}


def take_out(model: nn.Module, removed: Removals) -> None:
    """Fold gates into their layers, and let every module that goes return its input, in place.

    Raises:
        InputError: the model has no such module, or a layer of another width.
    """
    modules = dict(model.named_modules())
    for gate in removed.gates:
        layer = modules.get(gate.layer)
        if gate.module not in modules or layer is None:
            raise _misfit(f"there is no '{gate.layer if gate.module in modules else gate.module}'")
        if not any(within(gate.module, block) for block in removed.blocks):
            _fold(gate, layer)
    for name in sorted(removed.modules, key=len, reverse=True):
        if not name or name not in modules:
            raise _misfit(f"there is no '{name}'")
        model.set_submodule(name, nn.Identity())


@torch.no_grad()
def _fold(gate: FrozenGate, layer: nn.Module) -> None:
    """Scale a convolution or a norm by the mean of a gate."""
    weight, bias = getattr(layer, "weight", None), getattr(layer, "bias", None)
    dim = 1 if gate.side == "in" else 0
    fits = isinstance(weight, torch.Tensor) and weight.dim() > dim
    if not fits or weight is None or weight.shape[dim] != len(gate.mean):
        raise _misfit(f"'{gate.layer}' has no {len(gate.mean)} channels on side {gate.side}")
    factor = torch.tensor(gate.mean, dtype=weight.dtype, device=weight.device)
    shape = [-1 if d == dim else 1 for d in range(weight.dim())]
    weight.mul_(factor.view(shape))
    if gate.side == "out" and isinstance(bias, torch.Tensor):
        bias.mul_(factor)


def _misfit(why: str) -> InputError:
    return InputError(
        "the plan does not fit the model: gates and blocks that it takes out",
        why=why,
        fix="use the model that the plan was made for",
        code="plan",
    )
