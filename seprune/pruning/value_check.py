"""Whether cut networks compute what their parents compute without the removed channels.

Shapes do not show that a cut network reads the right channels. A copy in float64 is cut by random
plans and compared with its masked parent. Where the outputs differ, both passes are compared
operator by operator: each operator of the parent gets the values that the cut network has, so that
one difference does not hide the next.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from seprune.errors import first_line
from seprune.graph.channel_ids import ChannelIds, along, compact, solve
from seprune.graph.groups import ChannelGroup
from seprune.graph.op_rules import assign_channel_ids
from seprune.graph.trace import Node, Trace, record
from seprune.pruning.masked_parent import checkable, mask_
from seprune.pruning.plan import PruningPlan, plan_of
from seprune.pruning.surgery import cut_layer
from seprune.runtime.inference import evaluating

PLANS = 2  # random plans without a difference, and the check ends
MOST_PLANS = 40
_TOLERANCE = 1e-6  # relative to the largest value; models may compute parts in float32
_ACROSS = {  # operators that may look across channels
    "mean", "amax", "amin", "max", "min", "var", "std", "var_mean", "std_mean", "logsumexp",
    "softmax", "_softmax", "_log_softmax", "log_softmax", "norm", "linalg_vector_norm",
    "native_layer_norm", "native_group_norm", "prod", "median", "cumsum", "argmax", "argmin",
    "topk", "sort", "any", "all", "rand_like", "randn_like", "bernoulli", "sum",
}  # fmt: skip


@dataclass(frozen=True)
class Finding:
    """An operator at which a cut network differs from its masked parent.

    Attributes:
        groups: names of the groups whose channels the operator reads.
        by_nature: it looks across channels, so that it depends on which of them are there.
    """

    groups: tuple[str, ...]
    operator: str
    why: str
    by_nature: bool


def checked_by_values(
    model: nn.Module, inputs: Any, groups: Sequence[ChannelGroup], *, until: float
) -> list[ChannelGroup]:
    """The groups with a reason or a caveat where cut copies differ from their masked parents.

    Args:
        until: `time.monotonic()` after which no further plan is tried; one is, always.
    """
    check, checked = ValueCheck(model, inputs), list(groups)
    seed, clean = 0, 0
    while clean < PLANS and (seed == 0 or time.monotonic() < until):
        findings = check.findings(checked, seed)
        wrong = [f for f in findings if not f.by_nature][:1]
        for finding in wrong or findings:
            checked = [_marked(g, finding) if g.name in finding.groups else g for g in checked]
        clean = 0 if wrong else clean + 1
        seed += 1
        if seed > MOST_PLANS:
            break
    return checked


def _marked(group: ChannelGroup, finding: Finding) -> ChannelGroup:
    if not group.prunable:
        return group
    if finding.by_nature:
        caveat = f"{finding.operator} looks across channels: a cut network is not its masked parent"
        return replace(group, caveat=group.caveat or caveat)
    why = f"a trial cut gives other values at {finding.operator}: {finding.why}"
    return replace(group, prunable=False, reason=why)


class ValueCheck:
    """Compares cut copies of `model` with masked ones on `inputs`, in float64 on the CPU."""

    def __init__(self, model: nn.Module, inputs: Any) -> None:
        self.model = checkable(model)
        inputs = tree_map(lambda t: _double(t) if isinstance(t, Tensor) else t, inputs)
        self.inputs = inputs if isinstance(inputs, tuple) else (inputs,)
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
        if _same(self._outputs(reads), cut):
            return []
        across = _same(self._outputs(made), cut)
        found = self._located(reads if across else made, small, (groups, plan))
        if across:
            return [replace(finding, by_nature=True) for finding in found]
        return found or self._alone(groups, seed, "its outputs change")

    def _cut(self, plan: PruningPlan) -> nn.Module:
        small = copy.deepcopy(self.model)
        for layer, sides in plan.layers().items():
            cut_layer(small, layer, {s: torch.from_numpy(k) for s, k in sides.items()})
        return small

    def _masked(self, plan: PruningPlan, *, producers: bool) -> nn.Module:
        parent = copy.deepcopy(self.model)
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
        return not any(_same(self._outputs(parent), cut) for parent in parents)

    def _outputs(
        self, model: nn.Module, mode: AbstractContextManager[Any] | None = None
    ) -> list[Tensor]:
        inputs = copy.deepcopy(self.inputs)
        with evaluating(model), torch.no_grad(), torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            with mode or nullcontext():
                outputs = model(*inputs)
        return _tensors(outputs)

    def _located(
        self, parent: nn.Module, small: nn.Module, cut: tuple[Sequence[ChannelGroup], PruningPlan]
    ) -> list[Finding]:
        """The operators that differ; empty where the two passes cannot be told side by side."""
        try:
            return self._locate(parent, small, cut)
        except (RuntimeError, IndexError, ValueError, KeyError, TypeError):
            return []

    def _locate(
        self, parent: nn.Module, small: nn.Module, cut: tuple[Sequence[ChannelGroup], PruningPlan]
    ) -> list[Finding]:
        if self._recorded is None:
            trace = record(self.model, copy.deepcopy(self.inputs))
            self._recorded = trace, assign_channel_ids(trace, self.model)
        captured = _Capture()
        self._outputs(small, captured)
        compared = _Compare(_Channels(*self._recorded, *cut), captured.calls)
        self._outputs(parent, compared)
        return compared.findings


def _double(tensor: Tensor) -> Tensor:
    tensor = tensor.detach().cpu()
    return tensor.double() if tensor.is_floating_point() else tensor


def random_plan(groups: Sequence[ChannelGroup], seed: int) -> PruningPlan:
    """A plan that keeps a random half to three quarters of the units of every prunable group."""
    draw = np.random.default_rng(seed)
    keep = {}
    for group in groups:
        if group.prunable:
            most = max(group.units - 1, 1)
            count = min(most, int(group.units * draw.uniform(0.5, 0.75)) or 1)
            keep[group.name] = sorted(draw.permutation(group.units)[:count].tolist())
    return plan_of(groups, keep, {})


def _tensors(tree: Any) -> list[Tensor]:
    if isinstance(tree, Tensor):
        return [tree]
    if isinstance(tree, dict):
        tree = list(tree.values())
    if hasattr(tree, "__dataclass_fields__"):
        tree = [getattr(tree, name) for name in tree.__dataclass_fields__]
    if isinstance(tree, (list, tuple)):
        return [t for item in tree for t in _tensors(item)]
    return []


def _same(ones: Sequence[Tensor], others: Sequence[Tensor]) -> bool:
    return len(ones) == len(others) and all(map(_equal, ones, others))


def _equal(one: Tensor, two: Tensor) -> bool:
    if one.shape != two.shape:
        return False
    if not one.is_floating_point() or not two.is_floating_point():
        return bool(torch.equal(one, two))
    scale = float(torch.nan_to_num(two, posinf=0.0, neginf=0.0).abs().max()) if two.numel() else 0.0
    near = torch.isclose(one, two.to(one), rtol=_TOLERANCE, atol=_TOLERANCE * scale, equal_nan=True)
    return bool(near.all())


class _Capture(TorchDispatchMode):
    """Every operator call of the cut network: its name, its numbers and its results."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.calls: list[tuple[str, list[Any], list[Tensor]]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        made = [t.clone() for t in tree_leaves(result) if isinstance(t, Tensor)]
        self.calls.append((str(func), _numbers(args), made))
        return result


def _numbers(args: Any) -> list[Any]:
    return [a for a in tree_leaves(args) if isinstance(a, (int, float))]


class _Channels:
    """Which positions of every recorded value the plan removes, and whose channels they are."""

    def __init__(
        self,
        trace: Trace,
        channel_ids: ChannelIds,
        groups: Sequence[ChannelGroup],
        plan: PruningPlan,
    ) -> None:
        self.trace, self.channel_ids = trace, channel_ids
        self.nodes = [n for n in trace.nodes if not n.op.startswith("seprune.")]
        self.classes = solve(channel_ids)
        slots = {(s.layer, s.side): self.classes[s.ids.clamp_min(0)] for s in channel_ids.slots}
        self.owner: dict[int, str] = {}
        self.attributes: dict[str, list[str]] = {}  # module -> groups that set an attribute of it
        removed: set[int] = set()
        for group, planned in zip(groups, plan.groups):
            if not group.prunable:
                continue
            gone = sorted(set(range(group.units)) - set(planned.keep))
            for member in group.members:
                found = slots[member.layer, member.side].numpy()
                self.owner.update(
                    dict.fromkeys(found[member.index.reshape(-1)].tolist(), group.name)
                )
                removed.update(found[member.index[gone].reshape(-1)].tolist())
                if member.side.startswith("."):
                    self.attributes.setdefault(member.layer, []).append(group.name)
        removed.discard(0)
        self.removed = torch.tensor(sorted(removed))

    def gone(self, value: int) -> Tensor:
        """True where the plan removes a position of the value, in its shape."""
        ids = self.channel_ids.values[value]
        narrow = compact(ids)
        return torch.isin(self.classes[narrow.clamp_min(0)], self.removed).expand(ids.shape)

    def groups_at(self, node: Node) -> tuple[str, ...]:
        """The groups whose channels an operator reads or makes."""
        found: dict[str, None] = {}
        for value in (*node.inputs(), *node.outputs):
            ids = self.channel_ids.values.get(value)
            if ids is not None:
                for number in torch.unique(self.classes[compact(ids).clamp_min(0)]).tolist():
                    if number in self.owner:
                        found[self.owner[number]] = None
        return tuple(found) or tuple(self.attributes.get(node.module, ()))


class _Compare(TorchDispatchMode):
    """Runs the masked parent with the cut network's values; notes every operator that differs."""

    def __init__(
        self, channels: _Channels, calls: list[tuple[str, list[Any], list[Tensor]]]
    ) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.channels, self.calls, self.at = channels, calls, 0
        self.findings: list[Finding] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        number, self.at = self.at, self.at + 1
        known = number < len(self.calls) and number < len(self.channels.nodes)
        if known and self.calls[number][0] == str(func) == self.channels.nodes[number].op:
            node, (_, numbers, theirs) = self.channels.nodes[number], self.calls[number]
            made = [t for t in tree_leaves(result) if isinstance(t, Tensor)]
            for value, ours, cut in zip(node.outputs, made, theirs):
                if value in self.channels.channel_ids.values and ours.numel():
                    self._compare(node, (value, ours, cut), numbers != _numbers(args))
        return result

    def _compare(self, node: Node, results: tuple[int, Tensor, Tensor], rescaled: bool) -> None:
        value, ours, cut = results
        gone = self.channels.gone(value)
        kept = ours[~gone]
        live = value in self.channels.channel_ids.depends
        if kept.numel() != cut.numel():
            if live:
                self._note(node, f"{kept.numel()} values should be left, {cut.numel()} are", False)
            return
        if _equal(kept, cut.reshape(-1)):
            return
        self._note(node, "its values change", self._by_nature(node, rescaled))
        if 0 not in [s for s, n in zip(ours.stride(), ours.shape) if n > 1]:
            ours[~gone] = cut.reshape(-1).to(ours)

    def _by_nature(self, node: Node, rescaled: bool) -> bool:
        name = node.op.split(".")[1].rstrip("_")
        if name == "convolution":
            x, weight = node.args[0].value, node.args[1].value
            computed = self.channels.trace.values[weight].kind == "result"
            over_channels = along(self.channels.channel_ids.values[x], 1) is None
            return computed or over_channels
        by_width = rescaled and node.module not in self.channels.attributes
        return name in _ACROSS or by_width

    def _note(self, node: Node, why: str, by_nature: bool) -> None:
        groups = self.channels.groups_at(node)
        operator = f"{node.op.split('.')[1].rstrip('_')} in {node.module or 'the model'}"
        if not groups:  # nothing that can be left whole meets here: a later operator shows it
            return
        self.findings.append(Finding(groups, operator, why, by_nature))
