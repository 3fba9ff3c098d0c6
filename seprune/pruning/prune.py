"""Carry a plan out: a new, smaller model, checked before it leaves the function."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from seprune.errors import InputError, first_line
from seprune.graph.groups import ChannelGroup, NetworkStructure, analyse
from seprune.graph.trace import record
from seprune.pruning.plan import PruningPlan, plan_of
from seprune.pruning.surgery import cut_layer
from seprune.runtime.inference import evaluating

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
            fix="plan on what `cuttable` finds, or protect that layer with plan.protect",
            code="uncuttable",
        ) from error


def apply(model: nn.Module, plan: PruningPlan) -> None:
    """Cut `model` itself as `plan` says (used on models that nobody else holds)."""
    _check(model, plan)
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
            found = _length(modules.get(member.layer), tensors.get(member.layer), member.side)
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
    name, _, index = side.removeprefix(".").partition("[")
    for attribute in _WIDTHS.get(side, (name,)):
        held = getattr(module, attribute, None)
        if isinstance(held, (list, tuple)):
            place = int(index[:-1]) if index else -1
            held = held[place] if place < len(held) else 0
        if isinstance(held, int) and not isinstance(held, bool):
            return held
    return 0


# -- what can be cut at all ---------------------------------------------------------------------


def cuttable(model: nn.Module, inputs: Any, *, limit_seconds: float = 60.0) -> NetworkStructure:
    """`analyse`, with every group that a trial cut proves impossible left whole and named.

    About half of every group is cut on a copy without data (meta device, where the model runs);
    the groups at a layer that fails, or those of them that fail alone, are left whole and the rest
    is tried again.
    """
    deadline = time.monotonic() + limit_seconds
    structure = analyse(model, inputs, limit_seconds=limit_seconds)
    trial = _Trial(model, inputs)
    groups = list(structure.groups)
    while (fault := trial.fault(groups)) is not None:
        layer, why = fault
        late = time.monotonic() > deadline
        blamed = _blamed(groups, "" if late else layer)
        if late:
            why = f"no time was left to look for what can be cut after this: {why}"
        if not blamed:
            raise InputError(
                "no channel group of this model can be cut",
                why=why,
                fix="use the model as it is, or report its architecture",
                code="uncuttable",
            )
        alone = [] if late else [i for i in blamed if trial.fault([groups[i]]) is not None]
        for number in alone or blamed:
            groups[number] = replace(groups[number], prunable=False, reason=why)
    return replace(structure, groups=tuple(groups))


def _blamed(groups: Sequence[ChannelGroup], layer: str) -> list[int]:
    """The prunable groups that have a side at the failing layer, or at the nearest parent."""
    while True:
        found = [
            i
            for i, g in enumerate(groups)
            if g.prunable and any(_under(m.layer, layer) for m in g.members)
        ]
        if found or not layer:
            return found
        layer = layer.rpartition(".")[0]


def _under(path: str, parent: str) -> bool:
    return not parent or path == parent or path.startswith(parent + ".")


class _Trial:
    """Cuts about half of every group from a copy of the model that holds no data, and runs it."""

    def __init__(self, model: nn.Module, inputs: Any) -> None:
        self.model, self.inputs = model, inputs
        self.device, self.shapes = "meta", None
        if isinstance(shapes := self._run(self._copy()), tuple):
            self.device = "cpu"
            shapes = self._run(self._copy())
        self.shapes = shapes

    def fault(self, groups: Sequence[ChannelGroup]) -> tuple[str, str] | None:
        """(layer, reason) of the first failure, or None."""
        keep = {g.name: _half(g.units) for g in groups if g.prunable}
        plan = plan_of(groups, keep, {})
        small = self._copy()
        for layer, sides in plan.layers().items():
            try:
                cut_layer(small, layer, {s: torch.from_numpy(k) for s, k in sides.items()})
            except InputError as error:
                return layer, error.what
            except Exception as error:  # a stranger's layer decides what it raises
                where = f"layer '{layer or 'the model'}' cannot be cut"
                return layer, f"{where}: {first_line(error)}"
        found = self._run(small)
        if isinstance(found, tuple):
            return found
        if self.device == "meta" and found != self.shapes:  # shapes that no value decides
            return "", f"a trial cut changes the output from {self.shapes} to {found}"
        return None

    def _copy(self) -> nn.Module:
        if self.device != "meta":
            return copy.deepcopy(self.model).cpu()
        memo: dict[int, Any] = {}
        tensors = [*self.model.parameters(), *self.model.buffers()]
        for tensor in tensors:
            empty = torch.empty_like(tensor, device="meta")
            is_parameter = isinstance(tensor, nn.Parameter)
            memo[id(tensor)] = nn.Parameter(empty, tensor.requires_grad) if is_parameter else empty
        return copy.deepcopy(self.model, memo)

    def _run(self, model: nn.Module) -> tuple[str, str] | list[list[int]]:
        """The shapes of the outputs, or (layer, reason) of what fails."""
        inputs = tree_map(lambda t: t.to(self.device) if isinstance(t, Tensor) else t, self.inputs)
        arguments = inputs if isinstance(inputs, tuple) else (inputs,)
        with evaluating(model), torch.no_grad(), _where(model) as stack:
            try:
                outputs = model(*arguments)
            except Exception as error:  # the stranger's forward decides what it raises
                layer = stack[-1] if stack else ""
                where = f"layer {layer}" if layer else "the model"
                return layer, f"a trial cut fails in {where}: {first_line(error)}"
        return [list(t.shape) for t in tree_leaves(outputs) if isinstance(t, Tensor)]


def _half(units: int) -> list[int]:
    """About half of the units, spread; no divisor of their number: sizes in code then show up."""
    count = next((k for k in range(units // 2 + 1, units) if math.gcd(k, units) == 1), 1)
    return [i * units // count for i in range(count)]


@contextmanager
def _where(model: nn.Module) -> Iterator[list[str]]:
    """The paths of the modules that are running; a forward that raises leaves its path on."""
    stack: list[str] = []
    handles = []

    def leave(*_: Any) -> None:  # what a hook returns would replace the output
        stack.pop()

    for name, module in model.named_modules():
        if not isinstance(module, torch.jit.ScriptModule):  # it takes no hooks
            enter = partial(_enter, stack, name)
            handles.append(module.register_forward_pre_hook(enter))
            handles.append(module.register_forward_hook(leave))
    try:
        yield stack
    finally:
        for handle in handles:
            handle.remove()


def _enter(stack: list[str], name: str, *_: Any) -> None:
    stack.append(name)
