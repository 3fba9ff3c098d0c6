"""Figures of what the gates say, as plain plotly dicts."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np

from seprune.report import axes
from seprune.report.axes import COLOURS, HEAT, Array, Figure
from seprune.report.measurement import BudgetReport, GateSummary
from seprune.runtime.text import null_for_nan

SHOWN_CHANNELS = 256  # of a class curve; more is not seen and not smooth to scroll
SHOWN_CLASSES = 3  # switched on at first, the others wait in the legend
NARROWEST = 0.2  # of the axis of excitations: gates live in [0, 1]
POSITIONS = 100  # of the overview: percentiles of a gate's channels


def overview(gates: Sequence[GateSummary]) -> Figure:
    """All gates at once: rows are gates, columns percentiles of the channels' mean."""
    shown = [g for g in gates if g.runs and axes.finite(g.statistics.get("mean", [])).size]
    steps = np.linspace(0, 1, POSITIONS)
    rows = [np.quantile(axes.finite(g.statistics["mean"]), steps).round(3).tolist() for g in shown]
    trace = {
        "type": "heatmap",
        "z": rows,
        "x": [axes.rounded(100 * s) for s in steps],
        "y": [axes.label(g.name) for g in shown],
        "colorscale": HEAT,
        **_heat_range(rows),
        "colorbar": _colour_bar("mean") | {"len": max(60, min(180, 22 * len(shown)))},
        "hovertemplate": "%{y}<br>%{x:.0f} % of the channels are below %{z:.3f}<extra></extra>",
    }
    layout = axes.rows("channels by rising mean (%)", [g.name for g in shown])
    return {"data": [trace], "layout": layout}


def gate(summary: GateSummary) -> Figure:
    """The channels of one gate by rising mean: mean, spread and saturation."""
    order = _order(summary)
    given = {
        name: np.array([math.nan if v is None else v for v in values], dtype=float)
        for name, values in summary.statistics.items()
    }
    rows = {"above 0.95": given.get("high"), "below 0.05": given.get("low")}
    rows |= {
        "spread": np.sqrt(given["variance"]) if "variance" in given else None,
        "mean": given.get("mean"),
    }
    there = {k: v[order].round(4) for k, v in rows.items() if v is not None and len(v) > 0}
    plain = [null_for_nan(row.tolist()) for row in there.values()]
    trace = {
        "type": "heatmap",
        "z": plain,
        "y": list(there),
        "customdata": [order.tolist()] * len(there),
        "colorscale": HEAT,
        **_heat_range(plain),
        "colorbar": _colour_bar(""),
        "hovertemplate": "channel %{customdata}<br>%{y} %{z:.3f}<extra></extra>",
    }
    layout = axes.layout("channels by rising mean", "", height=300)
    layout["yaxis2"] = layout["yaxis"] | {"showgrid": False, "domain": [0, 0.15]}
    layout["yaxis"] |= {"showgrid": False, "domain": [0.22, 1]}
    layout["xaxis"] |= {"showgrid": False, "anchor": "y2"}
    layout["margin"]["t"] = 12
    return {"data": [trace], "layout": layout}


def kept(summary: GateSummary, budget: BudgetReport) -> Figure:
    """A row to put under `gate`: which of its channels the budget keeps."""
    names = set(summary.groups)
    cut = next((g for g in budget.groups if g.name in names and g.before == summary.channels), None)
    if cut is None:
        return {"data": []}
    mask = np.zeros(summary.channels, dtype=int)
    mask[cut.keep] = 1
    order = _order(summary)
    trace = {
        "type": "heatmap",
        "z": [mask[order].tolist()],
        "y": ["kept"],
        "yaxis": "y2",
        "customdata": [order.tolist()],
        "text": [["kept" if mask[i] else "removed" for i in order]],
        "colorscale": [[0, "@orange"], [0.5, "@orange"], [0.5, "@blue"], [1, "@blue"]],
        "zmin": 0,
        "zmax": 1,
        "showscale": False,
        "hovertemplate": "channel %{customdata}<br>%{text}<extra></extra>",
    }
    return {"data": [trace]}


def excitation(summary: GateSummary, classes: Sequence[str]) -> Figure:
    """Class means against the mean over all classes (SE paper, figures 6 and 7)."""
    known = summary.statistics.get("class_average") or summary.statistics["mean"]
    mean = np.array(known, dtype=float)
    by_class = np.array(summary.class_mean, dtype=float)
    order = np.argsort(mean, kind="stable")
    order = order[np.unique(np.linspace(0, len(order) - 1, SHOWN_CHANNELS).round().astype(int))]
    x = list(range(len(order)))
    traces: list[dict[str, Any]] = _band(mean[order], within_class(summary)[order], x)
    strangeness = np.argsort(-np.nan_to_num(np.abs(by_class - mean).mean(1)), kind="stable")
    places = {int(row): place for place, row in enumerate(strangeness)}
    for number, row in enumerate(by_class):
        name = classes[number] if number < len(classes) else f"class {number}"
        traces.append(
            {
                "type": "scatter",
                "mode": "lines",
                "name": axes.label(name),
                "x": x,
                "y": axes.listed(row[order]),
                "line": {"width": 1.2, "color": COLOURS[places[number] % len(COLOURS)]},
                "visible": True if places[number] < SHOWN_CLASSES else "legendonly",
            }
        )
    traces.append(
        {
            "type": "scatter",
            "mode": "lines",
            "name": "all classes",
            "legendrank": 1,
            "x": x,
            "y": axes.listed(mean[order]),
            "customdata": order.tolist(),
            "hovertemplate": "%{y:.3f} (channel %{customdata})",
            "line": {"width": 2.4, "color": "@ink"},
        }
    )
    layout = axes.layout("channels by rising mean", "excitation", height=360)
    layout["hovermode"] = "x unified"
    layout["yaxis"]["range"] = _not_too_narrow(np.concatenate([by_class.ravel(), mean]))
    return {"data": traces, "layout": layout}


def _not_too_narrow(values: Array) -> list[float]:
    """A range that holds the values and does not blow tiny differences up."""
    low, high = float(np.nanmin(values)), float(np.nanmax(values))
    margin = max(0.05 * (high - low), (NARROWEST - (high - low)) / 2)
    return [axes.short(low - margin), axes.short(high + margin)]


def within_class(summary: GateSummary) -> Array:
    """Standard deviation within a class, one value a channel; 0 where it is not known."""
    variance = summary.statistics.get("within_class") or [0.0] * summary.channels
    spread: Array = np.sqrt(np.array(variance, dtype=float))
    return spread


def stage_ends(gates: Sequence[GateSummary]) -> list[GateSummary]:
    """The last gate of each stage: of each stretch of gates with the same width."""
    useful = [g for g in gates if g.runs and g.class_mean and "mean" in g.statistics]
    ends = [a for a, b in pairwise(useful) if a.channels != b.channels]
    return ends + useful[-1:]


def _band(mean: Any, spread: Any, x: list[int]) -> list[dict[str, Any]]:
    common = {"type": "scatter", "mode": "lines", "line": {"width": 0}, "hoverinfo": "skip", "x": x}
    return [
        common | {"y": axes.listed(mean - spread), "showlegend": False},
        common
        | {
            "y": axes.listed(mean + spread),
            "fill": "tonexty",
            "fillcolor": "@band",
            "name": "± spread",
            "legendrank": 2,
        },
    ]


def _order(summary: GateSummary) -> Array:
    mean = summary.statistics.get("mean")
    if not mean:
        return np.arange(summary.channels)
    return np.argsort(np.array(mean, dtype=float), kind="stable")


def _heat_range(rows: Sequence[Sequence[float | None]]) -> dict[str, float]:
    """[0, 1], wider where a gate leaves it (tanh, ReLU)."""
    values = [v for row in rows for v in row if v is not None]
    return {"zmin": min([0.0, *values]), "zmax": max([1.0, *values])}


def _colour_bar(title: str) -> dict[str, Any]:
    place = {"lenmode": "pixels", "len": 180, "y": 1, "yanchor": "top"}
    return place | {"thickness": 10, "outlinewidth": 0, "title": {"text": title, "side": "right"}}
