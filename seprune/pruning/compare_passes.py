"""A cut network and its masked parent side by side, operator by operator.

Each operator of the parent gets the values that the cut network has, so that one difference does
not hide the next.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from seprune.graph.channel_ids import ChannelIds, along, compact, solve
from seprune.graph.groups import ChannelGroup
from seprune.graph.sizes import is_size
from seprune.graph.trace import Node, Trace
from seprune.pruning.plan import PruningPlan

_TOLERANCE = 1e-6  # relative to the largest value; models may compute parts in float32


_ACROSS = {  # operators that may look across channels
    "mean", "amax", "amin", "max", "min", "var", "std", "var_mean", "std_mean", "logsumexp",
    "softmax", "_softmax", "_log_softmax", "log_softmax", "norm", "linalg_vector_norm",
    "native_layer_norm", "native_group_norm", "prod", "median", "cumsum", "argmax", "argmin",
    "topk", "sort", "any", "all", "rand_like", "randn_like", "bernoulli", "sum",
}  # fmt: skip
_ARITHMETIC = {"add", "sub", "rsub", "mul", "div", "pow", "clamp", "addmm", "baddbmm"}
"""Operators that may be given a number computed from a width."""


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


def tensors_of(tree: Any) -> list[Tensor]:
    """The tensors of an output, in order: nested sequences, mappings and dataclasses."""
    if isinstance(tree, Tensor):
        return [tree]
    if isinstance(tree, dict):
        tree = list(tree.values())
    if hasattr(tree, "__dataclass_fields__"):
        tree = [getattr(tree, name) for name in tree.__dataclass_fields__]
    if isinstance(tree, (list, tuple)):
        return [t for item in tree for t in tensors_of(item)]
    return []


def same(ones: Sequence[Tensor], others: Sequence[Tensor], tolerance: float = _TOLERANCE) -> bool:
    """Whether two lists of tensors hold the same values, relative to the largest of each."""
    pairs = zip(ones, others, strict=False)
    return len(ones) == len(others) and all(_equal(a, b, tolerance) for a, b in pairs)


def _equal(one: Tensor, two: Tensor, tolerance: float = _TOLERANCE) -> bool:
    if one.shape != two.shape:
        return False
    if not one.is_floating_point() or not two.is_floating_point():
        return bool(torch.equal(one, two))
    scale = float(torch.nan_to_num(two, posinf=0.0, neginf=0.0).abs().max()) if two.numel() else 0.0
    near = torch.isclose(one, two.to(one), rtol=tolerance, atol=tolerance * scale, equal_nan=True)
    return bool(near.all())


class Capture(TorchDispatchMode):
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


class Channels:
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
        removed: set[int] = set()
        for group, planned in zip(groups, plan.groups):
            if not group.prunable:
                continue
            gone = sorted(set(range(group.units)) - set(planned.keep))
            for member in group.members:
                if is_size(member.side):
                    continue
                found = slots[member.layer, member.side].numpy()
                self.owner.update(
                    dict.fromkeys(found[member.index.reshape(-1)].tolist(), group.name)
                )
                removed.update(found[member.index[gone].reshape(-1)].tolist())
        removed.discard(0)
        lost = torch.zeros(len(self.classes), dtype=torch.bool)
        lost[sorted(removed)] = True
        self.lost = lost[self.classes]  # by id

    def gone(self, value: int, shape: Sequence[int]) -> Tensor:
        """True where the plan removes a position of the value.

        Args:
            shape: of the value in this pass, in which a detector may pick more or fewer boxes.
        """
        narrow = compact(self.channel_ids.values[value])
        gone = self.lost[narrow.clamp_min(0)]
        return (gone if bool(gone.any()) else gone.new_zeros(())).expand(tuple(shape))

    def last(self) -> int:
        """Place of the last operator that meets a channel which the plan removes; -1 for none."""
        for place in reversed(range(len(self.nodes))):
            node = self.nodes[place]
            known = (v for v in (*node.inputs(), *node.outputs) if v in self.channel_ids.values)
            if any(bool(self.gone(v, self.trace.shape(v)).any()) for v in known):
                return place
        return -1

    def groups_at(self, node: Node) -> tuple[str, ...]:
        """The groups whose channels an operator reads or makes."""
        found: dict[str, None] = {}
        for value in (*node.inputs(), *node.outputs):
            ids = self.channel_ids.values.get(value)
            if ids is not None:
                for number in torch.unique(self.classes[compact(ids).clamp_min(0)]).tolist():
                    if number in self.owner:
                        found[self.owner[number]] = None
        return tuple(found)


class Compare(TorchDispatchMode):
    """Runs the masked parent with the cut network's values; notes every operator that differs.

    Having the same values to the last bit, both passes select the same boxes of a detector.
    """

    def __init__(
        self, channels: Channels, calls: list[tuple[str, list[Any], list[Tensor]]]
    ) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.channels, self.calls, self.at = channels, calls, 0
        self.findings: list[Finding] = []
        self.followed = 0  # operators from the first on that both passes share with the record
        self.unnamed = False  # something differs where no group meets

    @property
    def right(self) -> bool:
        """Whether all that reads a removed channel has been compared, and nothing differs."""
        return not self.findings and not self.unnamed and self.followed > self.channels.last()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        number, self.at = self.at, self.at + 1
        known = number < len(self.calls) and number < len(self.channels.nodes)
        if known and self.calls[number][0] == str(func) == self.channels.nodes[number].op:
            self.followed += self.followed == number
            node, (_, numbers, theirs) = self.channels.nodes[number], self.calls[number]
            made = [t for t in tree_leaves(result) if isinstance(t, Tensor)]
            for value, ours, cut in zip(node.outputs, made, theirs):
                if value in self.channels.channel_ids.values and ours.numel():
                    self._compare(node, (value, ours, cut), numbers != _numbers(args))
        return result

    def _compare(self, node: Node, results: tuple[int, Tensor, Tensor], rescaled: bool) -> None:
        value, ours, cut = results
        gone = self.channels.gone(value, ours.shape)
        kept = ours[~gone]
        live = value in self.channels.channel_ids.depends
        if kept.numel() != cut.numel():
            if live:
                self._note(node, f"{kept.numel()} values should be left, {cut.numel()} are", False)
            return
        if torch.equal(kept, cut.reshape(-1)):
            return
        if not _equal(kept, cut.reshape(-1)):
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
        return name in _ACROSS or (rescaled and name in _ARITHMETIC)

    def _note(self, node: Node, why: str, by_nature: bool) -> None:
        groups = self.channels.groups_at(node)
        operator = f"{node.op.split('.')[1].rstrip('_')} in {node.module or 'the model'}"
        if not groups:  # nothing that can be excluded meets here: a later operator shows it
            self.unnamed = True
            return
        self.findings.append(Finding(groups, operator, why, by_nature))
