"""Figures of the results and of the plan, as plain plotly dicts."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np

from seprune.measure.metric_names import FRACTIONS, metric_title
from seprune.report import axes, words
from seprune.report.axes import COLOURS, Figure
from seprune.report.compare import UNRECOVERED, Comparison, ComparisonRow
from seprune.report.measurement import STAGES, BudgetReport, GroupCut, Measurement, Report
from seprune.report.words import fraction_of

MARKS = {  # symbol and dash
    "baseline": ("star", "solid"),
    "pruned": ("circle-open", "dot"),
    "recalibrated": ("diamond-open", "dash"),
    "refitted": ("square-open", "dash"),
    "reconstructed": ("triangle-up-open", "dash"),
    "drawn anew": ("x-open", "dot"),
    "last epoch": ("circle-open", "solid"),
    "fine-tuned": ("circle", "solid"),
}
OTHERS = ("@red", "@brown", "@pink", "@olive")  # colours of runs compared
STAGE_COLOURS = dict(
    zip(STAGES, ("@ink", "@orange", "@violet", "@green", "@olive", "@brown", "@pink", "@blue"))
)


_SPAN = 0.01  # of the baseline's value: the axis shows at least so much around it


def accuracy(report: Report, others: Sequence[Report] = ()) -> Figure:
    """The metric against the MACs kept, one line a stage, over the run's budgets.

    Other runs have a colour each; their MACs too are shares of this run's baseline.
    """
    base = report.baseline
    dense = base.macs if base else None
    traces = [
        _stage_line(found, dense, STAGE_COLOURS[stage]) | {"name": stage} | _shown(found, report)
        for stage, found in _by_stage(report)
    ]
    for number, other in enumerate(others):
        colour = OTHERS[number % len(OTHERS)]
        for stage, found in _by_stage(other):
            name = axes.label(f"{other.name} · {stage}")
            line = _stage_line(found, dense or found[0].macs, colour) | {"name": name}
            traces.append(line | _shown(found, other))
    layout = axes.layout("MACs kept (%)", _title(report.metric), height=420 if others else 380)
    if base and base.value is not None:
        value = _scale(base.metric) * base.value
        layout["shapes"] = [axes.line(y=value)]
        span = _SPAN * abs(value)  # networks that are alike are drawn alike
        layout["yaxis"]["autorangeoptions"] = {"include": [value - span, value + span]}
    return {"data": traces, "layout": layout}


def _shown(found: Sequence[Measurement], report: Report) -> Figure:
    """Networks before their recovery are not shown at first: they would squash the axis."""
    ends = [words.last_of(report, b) for m in found if (b := report.budget(m.budget))]
    interim = found[0].stage in UNRECOVERED and found[0].stage not in {e.stage for e in ends if e}
    return {"visible": False} if interim else {}


def _title(metric: str) -> str:
    """Of the axis."""
    title = axes.label(metric_title(metric))
    return f"{title} (%)" if metric in FRACTIONS else title


def _scale(metric: str) -> int:
    """Fractions are drawn in percent."""
    return 100 if metric in FRACTIONS else 1


def _by_stage(report: Report) -> Iterator[tuple[str, list[Measurement]]]:
    for stage in STAGES:
        found = [m for m in report.measurements if m.stage == stage and m.value is not None]
        if found:
            yield stage, sorted(found, key=lambda m: m.macs)


def _stage_line(found: Sequence[Measurement], dense: int | None, colour: str) -> Figure:
    symbol, dash = MARKS[found[0].stage]
    return {
        "type": "scatter",
        "mode": "markers" if len(found) == 1 else "lines+markers",
        "x": [axes.rounded(100 * (fraction_of(m.macs, dense) or 0)) for m in found],
        "y": [axes.rounded(_scale(m.metric) * (m.value or 0)) for m in found],
        "text": [f"{m.macs:,} MACs" for m in found],
        "hovertemplate": f"%{{y:.2f}} {_title(found[0].metric)} at %{{x:.1f}} % of the MACs"
        "<br>%{text}",
        "marker": {"size": 9, "color": colour, "symbol": symbol},
        "line": {"color": colour, "width": 2, "dash": dash},
    }


def widths(budget: BudgetReport) -> Figure:
    """What is left of every group, in percent of its units."""
    groups = budget.groups
    trace = {
        "type": "bar",
        "orientation": "h",
        "x": [axes.rounded(100 * g.after / g.before) if g.before else 0 for g in groups],
        "y": [axes.label(g.name) for g in groups],
        "customdata": [[g.before, g.after] for g in groups],
        "hovertemplate": "%{y}<br>%{customdata[1]} of %{customdata[0]} channels<extra></extra>",
        "text": [f"{g.after} / {g.before}" for g in groups],
        "textposition": "auto",
        "insidetextanchor": "start",
        "insidetextfont": {"color": "@card"},
        "marker": {"color": ["@blue" if g.prunable else "@muted" for g in groups]},
    }
    layout = axes.rows("width kept (%)", [g.name for g in groups])
    layout["xaxis"]["range"] = [0, 104]
    return {"data": [trace], "layout": layout}


def scores(budget: BudgetReport) -> Figure:
    """Distribution of scores in every group (5, 25, 50, 75, 95 %) and the cut."""
    groups = [g for g in budget.groups if axes.finite(g.scores).size]
    spans = [np.quantile(axes.finite(g.scores), [0.05, 0.25, 0.5, 0.75, 0.95]) for g in groups]
    names = [axes.label(g.name) for g in groups]
    box: dict[str, Any] = {
        "type": "box",
        "orientation": "h",
        "y": names,
        "name": "scores",
        "line": {"color": "@blue", "width": 1.2},
        "fillcolor": "@blue-soft",
        "hoverinfo": "x+y",
    }
    for number, key in enumerate(("lowerfence", "q1", "median", "q3", "upperfence")):
        box[key] = [axes.short(span[number]) for span in spans]
    cuts = [(axes.label(g.name), _cut(g)) for g in groups]
    marks = {
        "type": "scatter",
        "mode": "markers",
        "name": "cut",
        "x": [axes.short(at) for _, at in cuts if at is not None],
        "y": [name for name, at in cuts if at is not None],
        "marker": {"symbol": "line-ns", "size": 14, "line": {"color": "@orange", "width": 3}},
        "hovertemplate": "%{y}<br>removed up to %{x:.4g}<extra></extra>",
    }
    layout = axes.rows(f"score ({axes.label(budget.criterion)})", [g.name for g in budget.groups])
    everything = np.concatenate([axes.finite(g.scores) for g in groups] or [np.zeros(1)])
    layout["xaxis"] |= axes.scale(everything)
    return {"data": [box, marks], "layout": layout}


def group(cut: GroupCut, criterion: str) -> Figure:
    """How many units of one group have which score, kept and removed."""
    values = np.array([math.nan if s is None else s for s in cut.scores], dtype=float)
    kept = np.zeros(len(values), dtype=bool)
    kept[cut.keep] = True
    axis = axes.scale(axes.finite(cut.scores))
    if logarithmic := axis.get("type") == "log":
        values = np.log10(values)
    edges = np.histogram_bin_edges(values[np.isfinite(values)], bins=min(40, 8 + len(values) // 8))
    middles = (edges[1:] + edges[:-1]) / 2
    traces = [
        {
            "type": "bar",
            "name": name,
            "x": [axes.short(10**m if logarithmic else m) for m in middles],
            "y": np.histogram(values[which & np.isfinite(values)], bins=edges)[0].tolist(),
            "marker": {"color": colour},
            "hovertemplate": "%{y} channels at %{x:.3g}",
        }
        for name, which, colour in (("kept", kept, "@blue"), ("removed", ~kept, "@orange"))
    ]
    if logarithmic:
        for trace in traces:
            trace["width"] = [axes.short(10**b - 10**a) for a, b in pairwise(edges)]
    layout = axes.layout(f"score ({axes.label(criterion)})", "channels", height=300)
    layout |= {"barmode": "stack", "bargap": 0.04}
    layout["xaxis"] |= axis
    if (at := _cut(cut)) is not None:
        layout["shapes"] = [axes.line(x=at)]
    return {"data": traces, "layout": layout}


@dataclass(frozen=True)
class CostAxis:
    """What networks are compared by: the axis of a comparison."""

    title: str
    unit: str
    of: Callable[[ComparisonRow], float | None]
    is_latency: bool = False


MACS = CostAxis("MACs (M)", "M MACs", lambda row: row.macs / 1e6)
LATENCY = CostAxis("latency (ms)", "ms", lambda row: row.latency_ms, is_latency=True)


def comparison(compared: Comparison, cost: CostAxis = MACS) -> Figure:
    """Accuracy against a cost over runs: a colour for each way, a mark for each stage."""
    lines = {
        k: [r for r in rows if cost.of(r) is not None] for k, rows in compared.series().items()
    }
    series = {
        key: sorted(rows, key=lambda r: cost.of(r) or 0) for key, rows in lines.items() if rows
    }
    ways = list(dict.fromkeys(made for made, _ in series))
    colours = {made: COLOURS[n % len(COLOURS)] if made else "@ink" for n, made in enumerate(ways)}
    broad = {"mode": "lines", "line": {"width": 9, "color": "@front"}, "hoverinfo": "skip"}
    traces = [
        _points(
            ": ".join(filter(None, ("Pareto front", apart))),
            sorted(front, key=lambda r: cost.of(r) or 0),
            cost,
        )
        | broad
        for apart, front in compared.fronts(cost.is_latency).items()
    ]
    for (made, stage), rows in series.items():
        colour, (symbol, dash) = colours[made], MARKS[stage]
        scale = _scale(rows[0].metric)
        spread = [axes.rounded(scale * (row.spread or 0)) for row in rows]
        traces.append(
            _points(" · ".join(filter(None, (made, stage))), rows, cost)
            | {
                "mode": "lines+markers",
                "error_y": {"array": spread, "visible": any(spread), "color": colour},
                "text": [
                    axes.label(f"{row.stage} {row.budget or ''}, runs: {row.runs}") for row in rows
                ],
                "hovertemplate": f"%{{y:.2f}} at %{{x:.4g}} {cost.unit}<br>%{{text}}",
                "marker": {"size": 9, "color": colour, "symbol": symbol},
                "line": {"width": 1.5, "color": colour, "dash": dash},
                **({"visible": False} if all(map(compared.interim, rows)) else {}),
            }
        )
    title = " or ".join(dict.fromkeys(_title(row.metric) for row in compared.rows))
    return {"data": traces, "layout": axes.layout(cost.title, title, height=460)}


def _points(name: str, rows: Sequence[ComparisonRow], cost: CostAxis) -> dict[str, Any]:
    return {
        "type": "scatter",
        "name": axes.label(name),
        "x": [axes.short(cost.of(row) or 0) for row in rows],
        "y": [axes.rounded(_scale(row.metric) * (row.value or 0)) for row in rows],
    }


def _cut(cut: GroupCut) -> float | None:
    """The highest score among the removed units."""
    kept = set(cut.keep)
    gone = [s for i, s in enumerate(cut.scores) if i not in kept and s is not None]
    return max(gone, default=None)
