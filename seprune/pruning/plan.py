"""Which units of which groups stay: plain data, saved as JSON, edited by hand, replayed."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, TypedDict

import numpy as np

from seprune.errors import InputError
from seprune.graph.groups import ChannelGroup, Member, Positions
from seprune.graph.sizes import is_size
from seprune.pruning.removals import Removals
from seprune.runtime.files import write_text
from seprune.runtime.reading import read_json, read_text
from seprune.runtime.short_table import ShortTable, Tabular
from seprune.runtime.typed import few, typed

FORMAT = 1
_SIDE = re.compile(r"out|in|dim\d|[a-z_0-9]{1,20}#\d{1,6}(/\d{1,6})?\[\d{1,2}\]")
_MOST = 10**6  # positions on one side: more than any layer has
_MOST_TOGETHER = 10**7  # in all layers of a plan; each takes 8 bytes when it is read


@dataclass(frozen=True)
class PlannedGroup:
    """One dependency group in a plan: the kept units, and where they stand in each layer."""

    name: str
    channels: int
    units: int
    keep: tuple[int, ...]
    members: tuple[Member, ...]
    reason: str | None = None
    caveat: str | None = None

    @property
    def kept_channels(self) -> int:
        """Width after the cut."""
        return len(self.keep) * self.channels // self.units


@dataclass(frozen=True, repr=False)
class PruningPlan(Tabular):
    """Layer names and integers.

    Attributes:
        facts: how the plan came about (budget, criterion, allocation, predicted costs); plain
            JSON types, read by people and reports and by no code that cuts.
        history: the search for the budget, one entry a candidate.
        removed: gates and blocks that are taken out as a whole.
    """

    groups: tuple[PlannedGroup, ...]
    facts: Mapping[str, Any]
    history: tuple[Mapping[str, Any], ...] = ()
    removed: Removals = field(default_factory=Removals)

    @property
    def cuts(self) -> bool:
        """Whether it changes anything."""
        return bool(self.removed or self.layers())

    def _short_table(self) -> ShortTable:
        changed = [g for g in self.groups if g.kept_channels < g.channels]
        costs = [
            f"{name} {before:,} -> {after:,}"
            for name in ("macs", "params")
            for before, after in [self.facts.get(name, (0, 0))]
            if before
        ]
        title = ", ".join([f"dependency groups cut: {len(changed)} of {len(self.groups)}", *costs])
        rows = [
            (g.name, g.channels, g.kept_channels, g.reason or "")
            for g in sorted(self.groups, key=lambda g: g.kept_channels >= g.channels)
        ]
        return ShortTable.of(title, ("group", "before", "after", "not pruned because"), rows)

    def widths(self) -> dict[str, list[int]]:
        """For every group its width before and after."""
        return {g.name: [g.channels, g.kept_channels] for g in self.groups}

    def layers(self) -> dict[str, dict[str, Positions]]:
        """For every layer and side that changes, the kept positions, ascending."""
        # all sizes in calls are set: one may be computed from the width of another group
        removed: dict[tuple[str, str], list[Positions]] = {}
        totals: dict[tuple[str, str], int] = {}
        changes = any(len(g.keep) < g.units for g in self.groups)
        for group in self.groups:
            gone = sorted(set(range(group.units)) - set(group.keep))
            for member in group.members if changes else ():
                if self.removed.covers(member.layer) or not (gone or is_size(member.side)):
                    continue
                key = member.layer, member.side
                removed.setdefault(key, []).append(member.index[gone].reshape(-1))
                totals[key] = member.total
        result: dict[str, dict[str, Positions]] = {}
        for (layer, side), parts in removed.items():
            kept = np.setdiff1d(np.arange(totals[layer, side]), np.concatenate(parts))
            result.setdefault(layer, {})[side] = kept
        for layer in [name for name in result if _cut_with_its_module(name, result)]:
            del result[layer]
        return result

    def annotated(
        self, reasons: Mapping[str, str | None], history: Iterable[Mapping[str, Any]]
    ) -> PruningPlan:
        """The same cuts, with why groups are not pruned and how the budget was searched."""
        groups = tuple(replace(g, reason=reasons.get(g.name)) for g in self.groups)
        return replace(self, groups=groups, history=tuple(history))

    def save(self, path: Path) -> None:
        """Write the plan as JSON, one group a line."""
        write_text(path, self.dumps())

    def dumps(self) -> str:
        """The plan as JSON text, one group a line."""

        def lines(items: Iterable[Any]) -> str:
            return ",\n  ".join(json.dumps(i, ensure_ascii=False, allow_nan=False) for i in items)

        facts = json.dumps(dict(self.facts), ensure_ascii=False, allow_nan=False)
        groups = lines(_group_json(g) for g in self.groups)
        removed = f' "removed": {json.dumps(self.removed.plain())},\n' if self.removed else ""
        return (
            f'{{"format": {FORMAT},\n "facts": {facts},\n{removed}'
            f' "history": [\n  {lines(self.history)}\n ],\n'
            f' "groups": [\n  {groups}\n ]}}\n'
        )

    @classmethod
    def load(cls, path: Path) -> PruningPlan:
        """Read a plan.

        Raises:
            InputError: not a plan, or indices that cannot be; names the line.
        """
        return cls.loads(read_json(path), path=path)

    @classmethod
    def loads(cls, content: Any, *, path: Path) -> PruningPlan:
        """A plan from its JSON content; `path` is named in errors."""
        if not isinstance(content, dict) or not isinstance(content.get("groups"), list):
            raise InputError(f"{path}: not a pruning plan", why="it has no list of groups",
                             fix="make one with: seprune prune MODEL --dry-run --out DIR",
                             code="plan")  # fmt: skip
        if content.get("format") != FORMAT:
            raise InputError(
                f"{path}: a plan of format {content.get('format')}",
                why=f"this seprune reads format {FORMAT}",
                fix="upgrade seprune: pip install -U seprune",
                code="newer",
            )
        fix = "restore the file, or make the plan again"
        read = typed(_PlanEntry, content, source=str(path), fix=fix, code="plan")
        typed(_PlanFacts, read.facts, source=f"{path}: facts", fix=fix, code="plan")
        entries = [_entry(group, path) for group in read.groups]
        _refuse_oversized(entries, path)
        groups = tuple(_read_group(entry, path) for entry in entries)
        return cls(groups, read.facts, read.history, read.removed)


def plan_of(
    groups: Iterable[ChannelGroup], keep: Mapping[str, Iterable[int]], facts: Mapping[str, Any]
) -> PruningPlan:
    """A plan that keeps the given units; groups that are not named are not pruned."""
    planned = []
    for group in groups:
        units = tuple(sorted(keep.get(group.name, range(group.units))))
        size, reasons = (group.channels, group.units), (group.reason, group.caveat)
        planned.append(PlannedGroup(group.name, *size, units, group.members, *reasons))
    return PruningPlan(tuple(planned), dict(facts))


def with_facts(plan: PruningPlan, **facts: Any) -> PruningPlan:
    """The same cuts with more facts."""
    return replace(plan, facts={**plan.facts, **facts})


def _cut_with_its_module(parameter: str, layers: Mapping[str, Mapping[str, Positions]]) -> bool:
    """Whether a parameter that the forward also reads by name is cut as its module's weight."""
    sides = layers.get(parameter.rpartition(".")[0], {})
    of_module = [kept for side, kept in sides.items() if side in ("in", "out")]
    return all(
        side.startswith("dim") and any(np.array_equal(kept, other) for other in of_module)
        for side, kept in layers[parameter].items()
    )


def _group_json(group: PlannedGroup) -> dict[str, Any]:
    return {
        "name": group.name,
        "channels": group.channels,
        "units": group.units,
        "reason": group.reason,
        **({"caveat": group.caveat} if group.caveat else {}),
        "keep": list(group.keep),
        "members": [
            {"layer": m.layer, "side": m.side, "total": m.total, **_index_json(m.index)}
            for m in group.members
        ],
    }


def _index_json(index: Positions) -> dict[str, Any]:
    """`at` (and `each`) for channels that stand in a row, else every position."""
    first, each = int(index.flat[0]), index.shape[1]
    row = np.arange(index.size).reshape(index.shape) + first
    if np.array_equal(index, row):
        return {"at": first} if each == 1 else {"at": first, "each": each}
    return {"index": index.tolist()}


@dataclass(frozen=True)
class _MemberEntry:
    """A layer's side in the file: channels that stand in a row, or every position."""

    layer: str
    side: str
    total: int
    at: int | None = None
    each: int = 1
    index: list[list[int]] | None = None


@dataclass(frozen=True)
class _GroupEntry:
    """A `PlannedGroup` in the file."""

    name: str
    channels: int
    units: int
    keep: tuple[int, ...]
    members: list[_MemberEntry]
    reason: str | None = None
    caveat: str | None = None

    @property
    def claimed(self) -> int:
        """Positions that its members ask for, at most; more than `_MOST` is refused anyhow."""
        sizes = (max(self.units, 0) * max(m.each, 0) for m in self.members)
        return sum(min(size, _MOST) for size in sizes)


class _PlanFacts(TypedDict, total=False):
    """The facts of a plan that tables show."""

    macs: tuple[int, int]
    params: tuple[int, int]


@dataclass(frozen=True)
class _PlanEntry:
    """What surrounds the groups in the file."""

    groups: Annotated[list[Any], few(20_000)]  # each takes its time
    facts: dict[str, Any] = field(default_factory=dict)
    history: tuple[dict[str, Any], ...] = ()
    removed: Removals = field(default_factory=Removals)


def _entry(content: Any, path: Path) -> _GroupEntry:
    """A group as the file has it, its types checked and nothing else."""
    try:
        return typed(_GroupEntry, content, source="the entry", fix="")
    except InputError as error:
        name = content.get("name") if isinstance(content, dict) else None
        raise _impossible(path, str(name), error.what) from error


def _refuse_oversized(groups: Iterable[_GroupEntry], path: Path) -> None:
    """Add up what the entries claim before anything of that size is made."""
    claimed = sum(group.claimed for group in groups)
    if claimed > _MOST_TOGETHER:
        raise InputError(
            f"{path}: the plan claims {claimed:,} channel positions",
            why=f"no network has more than {_MOST_TOGETHER:,}",
            fix="restore the file, or make the plan again",
            code="plan",
        )


def _read_group(entry: _GroupEntry, path: Path) -> PlannedGroup:
    try:
        members = tuple(_read_member(m, entry.units) for m in entry.members)
    except (ValueError, OverflowError) as error:
        raise _impossible(path, entry.name, str(error)) from error
    group = PlannedGroup(
        entry.name, entry.channels, entry.units, entry.keep, members, entry.reason, entry.caveat
    )
    _check_group(group, path)
    return group


def _read_member(entry: _MemberEntry, units: int) -> Member:
    total, each = entry.total, entry.each
    if not _SIDE.fullmatch(entry.side):
        raise ValueError(f"'{entry.side}' is no side of a layer")
    if not 0 < units <= total <= _MOST:
        raise ValueError(f"{units} units do not fit into {total}")
    if entry.index is not None:
        index = np.asarray(entry.index, dtype=np.int64).reshape(units, -1)
    elif entry.at is None:
        raise ValueError(f"{entry.layer} has neither 'at' nor 'index'")
    elif not 0 < units * each <= total:
        raise ValueError(f"{units} units of {each} do not fit into {total}")
    else:
        index = np.arange(units * each, dtype=np.int64).reshape(units, each) + entry.at
    return Member(entry.layer, entry.side, index, total)


def _check_group(group: PlannedGroup, path: Path) -> None:
    keep = group.keep
    if not 0 < group.units <= _MOST:
        raise _impossible(path, group.name, f"{group.units} units are no part of any layer")
    wrong = [k for k in keep if not 0 <= k < group.units]
    if wrong:
        raise _impossible(path, group.name, f"unit {wrong[0]} is not one of 0..{group.units - 1}")
    if group.channels < 1 or group.channels % group.units:
        raise _impossible(
            path, group.name, f"{group.channels} channels are not {group.units} equal units"
        )
    if not keep:
        raise _impossible(path, group.name, "no unit is kept")
    if list(keep) != sorted(set(keep)):
        raise _impossible(path, group.name, "units are repeated or not in ascending order")
    for member in group.members:
        index = member.index
        if not index.size or index.min() < 0 or index.max() >= member.total:
            raise _impossible(
                path, group.name, f"{member.layer} has positions 0..{member.total - 1} only"
            )
        if len(np.unique(index)) < index.size:
            raise _impossible(path, group.name, f"positions of {member.layer} are repeated")


def _impossible(path: Path, name: str, why: str) -> InputError:
    lines = read_text(path, errors="replace").splitlines() if path.is_file() else []
    number = next((n for n, text in enumerate(lines, 1) if f'"name": "{name}"' in text), None)
    where = f"{path}" if number is None else f"{path}:{number}"
    return InputError(
        f"{where}: group '{name}' of the plan is impossible",
        why=why,
        fix="correct that line, or make the plan again",
        code="plan",
    )
