"""Which runs are seeds of one recipe, and how the others are told apart.

A way is how a network was made: everything in its recipe but its name, its seed and the budget.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from seprune.report.measurement import Report

_FREE = ("name", "seed", "plan.macs", "plan.params", "plan.latency")  # with `report`: no way
_DENSE = ("model", "data", "train")  # what the dense network depends on
_OWN_COLUMNS = ("model.name", "importance.criterion", "plan.allocation")  # of a comparison
SHOWN_KEYS = 3


def values(recipe: str) -> dict[str, str]:
    """`plan.macs: [0.5]` and so on, from a resolved recipe: one key a line, two spaces deeper."""
    found: dict[str, str] = {}
    above: list[str] = []
    for line in recipe.splitlines():
        name, colon, value = line.strip().partition(":")
        depth = (len(line) - len(line.lstrip())) // 2
        above = [*above[:depth], name]
        if colon and value.strip():
            found[".".join(above)] = value.strip()
    return found


def way(recipe: Mapping[str, str], *, tuned: bool = True) -> dict[str, str]:
    """The values that make a cut network what it is.

    Args:
        tuned: whether it was fine-tuned, so that it matters how.
    """
    free = ("report.",) if tuned else ("report.", "finetune.")
    return {k: v for k, v in recipe.items() if k not in _FREE and not k.startswith(free)}


def dense_way(recipe: Mapping[str, str]) -> dict[str, str]:
    """The values that make the dense network what it is."""
    return {k: v for k, v in recipe.items() if k.partition(".")[0] in _DENSE}


def key(values: Mapping[str, str]) -> str:
    """Equal for equal values."""
    return json.dumps(values, sort_keys=True)


def differences(ways: Sequence[Mapping[str, str]]) -> list[str]:
    """What sets each of these ways apart: `epochs=20, lr=0.01`; empty where nothing does."""
    names = sorted({name for way in ways for name in way} - set(_OWN_COLUMNS))
    apart = [name for name in names if len({way.get(name) for way in ways}) > 1]
    more = ["…"] if len(apart) > SHOWN_KEYS else []
    return [
        ", ".join([*(f"{n}={way.get(n, 'null')}" for n in apart[:SHOWN_KEYS]), *more])
        for way in ways
    ]


def data_names(reports: Sequence[Report]) -> list[str]:
    """What each run was measured on, by names that differ where the data do; "" for none.

    Data are the same where their fingerprints are equal, or their names and the first half of the
    fingerprints, which does not depend on file times; and as many images were reported on.
    """
    apart: list[Report] = []
    for report in reports:
        known = any(_same_data(report, other) for other in apart)
        if _measured(report) and not known:
            apart.append(report)
    names = list(_numbered([_source(report) for report in apart]))
    found = [[n for n, other in zip(names, apart) if _same_data(r, other)] for r in reports]
    return [
        own[0] if own and _measured(report) else ""
        for report, own in zip(reports, found, strict=True)
    ]


def _measured(report: Report) -> bool:
    return any(m.metrics for m in report.measurements)


def _same_data(one: Report, other: Report) -> bool:
    prints = [report.hashes.get("data", "") for report in (one, other)]
    files = [(_source(r), p.partition("-")[0]) for r, p in zip((one, other), prints, strict=True)]
    counts = [(r.data.get("counts") or {}).get("reporting") for r in (one, other)]
    same = (prints[0] and prints[0] == prints[1]) or files[0] == files[1]
    return bool(same) and counts[0] == counts[1]


def _source(report: Report) -> str:
    return str(report.data.get("source"))


def run_names(reports: Sequence[Report], folders: Sequence[Path] = ()) -> list[str]:
    """The runs' names, each once: where two are called alike, with their folders."""
    names = [report.name for report in reports]
    if folders:
        short = [f.name if [g.name for g in folders].count(f.name) == 1 else f for f in folders]
        names = [
            f"{name} ({place})" if names.count(name) > 1 else name
            for name, place in zip(names, short, strict=True)
        ]
    return list(_numbered(names))


def _numbered(names: Sequence[str]) -> Iterator[str]:
    """Names that still are the same, with a number."""
    seen = dict.fromkeys(names, 0)
    for name in names:
        seen[name] += 1
        yield f"{name} #{seen[name]}" if names.count(name) > 1 else name
