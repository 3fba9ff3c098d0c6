"""The report in a terminal: tables and small bars within 80 columns."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NoReturn

from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from seprune.errors import UsageError
from seprune.measure.latency import Latency
from seprune.measure.metric_names import metric_title, metric_value
from seprune.report import sensitivity, summary, words
from seprune.report.artefacts import artefact_images, artefact_table
from seprune.report.measurement import BudgetReport, GateSummary, GroupCut, Measurement, Report
from seprune.report.table import gates_of, ranks
from seprune.runtime.text import shell_word

BAR = 10
SHOWN = ("mean", "variance", "minimum", "maximum", "low", "high")


def show(
    report: Report, console: Console, *, group: str | None = None, gate: str | None = None
) -> None:
    """Print the report, or the channels of one group or gate.

    Raises:
        UsageError: no such group or gate; lists those there are.
    """
    if group is not None:
        console.print(group_channels(report, group))
    if gate is not None:
        console.print(gate_channels(report, gate))
    if group is None and gate is None:
        console.print(overview(report))


def overview(report: Report) -> RenderableType:
    """Everything in short: results, groups, gates, warnings."""
    line = summary.headline(report)
    first: list[RenderableType] = [Text(line, style="bold"), ""] if line else []
    parts: list[RenderableType] = [*first, results(report), *_latencies(report)]
    if report.artefacts:
        parts += ["", artefacts(report)]
    if report.budgets:
        parts += ["", groups(report)]
    if report.gates:
        parts += ["", gates(report.gates), *_list(words.gate_remarks(report.gates))]
    if report.sensitivity:
        parts += ["", losses(report)]
    for title, lines in (
        ("Plan", [f"{b.label}: {t}" for b in report.budgets for t in words.plan(b)]),
        (
            "Fine-tuning",
            [f"{b.label}: {t}" for b in report.budgets for t in words.tuning(b.tuning)],
        ),
        ("Warnings", report.warnings),
        ("Not pruned", [f"{why}: {', '.join(names)}" for why, names in words.not_pruned(report)]),
        ("Not in the numbers", words.missing(report) + words.not_timed(report)),
    ):
        if lines:
            parts += ["", Text(title, style="bold"), *_list(lines)]
    return Group(*parts)


def results(report: Report) -> RenderableType:
    """Baseline / pruned / fine-tuned: the metric, MACs, parameters, file size, latency."""
    source = report.data.get("source")
    on = "" if source is None else f" on {source}"
    table = _table(f"{report.name}: {report.model.get('name')}{on}")
    table.add_column("network", overflow="fold")
    for name in (metric_title(report.metric), "MACs", "kept", "params", "file", "latency"):
        table.add_column(name, justify="right", no_wrap=True)
    for m in report.measurements:
        end = m.stage == "fine-tuned" or m is report.baseline
        table.add_row(*_result_row(report, m), style="bold" if end else "")
    fastest = [x for m in report.measurements[:1] if (x := _first(m))]
    where = [
        f"latency: median ms at batch {x.batch} on {x.device}, {words.threads(x.threads)}; "
        "MACs of 1 image"
        for x in fastest
    ]
    return Group(table, *(Text(line, style="dim") for line in where))


def artefacts(report: Report) -> Group:
    """The files that the network was exported to."""
    table = _table("Exported files")
    head, *rows = artefact_table(report.artefacts, words.DASH)
    for number, name in enumerate(head):
        table.add_column(name, justify="right" if number else "left", overflow="fold")
    for row in rows:
        table.add_row(*row)
    images = artefact_images(report.artefacts)
    return Group(table, *(Text(line, style="dim") for line in [images] if line))


def losses(report: Report) -> Table:
    """What is lost without a part of one dependency group."""
    table = _table(f"Sensitivity {sensitivity.caption(report.sensitivity)}")
    for number, name in enumerate(sensitivity.head(report.sensitivity)):
        table.add_column(name, justify="right" if number else "left", overflow="fold")
    for row in sensitivity.rows(report.sensitivity):
        table.add_row(*row)
    return table


def _latencies(report: Report) -> Iterator[RenderableType]:
    """Every runtime and batch size, where more than one was measured."""
    every = [x for m in report.measurements for x in m.latency]
    batches = sorted({x.batch for x in every if x.median_ms is not None})
    if len({(x.runtime, x.batch) for x in every}) < 2 or not batches:
        return
    table = _table(f"Latency in ms on {words.timed_on(report)}")
    table.add_column("network", no_wrap=True)
    table.add_column("runtime", no_wrap=True)
    for batch in batches:
        table.add_column(f"batch {batch}", justify="right", no_wrap=True)
    for m in report.measurements:
        for number, runtime in enumerate(dict.fromkeys(x.runtime for x in m.latency)):
            known = {x.batch: x for x in m.latency if x.runtime == runtime}
            cells = [_time(report, m, known.get(batch)) for batch in batches]
            table.add_row("" if number else words.stage_name(m), runtime, *cells)
    yield ""
    yield table


def groups(report: Report) -> Table:
    """Width of every dependency group before and under each budget, with bars."""
    table = _table("Dependency groups")
    table.add_column("group", overflow="fold", min_width=16)
    table.add_column("before", justify="right")
    for budget in report.budgets[:3]:
        table.add_column(budget.label, no_wrap=True)
    every = {g.name: g for budget in report.budgets for g in budget.groups}
    for name, cut in every.items():
        cells = [_width(budget, name) for budget in report.budgets[:3]]
        table.add_row(Text(name), str(cut.before), *cells)
    if len(report.budgets) > 3:
        table.caption = f"the first 3 of {len(report.budgets)} budgets"
    return table


def gates(summaries: Sequence[GateSummary], title: str = "Gates") -> Table:
    """Mean, spread over images, saturation and rank agreement of every gate."""
    table = _table(title)
    table.add_column("gate", overflow="fold", min_width=16)
    for name in ("width", "mean", "spread", "saturated", "agreement"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("channels' means", no_wrap=True)
    for gate in summaries:
        means = sorted(v for v in gate.statistics.get("mean", []) if v is not None)
        agreement = gate.rank_agreement
        table.add_row(
            Text(gate.name if gate.runs else f"{gate.name} (never runs)"),
            str(gate.channels),
            f"{sum(means) / len(means):.3f}" if means else words.DASH,
            words.DASH if (spread := gate.spread) is None else f"{spread:.3f}",
            words.percent(gate.saturated, 0),
            words.DASH if agreement is None else f"{agreement:.2f}",
            Text(_sparkline(means), style="cyan"),
        )
    return table


def group_channels(report: Report, name: str) -> RenderableType:
    """Channels of one dependency group under every budget: score, rank, kept."""
    found = [(b, g) for b in report.budgets for g in b.groups if g.name == name]
    if not found:
        _unknown("group", name, [g.name for b in report.budgets[:1] for g in b.groups])
    return Group(*(_channels_of_group(report, budget, cut) for budget, cut in found))


def gate_channels(report: Report, name: str) -> Table:
    """Statistics of every channel of one gate."""
    gate = next((g for g in report.gates if g.name == name), None)
    if gate is None:
        _unknown("gate", name, [g.name for g in report.gates])
    table = _table(f"{gate.name}: {gate.squeeze}, {gate.activation}, {gate.placement}")
    table.add_column("channel", justify="right")
    shown = [key for key in SHOWN if key in gate.statistics]
    for key in shown:
        table.add_column(key, justify="right")
    table.add_column("", no_wrap=True)
    for channel in range(gate.channels):
        values = [gate.statistics[key][channel] for key in shown]
        mean = gate.statistics["mean"][channel] if "mean" in gate.statistics else None
        table.add_row(str(channel), *map(_number, values), _bar(mean or 0.0))
    return table


def _channels_of_group(report: Report, budget: BudgetReport, cut: GroupCut) -> Table:
    scaling = [g for g in gates_of(report, cut) if "mean" in g.statistics]
    table = _table(f"{cut.name}, {budget.label}: {cut.after} of {cut.before} kept")
    for heading in ("channel", "rank", "score", "gate mean"):
        table.add_column(heading, justify="right")
    table.add_column("", no_wrap=True)
    table.add_column("")
    kept, top = set(cut.keep), max((s for s in cut.scores if s is not None), default=0.0)
    for channel, rank in enumerate(ranks(cut)):
        score = cut.scores[channel] if cut.scores else None
        means = [m for g in scaling if (m := g.statistics["mean"][channel]) is not None]
        table.add_row(
            str(channel),
            words.DASH if rank is None else str(rank),
            _number(score),
            _number(sum(means) / len(means) if means else None),
            _bar((score or 0.0) / top if top > 0 else 0.0),
            Text("kept") if channel in kept else Text("removed", style="red"),
        )
    return table


def _result_row(report: Report, m: Measurement) -> Iterator[str | Text]:
    base = report.baseline
    yield Text(words.stage_name(m))
    yield metric_value(m.metric, m.value)
    yield words.quantity(m.macs)
    yield words.percent(words.fraction_of(m.macs, base.macs if base else None), 0)
    yield words.quantity(m.params)
    yield words.size(m.bytes)
    yield _time(report, m, _first(m))


def _time(report: Report, m: Measurement, latency: Latency | None) -> str:
    """Milliseconds, and how many times as fast as the baseline."""
    if latency is None or latency.median_ms is None:
        return words.DASH
    faster = words.speed_up(report, latency) if m is not report.baseline else None
    return f"{latency.median_ms:.3g}" + (f" ({faster:.1f}x)" if faster else "")


def _first(m: Measurement) -> Latency | None:
    """The eager latency at the smallest batch size."""
    measured = [x for x in m.latency if x.runtime == "eager" and x.median_ms is not None]
    return min(measured, key=lambda x: x.batch, default=None)


def _width(budget: BudgetReport, name: str) -> Text:
    cut = next((g for g in budget.groups if g.name == name), None)
    if cut is None:
        return Text(words.DASH)
    if not cut.prunable:
        return Text("whole", style="dim")
    return Text.assemble(f"{cut.after:>4} ", _bar(cut.after / cut.before if cut.before else 0.0))


def _unknown(kind: str, name: str, known: list[str]) -> NoReturn:
    raise UsageError(
        f"{kind} {name!r} is not in this report",
        why=f"it has {', '.join(known) or f'no {kind}s'}",
        fix=f"seprune report RUN --{kind} {shell_word(known[0]) if known else 'NAME'}",
    )


def _table(title: str) -> Table:
    return Table(
        title=Text(title, style="bold"), title_justify="left", box=None, padding=(0, 2, 0, 0)
    )


def _list(lines: Sequence[str]) -> Iterator[Table]:
    """Lines with a hanging indent."""
    for line in lines:
        row = Table.grid(padding=(0, 1, 0, 0))
        row.add_row("-", Text(line))
        yield row


def _number(value: float | None) -> str:
    return words.DASH if value is None else f"{value:.4g}"


def _bar(fraction: float) -> Text:
    """A bar of up to ten characters in steps of an eighth."""
    eighths = round(8 * BAR * min(1.0, max(0.0, fraction)))
    full, rest = divmod(eighths, 8)
    return Text(("█" * full + " ▏▎▍▌▋▊▉"[rest]).ljust(BAR)[:BAR], style="cyan")


def _sparkline(values: Sequence[float], width: int = 12) -> str:
    """Values in [0, 1] as columns of an eighth, thinned out to `width`."""
    if not values:
        return ""
    picked = [values[round(i * (len(values) - 1) / (width - 1))] for i in range(width)]
    return "".join("▁▂▃▄▅▆▇█"[min(7, max(0, int(8 * v)))] for v in picked)
