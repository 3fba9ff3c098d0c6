"""Carry a plan out: a new, smaller model, checked before it leaves the function."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from seprune.errors import InputError
from seprune.graph.sizes import is_size, size_set
from seprune.graph.trace import record
from seprune.pruning.plan import PruningPlan
from seprune.pruning.removals import take_out
from seprune.pruning.surgery import cut_layer

_PLANS = "_seprune_plans"  # in the module's own dict, so that copies of the module have it too


def prune(model: nn.Module, plan: PruningPlan, inputs: Any = None) -> nn.Module:
    """A copy of `model` without the channels that `plan` removes.

    Args:
        inputs: one batch; when given, the cut network is run on it before it is returned.

    Raises:
        InputError: the plan does not fit the model, or the cut network does not run.
    """
    small = copy.deepcopy(model)
    apply(small, plan)
    if inputs is not None:
        _run(small, inputs)
    return small


def _run(small: nn.Module, inputs: Any) -> None:
    try:
        record(small, inputs)
    except InputError as error:
        raise InputError(
            f"the cut network does not run: {error.what}",
            why=error.why,
            fix="plan on what `seprune.analyse` finds, or protect that layer with plan.protect",
            code="uncuttable",
        ) from error


def apply(model: nn.Module, plan: PruningPlan) -> None:
    """Cut `model` itself as `plan` says (used on models that nobody else holds)."""
    _check(model, plan)
    take_out(model, plan.removed)
    with tied(model):
        for layer, sides in plan.layers().items():
            cut_layer(model, layer, {s: torch.from_numpy(k) for s, k in sides.items()})
    vars(model)[_PLANS] = (*plans_of(model), plan)


def plans_of(model: nn.Module) -> tuple[PruningPlan, ...]:
    """The plans that have been applied to `model` and to what it was copied from, in order."""
    plans: tuple[PruningPlan, ...] = vars(model).get(_PLANS, ())
    return plans


@contextmanager
def tied(model: nn.Module) -> Iterator[None]:
    """Layers that shared one parameter share one afterwards."""
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    yield
    for first, *others in names.values():
        parameter = model.get_parameter(first)
        for name in others:
            owner, _, leaf = name.rpartition(".")
            if model.get_parameter(name).shape == parameter.shape:
                setattr(model.get_submodule(owner), leaf, parameter)


def _check(model: nn.Module, plan: PruningPlan) -> None:
    """Refuse a plan for another model before the first layer is touched."""
    modules = dict(model.named_modules())
    tensors: dict[str, Tensor] = {**dict(model.named_buffers()), **dict(model.named_parameters())}
    for group in plan.groups:
        for member in group.members if len(group.keep) < group.units else ():
            module = modules.get(member.layer)
            if is_size(member.side) and module is not None:
                found = size_set(module, member.side) or member.total
            else:
                found = _length(module, tensors.get(member.layer), member.side)
            if found != member.total:
                raise InputError(
                    f"the plan does not fit the model: layer '{member.layer}'",
                    why=f"the plan expects {member.total} on side '{member.side}', "
                    f"the model has {found or 'no such layer'}",
                    fix="use the model that the plan was made for",
                    code="plan",
                )


_WIDTHS = {
    "out": ("out_channels", "out_features", "num_features", "num_channels", "normalized_shape"),
    "in": ("in_channels", "in_features"),
}


def _length(module: nn.Module | None, tensor: Tensor | None, side: str) -> int:
    """How many positions a side has now; 0 if there is no such side."""
    if side.startswith("dim"):
        dim = int(side[3:])
        return tensor.shape[dim] if tensor is not None and dim < tensor.dim() else 0
    for attribute in _WIDTHS.get(side, ()):
        width = getattr(module, attribute, None)
        if isinstance(width, (list, tuple)):
            width = width[-1]
        if isinstance(width, int):
            return width
    return 0
