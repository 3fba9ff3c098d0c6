"""`analyse`: what a network is made of, and which of it a trial cut shows can be removed."""

from __future__ import annotations

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
from seprune.graph.groups import (
    ChannelGroup,
    NetworkStructure,
    SizeMembers,
    find_sized_structure,
)
from seprune.graph.sizes import SizeTrial
from seprune.pruning.plan import PruningPlan, plan_of
from seprune.pruning.surgery import cut_layer
from seprune.pruning.value_check import checked_by_values
from seprune.runtime.inference import evaluating
from seprune.runtime.module_copy import copy_module
from seprune.runtime.timeout import Deadline
from seprune.statistics.states import require_eager


def analyse(model: nn.Module, inputs: Any, *, limit_seconds: float = 60.0) -> NetworkStructure:
    """Gates, dependency groups and exact costs of `model`; what cannot be cut is named.

    One forward pass is recorded. Groups that a trial cut proves impossible are not pruned with the
    reason: about half of every group is cut on a copy without data (meta device, where the model
    runs); the groups at a layer that fails, or those of them that fail alone, are not pruned and
    the rest is tried again. Then copies that are cut by random plans are compared with their
    masked parents in numbers: groups at an operator that differs are not pruned, or have a caveat
    where the operator looks across channels by nature (a norm, a softmax).

    Args:
        inputs: one batch (two samples are enough), or a tuple of positional arguments.
        limit_seconds: of processor time for the forward pass, and again for the trial cuts.

    Raises:
        InputError: the forward fails or does not end (names the layer), nothing can be cut, or a
            model that was compiled.
    """
    require_eager(model)
    start, deadline = time.thread_time(), Deadline(limit_seconds)
    structure, sizes = find_sized_structure(model, inputs, limit_seconds=limit_seconds)
    trial = _Trial(model, inputs, sizes)
    groups = [g if g.prunable else g.not_pruned(g.reason) for g in structure.groups]
    while (fault := trial.fault(groups)) is not None:
        layer, why = fault
        late = deadline.left() <= 0
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
            groups[number] = groups[number].not_pruned(why)
    groups = [trial.with_sizes(g) if g.prunable else g for g in groups]
    seconds = min(time.thread_time() - start, deadline.left())
    groups = checked_by_values(model, inputs, groups, seconds=seconds)
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

    def __init__(self, model: nn.Module, inputs: Any, sizes: SizeMembers) -> None:
        self.model, self.inputs, self.sizes = model, inputs, sizes
        self.written: dict[tuple[str, str], None] = {}  # sizes that do not follow by themselves
        self.device, self.shapes = "meta", None
        if isinstance(shapes := self._run(self._copy()), tuple):
            self.device = "cpu"
            shapes = self._run(self._copy())
        self.shapes = shapes

    def fault(self, groups: Sequence[ChannelGroup]) -> tuple[str, str] | None:
        """(layer, reason) of the first failure, or None."""
        keep = {g.name: _half(g.units, n) for n, g in enumerate(groups) if g.prunable}
        plan = plan_of(groups, keep, {})
        small = self._copy()
        for layer, sides in plan.layers().items():
            try:
                cut_layer(small, layer, {s: torch.from_numpy(k) for s, k in sides.items()})
            except InputError as error:
                return layer, error.what
            except Exception as error:  # a user's layer decides what it raises
                where = f"layer '{layer or 'the model'}' cannot be cut"
                return layer, f"{where}: {first_line(error)}"
        found = self._run(small, plan)
        if isinstance(found, tuple):
            return found
        if self.device == "meta" and found != self.shapes:  # shapes that no value decides
            return "", f"a trial cut changes the output from {self.shapes} to {found}"
        return None

    def _copy(self) -> nn.Module:
        if self.device != "meta":
            return copy_module(self.model).cpu()
        memo: dict[int, Any] = {}
        tensors = [*self.model.parameters(), *self.model.buffers()]
        for tensor in tensors:
            empty = torch.empty_like(tensor, device="meta")
            is_parameter = isinstance(tensor, nn.Parameter)
            memo[id(tensor)] = nn.Parameter(empty, tensor.requires_grad) if is_parameter else empty
        return copy_module(self.model, memo)

    def with_sizes(self, group: ChannelGroup) -> ChannelGroup:
        """The group with the sizes in the forward that have to be changed with its width."""
        found = [self.sizes[key].get(group.name) for key in self.written]
        return replace(group, members=(*group.members, *(m for m in found if m is not None)))

    def _right_sizes(self, plan: PruningPlan) -> SizeTrial:
        """What finds the sizes that are written down, and sets them right for this pass."""
        units = {g.name: (g.units, len(g.keep)) for g in plan.groups}
        expected = {}
        for key, members in self.sizes.items():
            total = next(iter(members.values())).total
            gone = sum(
                m.index.shape[1] * (units[name][0] - units[name][1])
                for name, m in members.items()
                if name in units
            )
            expected[key] = total - gone
        return SizeTrial(expected)

    def _run(
        self, model: nn.Module, plan: PruningPlan | None = None
    ) -> tuple[str, str] | list[list[int]]:
        """The shapes of the outputs, or (layer, reason) of what fails."""
        sizes = self._right_sizes(plan or PruningPlan((), {}))
        inputs = tree_map(lambda t: t.to(self.device) if isinstance(t, Tensor) else t, self.inputs)
        arguments = inputs if isinstance(inputs, tuple) else (inputs,)
        with evaluating(model), torch.no_grad(), _where(model) as stack:
            try:
                with sizes.over(model):
                    outputs = model(*arguments)
            except Exception as error:  # the user's forward decides what it raises
                layer = stack[-1] if stack else ""
                where = f"layer {layer}" if layer else "the model"
                return layer, f"a trial cut fails in {where}: {first_line(error)}"
            finally:
                self.written |= sizes.noted
        return [list(t.shape) for t in tree_leaves(outputs) if isinstance(t, Tensor)]


def _half(units: int, number: int) -> list[int]:
    """About half of the units, spread; no divisor of their number: sizes in code then show up.

    Args:
        number: of the group. Groups of one width keep different counts, so that a size which is
            read from the map of one and written into a call for another shows up too.
    """
    counts = [k for k in range(units // 2 + 1, units) if math.gcd(k, units) == 1] or [1]
    count = counts[number % len(counts)]
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
