"""Several runs in one table: means over seeds, spread, and who is on the Pareto front."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from seprune.report import words
from seprune.report.measurement import STAGES, Measurement, Report
from seprune.runtime import files
from seprune.runtime.text import csv_text


@dataclass(frozen=True)
class ComparisonRow:
    """One network at one stage, averaged over the seeds that made it."""

    model: str
    criterion: str
    allocation: str
    budget: str | None
    stage: str
    runs: int
    names: list[str]
    seeds: list[int]
    top1: float | None
    top1_spread: float | None  # sample standard deviation; None for a single seed
    macs: float
    kept: float | None  # of the baseline's MACs
    params: float
    latency_ms: float | None  # eager, smallest batch size
    pareto: bool = False


@dataclass(frozen=True)
class Comparison:
    """Rows of all runs, and what makes them hard to compare."""

    runs: list[str]
    rows: list[ComparisonRow]
    warnings: list[str]

    def to_json(self) -> dict[str, Any]:
        """One JSON document; numbers exact."""
        return asdict(self)

    def series(self) -> dict[tuple[str, str], list[ComparisonRow]]:
        """Rows with a top-1 by (how they were made, stage): the lines of the figure."""
        lines: dict[tuple[str, str], list[ComparisonRow]] = {}
        for row in sorted(self.rows, key=lambda r: r.macs):
            if row.top1 is not None:
                lines.setdefault((self._made(row), row.stage), []).append(row)
        return dict(sorted(lines.items()))

    def table(self) -> list[list[str]]:
        """Head and rows as people read them."""
        head = ["network", "made by", "top-1 %", "MACs", "kept %", "params"]
        rows = [[_network(row), self._made(row), *_numbers(row)] for row in self.rows]
        return [[*head, "ms", "seeds", "Pareto"], *rows]

    def _made(self, row: ComparisonRow) -> str:
        """Criterion, and model and allocation where the runs differ in them."""
        models = {r.model for r in self.rows}
        allocations = {r.allocation for r in self.rows if r.allocation}
        parts = [row.model] if len(models) > 1 else []
        parts += [row.criterion, *([row.allocation] if len(allocations) > 1 else [])]
        return " · ".join(filter(None, parts))


def compare(reports: Sequence[Report]) -> Comparison:
    """Put runs side by side; those that differ only in seed or name become one row."""
    found: dict[tuple[str, ...], list[tuple[Report, Measurement]]] = {}
    for report in reports:
        for m in report.measurements:
            found.setdefault(_key(report, m), []).append((report, m))
    rows = [_row(key, members) for key, members in found.items()]
    rows.sort(key=lambda r: (r.model, -r.macs, STAGES.index(r.stage), r.criterion))
    return Comparison(
        runs=[report.name for report in reports],
        rows=_mark_pareto(rows),
        warnings=_warnings(reports),
    )


def write_csv(comparison: Comparison, path: Path) -> None:
    """One CSV line a row; lists are joined by spaces, unknown values are empty."""
    names = list(ComparisonRow.__dataclass_fields__)
    body = []
    for row in comparison.rows:
        flat = asdict(row)
        flat |= {key: " ".join(map(str, flat[key])) for key in ("names", "seeds")}
        body.append([flat[name] for name in names])
    files.write_text(path, csv_text([names, *body]))


def _key(report: Report, m: Measurement) -> tuple[str, ...]:
    budget = report.budget(m.budget)
    made = (budget.criterion, budget.allocation) if budget else ("", "")
    return (str(report.model.get("name", "")), *made, m.budget or "", m.stage)


def _row(key: tuple[str, ...], members: Sequence[tuple[Report, Measurement]]) -> ComparisonRow:
    model, criterion, allocation, budget, stage = key
    tops = [m.top1 for _, m in members if m.top1 is not None]
    dense = [words.fraction_of(m.macs, r.baseline.macs) for r, m in members if r.baseline]
    kept = [f for f in dense if f is not None]
    seeds = sorted({r.seed for r, _ in members})
    times = [t for _, m in members if (t := _first_latency(m)) is not None]
    return ComparisonRow(
        model=model,
        criterion=criterion,
        allocation=allocation,
        budget=budget or None,
        stage=stage,
        runs=len(members),
        names=[r.name for r, _ in members],
        seeds=seeds,
        top1=fmean(tops) if tops else None,
        top1_spread=stdev(tops) if min(len(tops), len(seeds)) > 1 else None,
        macs=fmean(m.macs for _, m in members),
        kept=fmean(kept) if kept else None,
        params=fmean(m.params for _, m in members),
        latency_ms=fmean(times) if times else None,
    )


def _first_latency(m: Measurement) -> float | None:
    measured = [x for x in m.latency if x.runtime == "eager" and x.median_ms is not None]
    return min(measured, key=lambda x: x.batch).median_ms if measured else None


def _mark_pareto(rows: Sequence[ComparisonRow]) -> list[ComparisonRow]:
    """Mark rows that no row with at most their MACs beats in top-1."""

    def beaten(row: ComparisonRow) -> bool:
        return any(
            other.top1 is not None
            and row.top1 is not None
            and other.macs <= row.macs
            and other.top1 >= row.top1
            and (other.macs, other.top1) != (row.macs, row.top1)
            for other in rows
        )

    return [
        ComparisonRow(**(vars(r) | {"pareto": r.top1 is not None and not beaten(r)})) for r in rows
    ]


def _warnings(reports: Sequence[Report]) -> list[str]:
    notes = []
    sources = sorted({str(r.data.get("source")) for r in reports})
    if len(sources) > 1:
        notes.append(
            f"The runs were measured on different data ({', '.join(sources)}): "
            "their accuracies do not compare."
        )
    places = sorted({x.device for r in reports for m in r.measurements for x in m.latency})
    if len(places) > 1:
        notes.append(
            f"Latencies come from different devices ({', '.join(places)}) and do not compare."
        )
    notes += [
        f"{r.name}: not finished, nothing measured yet." for r in reports if not r.measurements
    ]
    return notes


def _network(row: ComparisonRow) -> str:
    return " · ".join(filter(None, (row.stage, row.budget)))


def _numbers(row: ComparisonRow) -> list[str]:
    spread = f" ± {100 * row.top1_spread:.2f}" if row.top1_spread is not None else ""
    kept = words.DASH if row.kept is None else f"{100 * row.kept:.1f}"
    return [
        words.DASH if row.top1 is None else f"{100 * row.top1:.2f}{spread}",
        words.quantity(row.macs),
        kept,
        words.quantity(row.params),
        words.DASH if row.latency_ms is None else f"{row.latency_ms:.3g}",
        " ".join(map(str, row.seeds)),
        "yes" if row.pareto else "",
    ]
