"""Carry a plan out: a new, smaller model, checked before it leaves the function."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from seprune.cut import cut_layer
from seprune.errors import InputError
from seprune.groups import ChannelGroup, Structure, analyse
from seprune.plan import PruningPlan, plan_of
from seprune.trace import evaluating, record


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
        record(small, inputs)
    return small


def apply(model: nn.Module, plan: PruningPlan) -> None:
    """Cut `model` itself as `plan` says (used on models that nobody else holds)."""
    _check(model, plan)
    for layer, sides in plan.layers().items():
        cut_layer(model, layer, {s: torch.from_numpy(k) for s, k in sides.items()})


def _check(model: nn.Module, plan: PruningPlan) -> None:
    """Refuse a plan for another model before the first layer is touched."""
    modules, tensors = dict(model.named_modules()), dict(model.named_parameters())
    tensors |= dict(model.named_buffers())
    for group in plan.groups:
        for member in group.members:
            found = _length(modules.get(member.layer), tensors.get(member.layer), member.side)
            if found is not None and found != member.total:
                raise InputError(
                    f"the plan does not fit the model: layer '{member.layer}'",
                    why=f"the plan expects {member.total} on side '{member.side}', "
                    f"the model has {found or 'no such layer'}",
                    fix="use the model that the plan was made for",
                    code="plan",
                )


def _length(module: nn.Module | None, tensor: Tensor | None, side: str) -> int | None:
    """How many positions a side has now; 0 if the layer is missing, None if it is not counted."""
    if side.startswith("dim"):
        return tensor.shape[int(side[3:])] if tensor is not None else 0
    if module is None:
        return 0
    names = {"out": ("out_channels", "out_features", "num_features", "num_channels"),
             "in": ("in_channels", "in_features")}.get(side, ())  # fmt: skip
    for name in names:
        if isinstance(held := getattr(module, name, None), int):
            return held
    return None


# -- what can be cut at all ---------------------------------------------------------------------


def cuttable(model: nn.Module, inputs: Any, *, limit_seconds: float = 60.0) -> Structure:
    """`analyse`, with every group that a trial cut proves impossible left whole and named.

    Half of every group is cut on a copy without data (meta device where the model runs there);
    groups at a layer that fails are left whole and the rest is tried again.
    """
    structure = analyse(model, inputs, limit_seconds=limit_seconds)
    trial = _Trial(model, inputs)
    groups = list(structure.groups)
    for _ in range(len(groups) + 1):
        fault = trial.fault(groups)
        if fault is None:
            return replace(structure, groups=tuple(groups))
        layer, why = fault
        blamed = _blamed(groups, layer)
        if not blamed:
            break
        for number in blamed:
            groups[number] = replace(groups[number], prunable=False, reason=why)
    raise InputError(
        "no channel group of this model can be cut",
        why=why,
        fix="use the model as it is, or report its architecture",
        code="uncuttable",
    )


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
    """Cuts half of every group from a copy of the model that holds no data, and runs it."""

    def __init__(self, model: nn.Module, inputs: Any) -> None:
        self.model, self.inputs = model, inputs
        self.device = "meta"
        if self._run(self._copy()) is not None:
            self.device = "cpu"

    def fault(self, groups: Sequence[ChannelGroup]) -> tuple[str, str] | None:
        """(layer, reason) of the first failure, or None."""
        keep = {g.name: range(0, g.units, 2) for g in groups if g.prunable and g.units > 1}
        plan = plan_of(groups, keep, {})
        small = self._copy()
        for layer, sides in plan.layers().items():
            try:
                cut_layer(small, layer, {s: torch.from_numpy(k) for s, k in sides.items()})
            except (InputError, RuntimeError, AttributeError, TypeError) as error:
                return layer, f"layer {layer} cannot be cut: {_first_line(error)}"
        return self._run(small)

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

    def _run(self, model: nn.Module) -> tuple[str, str] | None:
        inputs = tree_map(lambda t: t.to(self.device) if isinstance(t, Tensor) else t, self.inputs)
        arguments = inputs if isinstance(inputs, tuple) else (inputs,)
        with evaluating(model), torch.no_grad(), _where(model) as stack:
            try:
                model(*arguments)
            except Exception as error:  # the stranger's forward decides what it raises
                layer = stack[-1] if stack else ""
                return layer, f"a trial cut fails in layer {layer}: {_first_line(error)}"
        return None


@contextmanager
def _where(model: nn.Module) -> Iterator[list[str]]:
    """The paths of the modules that are running; a forward that raises leaves its path on."""
    stack: list[str] = []
    handles = []
    for name, module in model.named_modules():
        handles.append(module.register_forward_pre_hook(lambda *_, name=name: stack.append(name)))
        handles.append(module.register_forward_hook(lambda *_: stack.pop() and None))
    try:
        yield stack
    finally:
        for handle in handles:
            handle.remove()


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
