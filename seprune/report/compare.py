"""Several runs in one table: means over seeds, spread, and who is on the Pareto front."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from seprune.measure.latency import Latency
from seprune.measure.metric_names import FRACTIONS, metric_title
from seprune.report import ways, words
from seprune.report.measurement import STAGES, Measurement, Report
from seprune.report.pareto import Point, on_front
from seprune.runtime import files
from seprune.runtime.text import csv_text

_Key = tuple[str, str, str, str, str, str, str]  # model, data, criterion, allocation, budget,
# stage, way
_Member = tuple[Report, Measurement]
TUNED = ("last epoch", "fine-tuned")
UNRECOVERED = ("pruned", "recalibrated")  # stages that a later one mends


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
    latency_ms: float | None  # at the smallest batch size
    data: str = ""  # what the metric was measured on, by a name that no other data has
    timed_on: str = ""  # runtime and batch size of the latency
    device: str = ""  # of the latency
    pareto: bool = False  # by MACs, among networks that were measured on the same data
    pareto_ms: bool = False  # by latency, among those that were timed in the same place, too
    label: str = ""  # how it was made, in words that tell it from the others


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
                lines.setdefault((row.label, row.stage), []).append(row)
        return dict(sorted(lines.items()))

    def interim(self, row: ComparisonRow) -> bool:
        """Whether the row is of a network that was recovered afterwards."""
        return row.stage in UNRECOVERED and any(
            (r.label, r.budget) == (row.label, row.budget)
            and STAGES.index(r.stage) > STAGES.index(row.stage)
            for r in self.rows
        )

    def fronts(self, latency: bool = False) -> dict[str, list[ComparisonRow]]:
        """Rows on a Pareto front, by what sets their front apart from the other ones."""
        found: dict[tuple[str, ...], list[ComparisonRow]] = {}
        for row in self.rows:
            if row.pareto_ms if latency else row.pareto:
                found.setdefault(_contest(row, latency), []).append(row)
        parts = [list(dict.fromkeys(part)) for part in zip(*found, strict=True)]
        return {
            " · ".join(own for own, all_ in zip(contest, parts, strict=True) if len(all_) > 1): rows
            for contest, rows in found.items()
        }

    def table(self) -> list[list[str]]:
        """Head and rows as people read them."""
        head = ["network", "made by", self.metric, "MACs", "kept %", "params"]
        rows = [[_network(row), row.label, *_numbers(row)] for row in self.rows]
        return [[*head, "ms", "seeds", "Pareto"], *rows]

    @property
    def metric(self) -> str:
        """The metric of the rows as people write it."""
        return " or ".join(dict.fromkeys(metric_title(row.metric) for row in self.rows)) or "top-1"


def compare(reports: Sequence[Report], names: Sequence[str] = ()) -> Comparison:
    """Put runs side by side; runs of one recipe that differ only in their seed become one row.

    Two runs with the same seed are two rows; a network that runs share is one, as the dense one is.

    Args:
        names: of the runs, each another. Empty: as their recipes call them.
    """
    named = [
        replace(report, name=name)
        for report, name in zip(reports, names or ways.run_names(reports), strict=True)
    ]
    data = ways.data_names(named)
    rows = _labelled([(key[-1], _row(key, members)) for key, members in _rows(named, data)])
    better = {m.metric: m.higher_is_better for r in reports for m in r.measurements}
    rows.sort(key=lambda r: (r.model, -r.macs, STAGES.index(r.stage), r.criterion, r.label))
    return Comparison(
        runs=[report.name for report in named],
        rows=[
            replace(row, pareto=fewest, pareto_ms=fastest)
            for row, fewest, fastest in zip(
                rows,
                on_front([_point(row, better, latency=False) for row in rows]),
                on_front([_point(row, better, latency=True) for row in rows]),
                strict=True,
            )
        ],
        warnings=_warnings(named, data),
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


def _rows(reports: Sequence[Report], data: Sequence[str]) -> Iterator[tuple[_Key, list[_Member]]]:
    """What each row is made of: measurements of several seeds, each once."""
    found: dict[_Key, list[list[_Member]]] = {}
    for report, on in zip(reports, data, strict=True):
        for m in report.measurements:
            places = found.setdefault(_key(report, m, on), [])
            own = (
                place
                for place in places
                if m.stage == "baseline"
                or report.seed not in {r.seed for r, _ in place}
                or any(_continued((report, m), other) for other in place)
            )
            if (place := next(own, None)) is None:
                places.append(place := [])
            place.append((report, m))
    for key, places in found.items():
        for place in places:
            yield key, place


def _continued(one: _Member, other: _Member) -> bool:
    """Whether one report went on from the network that the other ends with: a command's report has
    the numbers of the command before it."""
    (first, m), (second, n) = one, other
    numbers = [(x.metrics, x.loss, x.count, x.macs, x.params) for x in (m, n)]
    ends = first.measurements[-1] is m and second.measurements[-1] is n
    return first.seed == second.seed and numbers[0] == numbers[1] and not ends


def _key(report: Report, m: Measurement, data: str) -> _Key:
    budget, recipe = report.budget(m.budget), ways.values(report.recipe)
    made = (budget.criterion, budget.allocation) if budget else ("", "")
    way = ways.way(recipe, tuned=m.stage in TUNED) if budget else ways.dense_way(recipe)
    model = str(report.model.get("name", ""))
    return (model, data, *made, m.budget or "", m.stage, ways.key(way))


def _labelled(rows: Sequence[tuple[str, ComparisonRow]]) -> list[ComparisonRow]:
    """The rows, each with a label that no other row of its budget and stage has.

    Args:
        rows: each with its way.
    """
    named = [(way, replace(row, label=_made(row, rows))) for way, row in rows]
    at = Counter(map(_place, (row for _, row in named)))
    apart = {(label, stage) for (label, _, stage), number in at.items() if number > 1}
    made: dict[tuple[str, str], dict[str, str]] = {}  # what each of the ways has of its own
    for place in apart:
        found = list(dict.fromkeys(way for way, row in named if (row.label, row.stage) == place))
        told = ways.differences([json.loads(way) for way in found])
        made[place] = dict(zip(found, told, strict=True))
    twice = Counter((way, _place(row)) for way, row in named)
    done = []
    for way, row in named:
        place = row.label, row.stage
        way_label = made.get(place, {}).get(way, "")
        more = f" and {row.runs - 1} more" if row.runs > 1 else ""
        alone = twice[way, _place(row)] == 1 and (way_label or place not in apart)
        name = "" if alone else f"{row.names[0]}{more}"
        done.append(replace(row, label=" · ".join(filter(None, (row.label, way_label, name)))))
    return done


def _made(row: ComparisonRow, rows: Sequence[tuple[str, ComparisonRow]]) -> str:
    """Criterion, and model, data and allocation where the runs differ in them."""
    models = {r.model for _, r in rows}
    data = {r.data for _, r in rows if r.data}
    allocations = {r.allocation for _, r in rows if r.allocation}
    parts = [row.model] if len(models) > 1 else []
    parts += [row.data] if len(data) > 1 else []
    parts += [row.criterion, *([row.allocation] if len(allocations) > 1 else [])]
    return " · ".join(filter(None, parts))


def _place(row: ComparisonRow) -> tuple[str, str | None, str]:
    return (row.label, row.budget, row.stage)


def _row(key: _Key, members: Sequence[_Member]) -> ComparisonRow:
    model, data, criterion, allocation, budget, stage, _ = key
    by_seed = {r.seed: m for r, m in members}
    values = [m.value for m in by_seed.values() if m.value is not None]
    dense = [words.fraction_of(m.macs, r.baseline.macs) for r, m in members if r.baseline]
    kept = [f for f in dense if f is not None]
    seeds = sorted({r.seed for r, _ in members})
    timed = [t for r, m in members if (t := _first_latency(r, m)) is not None]
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
        latency_ms=fmean(t.median_ms or 0.0 for t in timed) if timed else None,
        data=data,
        timed_on=" and ".join(dict.fromkeys(map(_timed_on, timed))),
        device=" and ".join(dict.fromkeys(map(_device, timed))),
    )


def _first_latency(report: Report, m: Measurement) -> Latency | None:
    """In which time the network runs on the runtime asked for, at the smallest batch size."""
    known = [x for x in m.latency if x.median_ms is not None]
    runtime = report.runtime if report.runtime in {x.runtime for x in known} else "eager"
    own = (x for x in known if x.runtime == runtime)
    return min(own, key=lambda x: x.batch, default=None)


def _timed_on(latency: Latency) -> str:
    return f"{latency.runtime}, batch {latency.batch}"


def _device(latency: Latency) -> str:
    return f"{latency.device}, {words.threads(latency.threads)}"


def _contest(row: ComparisonRow, latency: bool) -> tuple[str, ...]:
    """What networks must have in common to be on one Pareto front."""
    place = (row.timed_on, row.device) if latency else ()
    return (metric_title(row.metric), row.data, *place)


def _point(row: ComparisonRow, better: Mapping[str, bool], latency: bool) -> Point | None:
    """Where a row stands among those it is compared with.

    Args:
        better: whether more of a metric is better.
    """
    cost = row.latency_ms if latency else row.macs
    if row.value is None or cost is None:
        return None
    return Point(_contest(row, latency), cost, row.value if better[row.metric] else -row.value)


def _warnings(reports: Sequence[Report], data: Sequence[str]) -> list[str]:
    notes = []
    if len(sources := sorted(set(filter(None, data)))) > 1:
        notes.append(
            f"The runs were measured on different data ({', '.join(sources)}): "
            "their accuracies do not compare, and each data set has a Pareto front of its own."
        )
    timed = [t for r in reports for m in r.measurements if (t := _first_latency(r, m)) is not None]
    if len(places := sorted(set(map(_device, timed)))) > 1:
        notes.append(
            f"Latencies come from different devices ({'; '.join(places)}) and do not compare."
        )
    if len(runtimes := sorted(set(map(_timed_on, timed)))) > 1:
        notes.append(
            f"Latencies are of different runtimes ({'; '.join(runtimes)}) and do not compare."
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
