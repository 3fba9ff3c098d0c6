"""One offline HTML file: Jinja2 with autoescape, plotly.js and the figures packed inside."""

from __future__ import annotations

import base64
import json
import math
import zlib
from collections.abc import Iterable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup
from plotly.offline import get_plotlyjs

from seprune.measure.latency import Latency
from seprune.measure.metric_names import metric_title, metric_value
from seprune.report import drawing, figures, gate_figures, sensitivity, summary, training, words
from seprune.report.artefacts import artefact_images, artefact_table
from seprune.report.axes import Figure
from seprune.report.card import data_name
from seprune.report.compare import Comparison
from seprune.report.measurement import BudgetReport, GateSummary, Measurement, Report
from seprune.runtime import files
from seprune.runtime.text import printable

SECTIONS = (
    ("summary", "Summary"),
    ("network", "Network"),
    ("accuracy", "Accuracy"),
    ("by-class", "By class"),
    ("training", "Training"),
    ("groups", "Groups"),
    ("sensitivity", "Sensitivity"),
    ("gates", "Gates"),
    ("classes", "Classes"),
    ("not-pruned", "Not pruned"),
    ("missing", "Not counted"),
    ("repeat", "Repeat"),
)
COMPARED = (
    ("summary", "Summary"),
    ("accuracy", "Accuracy"),
    ("latency", "Latency"),
    ("table", "Table"),
)


def write_html(report: Report, path: Path, others: Sequence[Report] = ()) -> None:
    """Write the page of one run to `path`; it needs no network and no other file.

    Args:
        others: runs whose points stand beside this one's in accuracy against MACs.
    """
    filled = {"accuracy": report.measurements, "groups": report.budgets, "gates": report.gates}
    ends = gate_figures.stage_ends(report.gates)
    by_class = _by_class(report)
    filled["by-class"] = by_class
    filled |= {"classes": ends, "not-pruned": report.not_pruned or report.budgets}
    filled |= {"sensitivity": report.sensitivity, "network": report.budgets}
    filled["training"] = report.training
    content = {
        "title": f"{report.name} – seprune",
        "sections": [(id, text) for id, text in SECTIONS if filled.get(id, True)],
        "report": report,
        "model": report.model.get("name") or "an unnamed network",
        "source": data_name(source) if (source := report.data.get("source")) else "",
        "others": [other.name for other in others],
        "tiles": [summary.tile(report, budget) for budget in report.budgets],
        "metric": metric_title(report.metric),
        "summary_head": _summary_head(report),
        "summary": [_summary_row(report, m) for m in report.measurements],
        "by_class": by_class,
        "epochs": training.table(report),
        "latency": _latency_tables(report),
        "not_timed": words.not_timed(report),
        "artefacts": artefact_table(report.artefacts, words.DASH) if report.artefacts else [],
        "artefact_images": artefact_images(report.artefacts),
        "where": words.timed_on(report),
        "counting": words.COUNTING,
        "group_names": _scored_groups(report),
        "group_rows": _group_rows(report.budgets),
        "sensitivity": _sensitivity(report),
        "remarks": words.gate_remarks(report.gates),
        "gate_rows": [_gate_row(gate) for gate in report.gates],
        "stage_ends": [gate.name for gate in ends],
        "examples": {g.name: [e for e in report.examples if e.gate == g.name] for g in ends},
        "shown_channels": gate_figures.SHOWN_CHANNELS,
        "not_pruned": [
            (why, len(names), ", ".join(names)) for why, names in words.not_pruned(report)
        ],
        "missing": words.missing(report),
        "choices": [(b.label, t) for b in report.budgets for t in words.plan(b)],
        "tuning": [(b.label, t) for b in report.budgets for t in words.tuning(b.tuning)],
        "setting": _setting(report),
        "seconds": [(stage, words.duration(time)) for stage, time in report.seconds.items()],
        "environment": [(key, _said(value)) for key, value in words.machine(report.environment)],
    }
    _write(path, "page.html.j2", content, _figures(report, ends, others))


def write_comparison(comparison: Comparison, path: Path) -> None:
    """Write the page of a comparison to `path`."""
    head, *rows = comparison.table()
    timed = "; ".join(sorted({row.timed_on for row in comparison.rows if row.timed_on}))
    content = {
        "title": f"{len(comparison.runs)} runs compared",
        "sections": [(id, text) for id, text in COMPARED if timed or id != "latency"],
        "metric": comparison.metric,
        "timed": timed,
        "runs": comparison.runs,
        "warnings": comparison.warnings,
        "head": head,
        "rows": rows,
    }
    shown = {"macs": figures.comparison(comparison)}
    if timed:
        shown["latency"] = figures.comparison(comparison, figures.LATENCY)
    _write(path, "compare.html.j2", content, shown)


def _write(path: Path, template: str, content: dict[str, Any], shown: dict[str, Figure]) -> None:
    page = _templates().get_template(template)
    text = page.render(
        **content,
        css=Markup(_asset("page.css")),
        js=Markup(_asset("page.js")),
        plotly=_packed_plotly(),
        figures=_pack(json.dumps(shown, separators=(",", ":"), allow_nan=False)),
    )
    files.write_bytes(path, text.encode("utf-8", errors="backslashreplace"))


@cache
def _templates() -> jinja2.Environment:
    return jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
        finalize=_plain,
    )


def _plain(value: Any) -> Any:
    """What a template shows, without control characters; our own markup stays as it is."""
    return printable(value) if isinstance(value, str) and not isinstance(value, Markup) else value


def _asset(name: str) -> str:
    return (Path(__file__).parent / name).read_text(encoding="utf-8")


@cache
def _packed_plotly() -> str:
    return _pack(get_plotlyjs())


def _pack(text: str) -> str:
    """Deflated and in base64: plotly.js shrinks from 4.8 to 1.9 MB; page.js unpacks it."""
    return base64.b64encode(zlib.compress(text.encode(), 9)).decode()


def _figures(
    report: Report, ends: Sequence[GateSummary], others: Sequence[Report]
) -> dict[str, Figure]:
    """Every figure by the key that the page asks for."""
    shown = {"accuracy": figures.accuracy(report, others)}
    shown |= {"loss": training.loss(report), "metric": training.metric(report)}
    shown["overview"] = gate_figures.overview(report.gates)
    for budget in report.budgets:
        shown[f"network/{budget.label}"] = drawing.network(budget)
        shown[f"widths/{budget.label}"] = figures.widths(budget)
        shown[f"scores/{budget.label}"] = figures.scores(budget)
        for cut in budget.groups:
            if any(score is not None for score in cut.scores):
                figure = figures.group(cut, budget.criterion)
                shown[f"group/{budget.label}/{cut.name}"] = figure
    for gate in report.gates:
        shown[f"gate/{gate.name}"] = gate_figures.gate(gate)
        for budget in report.budgets:
            shown[f"kept/{budget.label}/{gate.name}"] = gate_figures.kept(gate, budget)
    classes = report.data.get("classes") or []
    shown |= {f"excitation/{g.name}": gate_figures.excitation(g, classes) for g in ends}
    return shown


def _summary_head(report: Report) -> list[str]:
    first, *others = (metric_title(name) for name in report.metrics)
    return ["network", first, "change", *others, "loss", "MACs", "kept", "FLOPs", "parameters",
            "file"]  # fmt: skip


def _summary_row(report: Report, m: Measurement) -> list[str]:
    base = report.baseline
    return [
        words.stage_name(m),
        metric_value(m.metric, m.value),
        words.change(m, base),
        *(metric_value(name, m.metrics.get(name)) for name in report.metrics[1:]),
        words.DASH if m.loss is None else f"{m.loss:.3f}",
        words.quantity(m.macs),
        words.percent(words.fraction_of(m.macs, base.macs if base else None), 1),
        words.quantity(2 * m.macs),
        words.quantity(m.params),
        words.size(m.bytes),
    ]


def _by_class(report: Report) -> list[list[str]]:
    """The deciding metric by class, a column for each network; first the head.

    Classes that the last network loses most of come first.
    """
    shown = [m for m in report.measurements if m.by_class]
    if not shown:
        return []
    names = list(dict.fromkeys(name for m in shown for name in m.by_class))
    values = {name: [m.by_class.get(name) for m in shown] for name in names}

    def change(name: str) -> float:
        first, last = values[name][0], values[name][-1]
        return math.inf if first is None or last is None else last - first

    rows = [
        [name, *(metric_value(report.metric, value) for value in values[name])]
        for name in sorted(names, key=change)
    ]
    return [["class", *map(words.stage_name, shown)], *rows]


def _latency_tables(report: Report) -> list[dict[str, Any]]:
    """A table for each runtime that was timed: a row for a network, a column for a batch size."""
    everything = [x for m in report.measurements for x in m.latency]
    tables = []
    for runtime in dict.fromkeys(x.runtime for x in everything if x.median_ms is not None):
        batches = sorted({x.batch for x in everything if x.runtime == runtime})
        rows = []
        for m in report.measurements:
            by_batch = {x.batch: x for x in m.latency if x.runtime == runtime}
            if by_batch:
                base = None if m is report.baseline else report
                cells = [_latency_cell(base, by_batch.get(batch)) for batch in batches]
                rows.append([words.stage_name(m), *cells])
        head = [words.RUNTIMES.get(runtime, runtime), *(f"batch {batch}" for batch in batches)]
        tables.append({"head": head, "rows": rows})
    return tables


def _latency_cell(report: Report | None, latency: Latency | None) -> str:
    faster = words.speed_up(report, latency) if report and latency else None
    if latency is not None and latency.median_ms is None:
        return words.DASH  # the reason stands below the tables
    return words.milliseconds(latency) + (f" ({faster:.2f}x)" if faster else "")


def _scored_groups(report: Report) -> list[str]:
    """Groups with scores in any budget, in the order of the network."""
    scored = (g for b in report.budgets for g in b.groups if any(s is not None for s in g.scores))
    return list(dict.fromkeys(g.name for g in scored))


def _group_rows(budgets: Sequence[BudgetReport]) -> list[list[Any]]:
    by_budget = [{g.name: g for g in budget.groups} for budget in budgets]
    every = {g.name: g for budget in budgets for g in budget.groups}
    rows = []
    for name, first in every.items():
        left = [str(found[name].after) if name in found else words.DASH for found in by_budget]
        layers = _few(first.layers) if first.prunable else f"not pruned: {first.reason}"
        rows.append([name, first.before, *left, layers])
    return rows


def _few(names: Sequence[str]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 4 else ""
    return ", ".join(names[:3] if more else names) + more


def _sensitivity(report: Report) -> dict[str, Any]:
    found = report.sensitivity
    if not found:
        return {}
    parts = {"head": sensitivity.head(found), "rows": sensitivity.rows(found)}
    return {**parts, "explanation": sensitivity.EXPLANATION, "caption": sensitivity.caption(found)}


def _gate_row(gate: GateSummary) -> list[str]:
    means = [v for v in gate.statistics.get("mean", []) if v is not None]
    agreement = gate.rank_agreement
    return [
        gate.name if gate.runs else f"{gate.name} (never runs)",
        str(gate.channels),
        gate.squeeze,
        gate.activation,
        gate.placement,
        f"{sum(means) / len(means):.3f}" if means else words.DASH,
        words.DASH if gate.spread is None else f"{gate.spread:.3f}",
        words.DASH if agreement is None else f"{agreement:.2f}",
        words.percent(gate.saturated, 1),
    ]


def _setting(report: Report) -> Iterable[tuple[str, str]]:
    """Seed, model and data as name and text; long lists stay out."""
    yield "seed", str(report.seed)
    for part, facts in (("model", report.model), ("data", report.data)):
        for key, value in facts.items():
            long = key in ("classes", "skipped") and isinstance(value, list | dict)
            if not long and value not in ([], {}):
                yield f"{part} {key}", _said(value)


def _said(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key} {_said(item)}" for key, item in value.items())
    if isinstance(value, list):
        sizes = all(isinstance(item, int) for item in value)
        return ("x" if sizes else ", ").join(map(_said, value))
    return words.DASH if value is None else str(value)
