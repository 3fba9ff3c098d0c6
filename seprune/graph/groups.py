"""Dependency groups: which channels of which layers must be removed together."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor, nn

from seprune.graph.channel_ids import ChannelIds, solve
from seprune.graph.cost_terms import CostTerms, Term
from seprune.graph.gates import Gate, gates_of
from seprune.graph.op_rules import assign_channel_ids
from seprune.graph.score_sites import ScoreSites, Site
from seprune.graph.sizes import is_size, written_sizes
from seprune.graph.tap_points import Tap
from seprune.graph.trace import Trace, record
from seprune.runtime.short_table import ShortTable, Tabular
from seprune.runtime.text import within

Positions: TypeAlias = np.ndarray[Any, np.dtype[np.int64]]


@dataclass(frozen=True)
class Member:
    """One side of one layer: unit u of the group stands at the positions `index[u]`."""

    layer: str
    side: str  # "out" | "in" | "dimN" of a bare parameter | "function#call[entry]"
    index: Positions  # (units, positions per unit)
    total: int  # positions of that side before the cut


@dataclass(frozen=True)
class GateLink:
    """A gate that scales the group: unit u is scaled by the gate's channels `index[u]`."""

    gate: str
    index: Positions


@dataclass(frozen=True)
class ScoreSource:
    """Where a number per sample stands for the group's channels.

    Attributes:
        kind: `gate`; `unit` for a virtual gate of 1 on the output of the module `name`; `read` for
            one at another place, often on what a single layer reads.
        index: unit u of the group is the source's channels `index[u]`.
        total: its channels.
        tap: where a unit gate sits; its channels lie along `channel_dim`.
    """

    kind: str
    name: str
    index: Positions
    total: int
    tap: Tap | None = None
    channel_dim: int = 1


@dataclass(frozen=True)
class ChannelGroup:
    """Channels that are removed together, in `units` (one channel, or one conv group).

    Attributes:
        name: the first layer that makes these channels.
        channels: its width.
        role: `bottleneck` inside an excitation, else `features`.
        prunable: False with a `reason` if the group is not pruned.
        caveat: an operator that looks across these channels, so that a cut network is not just its
            parent without them.
    """

    name: str
    channels: int
    units: int
    members: tuple[Member, ...]
    gates: tuple[GateLink, ...] = ()
    sources: tuple[ScoreSource, ...] = ()
    role: str = "features"
    prunable: bool = True
    reason: str | None = None
    caveat: str | None = None

    @property
    def layers(self) -> tuple[str, ...]:
        """The layers whose outputs are these channels."""
        made = [m.layer for m in self.members if m.side != "in" and not is_size(m.side)]
        return tuple(dict.fromkeys(made))

    def not_pruned(self, reason: str | None) -> ChannelGroup:
        """The group as one that stays as it is, and the sizes of calls with it."""
        members = tuple(m for m in self.members if not is_size(m.side))
        return replace(self, members=members, prunable=False, reason=reason)


@dataclass(frozen=True, repr=False)
class NetworkStructure(Tabular):
    """Everything that a plan needs to know about a network."""

    gates: tuple[Gate, ...]
    groups: tuple[ChannelGroup, ...]
    macs: tuple[Term, ...]
    params: tuple[Term, ...]

    def full_widths(self) -> dict[str, int]:
        """Units of every group before the cut."""
        return {g.name: g.units for g in self.groups}

    def costs(self) -> dict[str, int]:
        """MACs of one sample and parameters, before the cut."""
        full = self.full_widths()
        return {"macs": self.macs_at(full), "params": self.params_at(full)}

    def macs_at(self, kept: Mapping[str, int]) -> int:
        """MACs of one sample with `kept` units in each group."""
        return sum(t.at(kept) for t in self.macs)

    def params_at(self, kept: Mapping[str, int]) -> int:
        """Parameters with `kept` units in each group."""
        return sum(t.at(kept) for t in self.params)

    def without(self, modules: Collection[str]) -> NetworkStructure:
        """The costs of the network without some modules; groups and gates stay as they are."""

        def left(terms: tuple[Term, ...]) -> tuple[Term, ...]:
            return tuple(t for t in terms if not any(within(t.layer, m) for m in modules))

        return replace(self, macs=left(self.macs), params=left(self.params))

    def _short_table(self) -> ShortTable:
        costs = self.costs()
        title = (
            f"gates: {len(self.gates)}, dependency groups: {len(self.groups)}, "
            f"MACs: {costs['macs']:,}, parameters: {costs['params']:,}"
        )
        rows = [
            (
                g.name,
                g.channels,
                g.units,
                ", ".join(k.gate for k in g.gates),
                g.reason or g.caveat or "prunable",
            )
            for g in self.groups
        ]
        return ShortTable.of(title, ("group", "channels", "units", "gates", "state"), rows)


def find_structure(
    model: nn.Module, inputs: Any, *, limit_seconds: float = 60.0
) -> NetworkStructure:
    """Gates, groups and cost terms of `model`, from one recorded forward pass.

    Args:
        inputs: one batch (two samples are enough), or a tuple of positional arguments.

    Raises:
        InputError: the forward fails or does not end; names the layer.
    """
    return find_sized_structure(model, inputs, limit_seconds=limit_seconds)[0]


SizeMembers: TypeAlias = Mapping[tuple[str, str], Mapping[str, Member]]
"""(module, side) of a size that a call is given -> what it would be a member of, by group."""


def find_sized_structure(
    model: nn.Module, inputs: Any, *, limit_seconds: float = 60.0
) -> tuple[NetworkStructure, SizeMembers]:
    """`find_structure`, and the sizes in the forward that may have to follow the groups' widths."""
    trace = record(model, inputs, limit_seconds=limit_seconds)
    channel_ids = assign_channel_ids(trace, model)
    gates = gates_of(trace, channel_ids, model)
    builder = _GroupBuilder(trace, channel_ids, gates)
    groups = builder.groups()
    costs = CostTerms(channel_ids, builder.classes, builder.owner, builder.units)
    structure = NetworkStructure(gates, groups, costs.macs(), costs.params(model))
    return structure, builder.sizes()


@dataclass(frozen=True)
class _Draft:
    """Classes of one signature, in the order in which their channels stand in `first`."""

    first: int  # slot
    slots: tuple[int, ...]
    classes: tuple[int, ...]
    reason: str | None


class _GroupBuilder:
    def __init__(self, trace: Trace, channel_ids: ChannelIds, gates: Sequence[Gate]) -> None:
        self.trace, self.channel_ids, self.gates = trace, channel_ids, gates
        self.classes = solve(channel_ids).numpy()
        self.classes_at = [self.of(slot.ids) for slot in channel_ids.slots]
        self.owner: dict[int, str] = {}  # class -> group
        self.units: dict[str, int] = {}
        self.members: dict[str, tuple[int, ...]] = {}  # group -> its classes

    def of(self, ids: Tensor) -> Positions:
        return np.asarray(self.classes[ids.clamp_min(0).numpy()])

    # -- groups -------------------------------------------------------------------------------

    def groups(self) -> tuple[ChannelGroup, ...]:
        seen: dict[str, int] = {}
        made = []
        drafts = self.drafts()
        sites = self.sites(drafts)
        for number, draft in enumerate(drafts):
            layer = self.channel_ids.slots[draft.first].layer
            seen[layer] = seen.get(layer, 0) + 1
            name = layer if seen[layer] == 1 else f"{layer}#{seen[layer]}"
            self.owner.update(dict.fromkeys(draft.classes, name))
            self.units[name] = len(draft.classes)
            self.members[name] = draft.classes
            made.append(self.group(name, draft, sites.of(number)))
        return tuple(made)

    def drafts(self) -> list[_Draft]:
        """Channels with the same layers, sides and multiplicities belong to one group."""
        frozen = self.frozen()
        signatures: dict[int, list[tuple[int, int]]] = {}
        for number, classes_at in enumerate(self.classes_at):
            for name, count in zip(*np.unique(classes_at[classes_at > 0], return_counts=True)):
                signatures.setdefault(int(name), []).append((number, int(count)))
        alike: dict[tuple[Any, ...], set[int]] = {}
        for name, signature in signatures.items():
            alike.setdefault((frozen.get(name), *signature), set()).add(name)
        drafts = []
        for (reason, *signature), names in alike.items():
            slots = tuple(n for n, _ in signature)
            makers = [n for n in slots if self.channel_ids.slots[n].produces]
            if makers:
                order = dict.fromkeys(int(c) for c in self.classes_at[makers[0]] if int(c) in names)
                drafts.append(_Draft(makers[0], slots, tuple(order), reason))
        return sorted(drafts, key=lambda d: d.first)

    def frozen(self) -> dict[int, str]:
        reasons: dict[int, str] = {}
        for ids, reason in self.channel_ids.frozen:
            for number in np.unique(self.of(ids)):
                reasons.setdefault(int(number), reason)
        return reasons

    def group(self, name: str, draft: _Draft, sites: Sequence[Site]) -> ChannelGroup:
        members = tuple(self.member(n, draft.classes) for n in draft.slots)
        slots = [self.channel_ids.slots[n] for n in draft.slots]
        channels = members[draft.slots.index(draft.first)].index.size
        reason = draft.reason or (_one_unit(channels) if len(draft.classes) == 1 else None)
        inside = {layer for gate in self.gates for layer in gate.excitation}
        return ChannelGroup(
            name=name,
            channels=channels,
            units=len(draft.classes),
            members=members,
            gates=self.links(draft.classes),
            sources=self.sources(draft, sites),
            role="bottleneck" if {s.layer for s in slots if s.produces} <= inside else "features",
            prunable=reason is None,
            reason=reason,
        )

    def member(self, number: int, classes: tuple[int, ...]) -> Member:
        slot, classes_at = self.channel_ids.slots[number], self.classes_at[number]
        return Member(slot.layer, slot.side, _positions(classes_at, classes), len(classes_at))

    def links(self, classes: tuple[int, ...]) -> tuple[GateLink, ...]:
        found = []
        for gate in self.gates:
            classes_at = self.of(gate.ids) if gate.ids is not None else np.zeros(0, np.int64)
            if set(classes) <= set(classes_at.tolist()):
                found.append(GateLink(gate.name, _positions(classes_at, classes)))
        return tuple(found)

    def sites(self, drafts: Sequence[_Draft]) -> ScoreSites:
        group_of = np.full(len(self.classes), -1)
        for number, draft in enumerate(drafts):
            group_of[list(draft.classes)] = number
        return ScoreSites(
            self.trace, self.channel_ids, self.gates, classes=self.classes, group_of=group_of
        )

    def sources(self, draft: _Draft, sites: Sequence[Site]) -> tuple[ScoreSource, ...]:
        found = []
        for site in sites:
            classes = self.of(site.ids)
            if set(draft.classes) <= set(classes.tolist()):
                index = _positions(classes, draft.classes)
                found.append(
                    ScoreSource(
                        site.kind, site.name, index, len(classes), site.tap, site.channel_dim
                    )
                )
        return tuple(found)

    def sizes(self) -> SizeMembers:
        """The sizes of calls in which every group has all of its classes, each as often."""
        found: dict[tuple[str, str], dict[str, Member]] = {}
        written = written_sizes(self.trace, self.channel_ids.values, torch.from_numpy(self.classes))
        for size in written:
            classes_at = size.classes.numpy()
            counts = dict(zip(*(a.tolist() for a in np.unique(classes_at, return_counts=True))))
            names = dict.fromkeys(self.owner[c] for c in counts if c in self.owner)
            even = [len({counts.get(c, 0) for c in self.members[name]}) == 1 for name in names]
            if names and all(even):
                found[size.layer, size.side] = {
                    name: Member(size.layer, size.side,
                                 _positions(classes_at, self.members[name]), len(classes_at))
                    for name in names
                }  # fmt: skip
        return found


def _one_unit(channels: int) -> str:
    return "it is a single channel" if channels == 1 else "its channels go together or not at all"


def _positions(classes_at: Positions, classes: tuple[int, ...]) -> Positions:
    """For every class the positions in `classes_at`, ascending: (classes, positions per class)."""
    by_class = np.argsort(classes_at, kind="stable")
    starts = np.searchsorted(classes_at[by_class], classes)
    count = int((classes_at == classes[0]).sum())
    return np.stack([by_class[s : s + count] for s in starts])
