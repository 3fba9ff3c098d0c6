"""Several runs in one table: means over seeds, spread, and who is on the Pareto front."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from seprune.measure.metric_names import FRACTIONS, metric_title
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
    metric: str
    value: float | None
    spread: float | None  # sample standard deviation; None for a single seed
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
        """Rows with a value by (how they were made, stage): the lines of the figure."""
        lines: dict[tuple[str, str], list[ComparisonRow]] = {}
        for row in sorted(self.rows, key=lambda r: r.macs):
            if row.value is not None:
                lines.setdefault((self._made(row), row.stage), []).append(row)
        return dict(sorted(lines.items()))

    def table(self) -> list[list[str]]:
        """Head and rows as people read them."""
        head = ["network", "made by", self.metric, "MACs", "kept %", "params"]
        rows = [[_network(row), self._made(row), *_numbers(row)] for row in self.rows]
        return [[*head, "ms", "seeds", "Pareto"], *rows]

    @property
    def metric(self) -> str:
        """The metric of the rows as people write it."""
        return " or ".join(dict.fromkeys(metric_title(row.metric) for row in self.rows)) or "top-1"

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
    better = {m.metric: m.higher_is_better for r in reports for m in r.measurements}
    rows.sort(key=lambda r: (r.model, -r.macs, STAGES.index(r.stage), r.criterion))
    return Comparison(
        runs=[report.name for report in reports],
        rows=_mark_pareto(rows, better),
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
    values = [m.value for _, m in members if m.value is not None]
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
        metric=members[0][1].metric,
        value=fmean(values) if values else None,
        spread=stdev(values) if min(len(values), len(seeds)) > 1 else None,
        macs=fmean(m.macs for _, m in members),
        kept=fmean(kept) if kept else None,
        params=fmean(m.params for _, m in members),
        latency_ms=fmean(times) if times else None,
    )


def _first_latency(m: Measurement) -> float | None:
    measured = [x for x in m.latency if x.runtime == "eager" and x.median_ms is not None]
    return min(measured, key=lambda x: x.batch).median_ms if measured else None


def _mark_pareto(rows: Sequence[ComparisonRow], better: Mapping[str, bool]) -> list[ComparisonRow]:
    """Mark rows that no row of their metric with at most their MACs beats in it.

    Args:
        better: whether more of a metric is better.
    """

    def rank(row: ComparisonRow) -> float | None:
        return row.value if row.value is None or better[row.metric] else -row.value

    def beaten(row: ComparisonRow, own: float) -> bool:
        return any(
            other.metric == row.metric
            and (value := rank(other)) is not None
            and other.macs <= row.macs
            and value >= own
            and (other.macs, value) != (row.macs, own)
            for other in rows
        )

    return [
        replace(row, pareto=(own := rank(row)) is not None and not beaten(row, own)) for row in rows
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
    scale = 100 if row.metric in FRACTIONS else 1
    spread = f" ± {scale * row.spread:.2f}" if row.spread is not None else ""
    unit = " %" if row.metric in FRACTIONS else ""
    kept = words.DASH if row.kept is None else f"{100 * row.kept:.1f}"
    return [
        words.DASH if row.value is None else f"{scale * row.value:.2f}{spread}{unit}",
        words.quantity(row.macs),
        kept,
        words.quantity(row.params),
        words.DASH if row.latency_ms is None else f"{row.latency_ms:.3g}",
        " ".join(map(str, row.seeds)),
        "yes" if row.pareto else "",
    ]
