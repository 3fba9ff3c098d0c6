"""A small drawing of the network: every dependency group as wide as it was and as it is."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from seprune.report import axes
from seprune.report.axes import Figure
from seprune.report.measurement import BudgetReport, GroupCut

MOST_TICKS = 8  # names under the drawing


def network(budget: BudgetReport) -> Figure:
    """From input to output a column for each dependency group, its height the number of units.

    The grey column is the width before, the coloured one in its middle the width after.
    """
    groups = [g for g in budget.groups if g.before]
    hover = "%{customdata[0]}<br>%{customdata[2]} of %{customdata[1]} kept<extra></extra>"
    facts = [[axes.label(g.name), g.before, g.after] for g in groups]
    colours = ["@blue" if g.prunable else "@ink" for g in groups]
    traces = [
        _columns("before", [g.before for g in groups], "@was") | {"hoverinfo": "skip"},
        _columns("after", [g.after for g in groups], colours)
        | {"customdata": facts, "hovertemplate": hover},
    ]
    layout = axes.layout("", "", height=200)
    layout |= {"barmode": "overlay", "bargap": 0.15, "showlegend": False}
    layout["margin"] = {"l": 8, "r": 8, "t": 8, "b": 8}
    layout["yaxis"] |= {"visible": False}
    layout["xaxis"] |= {"showgrid": False, "range": [-0.6, len(groups) - 0.4], **_ticks(groups)}
    return {"data": traces, "layout": layout}


def _columns(name: str, heights: Sequence[int], colour: Any) -> dict[str, Any]:
    """Bars around the middle line."""
    return {
        "type": "bar",
        "name": name,
        "x": list(range(len(heights))),
        "base": [-h / 2 for h in heights],
        "y": list(heights),
        "marker": {"color": colour},
    }


def _ticks(groups: Sequence[GroupCut]) -> dict[str, Any]:
    """A name where the part of the network (the first word of a group's name) changes."""
    parts = [g.name.split(".")[0] for g in groups]
    starts = [n for n, part in enumerate(parts) if n == 0 or part != parts[n - 1]]
    if len(starts) > MOST_TICKS:
        starts = []
    return {
        "tickvals": starts,
        "ticktext": [axes.label(parts[n]) for n in starts],
        "ticks": "",
        "tickangle": 0,
    }
