"""One CSV row a channel: what its gates say, its score, its rank, and whether it stays."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from seprune.report.measurement import BudgetReport, GateSummary, GroupCut, Report
from seprune.runtime import files
from seprune.runtime.text import csv_text

Value = float | int | str | bool | None


def write_csv(report: Report, path: Path) -> None:
    """Write `report.csv`; numbers are exact, unknown values empty, `kept` True or False."""
    names = columns(report)
    body = ([row.get(name) for name in names] for row in rows(report))
    files.write_text(path, csv_text([names, *body]))


def columns(report: Report) -> list[str]:
    """The head: statistics are those that any gate of the report has."""
    statistics = dict.fromkeys(f"gate_{key}" for gate in report.gates for key in gate.statistics)
    fixed = ["budget", "group", "channel", "layer", "gate", *statistics]
    return [*fixed, "rank_agreement", "score", "rank", "kept"]


def rows(report: Report) -> Iterator[dict[str, Value]]:
    """A row for each budget, group and channel; before any cut one for each gate and channel.

    Where several gates scale a group (residual placement) its statistics are their means.
    """
    for budget in report.budgets:
        for cut in budget.groups:
            yield from _group_rows(budget, cut, gates_of(report, cut))
    if not report.budgets:
        for gate in report.gates:
            for channel in range(gate.channels):
                layer = " ".join(gate.scales)
                yield {"channel": channel, "layer": layer, **_gate_values([gate], channel)}


def gates_of(report: Report, cut: GroupCut) -> list[GateSummary]:
    """The gates that scale the group's units one to one."""
    return [g for g in report.gates if cut.name in g.groups and g.channels == cut.before]


def ranks(cut: GroupCut) -> list[int | None]:
    """Rank of each unit in its group, 1 = highest score; None without a score."""
    known = [(score, unit) for unit, score in enumerate(cut.scores) if score is not None]
    order = sorted(known, key=lambda pair: (-pair[0], pair[1]))
    places = {unit: place for place, (_, unit) in enumerate(order, start=1)}
    return [places.get(unit) for unit in range(cut.before)]


def _group_rows(
    budget: BudgetReport, cut: GroupCut, gates: list[GateSummary]
) -> Iterator[dict[str, Value]]:
    kept, places = set(cut.keep), ranks(cut)
    for channel in range(cut.before):
        yield {
            "budget": budget.label,
            "group": cut.name,
            "channel": channel,
            "layer": " ".join(cut.layers),
            **_gate_values(gates, channel),
            "score": cut.scores[channel] if cut.scores else None,
            "rank": places[channel],
            "kept": channel in kept,
        }


def _gate_values(gates: list[GateSummary], channel: int) -> dict[str, Any]:
    values: dict[str, Any] = {"gate": " ".join(gate.name for gate in gates)}
    for key in dict.fromkeys(key for gate in gates for key in gate.statistics):
        found = [gate.statistics[key][channel] for gate in gates if key in gate.statistics]
        values[f"gate_{key}"] = _mean(found)
    values["rank_agreement"] = _mean([gate.rank_agreement for gate in gates])
    return values


def _mean(values: list[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None
