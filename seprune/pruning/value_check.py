"""Whether cut networks compute what their parents compute without the removed channels.

Shapes do not show that a cut network reads the right channels. A copy in float64 is cut by random
plans and compared with its masked parent; where the outputs differ, `compare_passes` finds the
operators.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from seprune.errors import first_line
from seprune.graph.channel_ids import ChannelIds
from seprune.graph.groups import ChannelGroup
from seprune.graph.op_rules import assign_channel_ids
from seprune.graph.trace import Trace, record
from seprune.pruning.compare_passes import Capture, Channels, Compare, Finding, same, tensors_of
from seprune.pruning.masked_parent import checkable, mask_
from seprune.pruning.plan import PruningPlan, plan_of
from seprune.pruning.surgery import cut_layer
from seprune.runtime.inference import evaluating
from seprune.runtime.module_copy import copy_module
from seprune.runtime.random_state import cpu_random
from seprune.runtime.timeout import Deadline

PLANS = 2  # random plans without a difference, and the check ends
ONE_BY_ONE = 8  # plans of which one wrong operator is taken, for it may be the cause of others
MOST_PLANS = 40
_ROUNDING = 1e-10  # of float64, relative to the largest output


def checked_by_values(
    model: nn.Module, inputs: Any, groups: Sequence[ChannelGroup], *, seconds: float
) -> list[ChannelGroup]:
    """The groups with a reason or a caveat where cut copies differ from their masked parents.

    Args:
        seconds: of processor time, after which no further plan is tried unless the last one
            showed a difference; two are, always.
    """
    check, checked, deadline = ValueCheck(model, inputs), list(groups), Deadline(seconds)
    seed, clean = 0, 0
    while clean < PLANS and (seed < 2 or not clean or deadline.left() > 0):
        findings = check.findings(checked, seed)
        wrong = [f for f in findings if not f.by_nature]
        if seed < ONE_BY_ONE:
            wrong = wrong[:1]
        for finding in wrong or findings:
            checked = [_marked(g, finding) if g.name in finding.groups else g for g in checked]
        clean = 0 if wrong else clean + 1
        seed += 1
        if seed > MOST_PLANS and wrong:
            why = f"{seed} trial cuts one after another give other values"
            return [_marked(g, Finding((), "the model", why, by_nature=False)) for g in checked]
    return _behind(check, checked, seed)


def _behind(check: ValueCheck, checked: list[ChannelGroup], seed: int) -> list[ChannelGroup]:
    """The same for operators behind one that looks across channels, where all values differ.

    Groups with a caveat stay whole meanwhile.
    """
    for number in range(seed, seed + MOST_PLANS):
        plain = [g for g in checked if not g.caveat]
        if len(plain) == len(checked) or not (findings := check.findings(plain, number)):
            break
        for finding in findings:
            checked = [_marked(g, finding) if g.name in finding.groups else g for g in checked]
    return checked


def _marked(group: ChannelGroup, finding: Finding) -> ChannelGroup:
    if not group.prunable:
        return group
    if finding.by_nature:
        caveat = f"{finding.operator} looks across channels: a cut network is not its masked parent"
        return replace(group, caveat=group.caveat or caveat)
    why = f"a trial cut gives other values at {finding.operator}: {finding.why}"
    return group.not_pruned(why)


class ValueCheck:
    """Compares cut copies of `model` with masked ones on `inputs`, in float64 on the CPU."""

    def __init__(self, model: nn.Module, inputs: Any) -> None:
        self.model = checkable(model)
        inputs = tree_map(lambda t: _double(t) if isinstance(t, Tensor) else t, inputs)
        self.inputs = inputs if isinstance(inputs, tuple) else (inputs,)
        self.probe = self._one_sample()
        self._recorded: tuple[Trace, ChannelIds] | None = None

    def findings(self, groups: Sequence[ChannelGroup], seed: int) -> list[Finding]:
        """Where a network cut by a random plan differs from its masked parent; empty if nowhere.

        A difference that goes when the weights that make the removed channels are zero as well is
        one of an operator that looks across channels.
        """
        plan = random_plan(groups, seed)
        if not plan.layers():
            return []
        try:
            small = self._cut(plan)
            cut = self._outputs(small)
        except Exception as error:  # foreign code decides what it raises
            return self._alone(groups, seed, first_line(error))
        reads, made = self._masked(plan, producers=False), self._masked(plan, producers=True)
        if same(wanted := self._outputs(reads), cut, _ROUNDING):
            return []
        if same(wanted, cut):  # an operator across channels may matter little so far from the end
            compared = self._located(reads, small, (groups, plan))
            return [f for f in compared.findings if f.by_nature] if compared else []
        silent = self._outputs(made)
        across = same(silent, cut)
        usable = all(bool(t.isfinite().all()) for t in silent)  # it may divide by a norm of weights
        parent = made if usable and not across else reads
        compared = self._located(parent, small, (groups, plan))
        found = compared.findings if compared else []
        if across:
            return [replace(finding, by_nature=True) for finding in found]
        if compared and compared.right:  # a last bit has decided which boxes a detector picks
            return []
        return found or self._alone(groups, seed, "its outputs change")

    def _one_sample(self) -> tuple[Any, ...]:
        """The first sample alone, which takes half the time; both where the model needs them."""
        if not all(map(_batches, self.inputs)):
            return self.inputs
        probe = tuple(t[:1].clone() if isinstance(t, Tensor) else t[:1] for t in self.inputs)
        try:
            self._outputs(self.model, inputs=probe)
        except Exception:  # a model that folds or compares samples
            return self.inputs
        return probe

    def _cut(self, plan: PruningPlan) -> nn.Module:
        small = copy_module(self.model)
        for layer, sides in plan.layers().items():
            cut_layer(small, layer, {s: torch.from_numpy(k) for s, k in sides.items()})
        return small

    def _masked(self, plan: PruningPlan, *, producers: bool) -> nn.Module:
        parent = copy_module(self.model)
        mask_(parent, plan, producers=producers)
        return parent

    def _alone(self, groups: Sequence[ChannelGroup], seed: int, why: str) -> list[Finding]:
        """The groups that fail when they are cut alone; all of them if none does."""
        free = [g for g in groups if g.prunable]
        names = tuple(g.name for g in free if self._wrong_alone(g, seed))
        return [Finding(names or tuple(g.name for g in free), "the model", why, False)]

    def _wrong_alone(self, group: ChannelGroup, seed: int) -> bool:
        plan = random_plan([group], seed)
        if not plan.layers():
            return False
        try:
            cut = self._outputs(self._cut(plan))
        except Exception:  # foreign code decides what it raises
            return True
        parents = (self._masked(plan, producers=producers) for producers in (False, True))
        return not any(same(self._outputs(parent), cut) for parent in parents)

    def _outputs(
        self,
        model: nn.Module,
        mode: AbstractContextManager[Any] | None = None,
        inputs: tuple[Any, ...] | None = None,
    ) -> list[Tensor]:
        inputs = copy.deepcopy(self.probe if inputs is None else inputs)
        with evaluating(model), torch.no_grad(), cpu_random(0), mode or nullcontext():
            outputs = model(*inputs)
        return tensors_of(outputs)

    def _located(
        self, parent: nn.Module, small: nn.Module, cut: tuple[Sequence[ChannelGroup], PruningPlan]
    ) -> Compare | None:
        """What the passes have in common; None where they cannot be laid side by side."""
        try:
            return self._locate(parent, small, cut)
        except (RuntimeError, IndexError, ValueError, KeyError, TypeError):
            return None

    def _locate(
        self, parent: nn.Module, small: nn.Module, cut: tuple[Sequence[ChannelGroup], PruningPlan]
    ) -> Compare:
        if self._recorded is None:
            trace = record(self.model, copy.deepcopy(self.inputs))
            self._recorded = trace, assign_channel_ids(trace, self.model)
        captured = Capture()
        self._outputs(small, captured, self.inputs)
        compared = Compare(Channels(*self._recorded, *cut), captured.calls)
        self._outputs(parent, compared, self.inputs)
        return compared


def _batches(value: Any) -> bool:
    """Whether a value is a batch of several samples: a tensor, or a list of images."""
    listed = isinstance(value, (list, tuple)) and all(isinstance(t, Tensor) for t in value)
    return (listed or (isinstance(value, Tensor) and value.dim() > 1)) and len(value) > 1


def _double(tensor: Tensor) -> Tensor:
    tensor = tensor.detach().cpu()
    return tensor.double() if tensor.is_floating_point() else tensor


def random_plan(groups: Sequence[ChannelGroup], seed: int) -> PruningPlan:
    """A plan that removes random units of every prunable group.

    Even seeds remove a quarter to half, odd ones about an eighth, which leaves signals alive that
    many small cuts one after another take out.
    """
    draw = np.random.default_rng(seed)
    least, largest = (0.85, 0.95) if seed % 2 else (0.5, 0.75)
    keep = {}
    for group in groups:
        if group.prunable:
            most = max(group.units - 1, 1)
            count = min(most, int(group.units * draw.uniform(least, largest)) or 1)
            keep[group.name] = sorted(draw.permutation(group.units)[:count].tolist())
    return plan_of(groups, keep, {})
