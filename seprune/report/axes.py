"""What the figures share: layout, axes, marks, and numbers as short as the eye needs.

A colour `@name` is the page's CSS variable `--name`, put in when the figure is drawn.
"""

from __future__ import annotations

import html
import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from seprune.runtime.text import null_for_nan, printable

Figure = dict[str, Any]
Array = np.ndarray[Any, np.dtype[Any]]

HEAT = [[0, "@heat-0"], [0.35, "@heat-1"], [0.7, "@heat-2"], [1, "@heat-3"]]
COLOURS = ("@blue", "@orange", "@green", "@red", "@violet", "@brown", "@pink", "@olive")


def layout(x: str, y: str, *, height: int) -> dict[str, Any]:
    axis = {
        "gridcolor": "@grid",
        "linecolor": "@grid",
        "zeroline": False,
        "automargin": True,
        "title": {"standoff": 12},
    }
    return {
        "height": height,
        "margin": {"l": 8, "r": 12, "t": 36, "b": 8},
        "paper_bgcolor": "rgba(0,0,0,0)",
        "plot_bgcolor": "rgba(0,0,0,0)",
        "font": {"color": "@ink", "size": 12},
        "hoverlabel": {"bgcolor": "@card", "font": {"color": "@ink"}, "bordercolor": "@grid"},
        "legend": {
            "orientation": "h",
            "traceorder": "normal",
            "y": 1.02,
            "yanchor": "bottom",
            "x": 0,
        },
        "xaxis": axis | {"title": {"text": x, "standoff": 12}},
        "yaxis": axis | {"title": {"text": y, "standoff": 12}},
    }


def rows(x: str, names: Sequence[str]) -> dict[str, Any]:
    """A layout with one line of text for each name, the first on top."""
    figure = layout(x, "", height=90 + 22 * len(names))
    figure["showlegend"] = False
    figure["margin"] = {"l": 8, "r": 12, "t": 8, "b": 12}
    figure["xaxis"]["side"] = "top"  # in sight before a long list is scrolled
    figure["yaxis"] |= {
        "type": "category",
        "range": [len(names) - 0.5, -0.5],
        "categoryorder": "array",
        "categoryarray": [label(n) for n in names],
        "showgrid": False,
        "tickvals": [label(n) for n in names],
        "ticktext": [label(n if len(n) <= 22 else "…" + n[-21:]) for n in names],
    }
    return figure


def scale(values: Array) -> dict[str, Any]:
    """A logarithmic axis where positive scores span more than two decades."""
    if values.size and values.min() > 0 and values.max() > 100 * values.min():
        decades = math.log10(values.max() / values.min())
        step = max(1, math.ceil(decades / 6))
        return {"type": "log", "exponentformat": "power", "dtick": step, "tickangle": 0}
    return {}


def line(**at: float) -> dict[str, Any]:
    """A dotted line through the whole plot at x = or y =."""
    shape: dict[str, Any] = {"type": "line", "line": {"color": "@muted", "dash": "dot", "width": 2}}
    if "y" in at:
        return shape | {"xref": "paper", "x0": 0, "x1": 1, "y0": at["y"], "y1": at["y"]}
    return shape | {"yref": "paper", "y0": 0, "y1": 1, "x0": at["x"], "x1": at["x"]}


def finite(values: Sequence[float | None]) -> Array:
    array = np.array([math.nan if v is None else v for v in values], dtype=float)
    known: Array = array[np.isfinite(array)]
    return known


def listed(values: Array) -> list[float | None]:
    found: list[float | None] = null_for_nan(values.round(4).tolist())
    return found


def rounded(value: float) -> float:
    return round(float(value), 3)


def short(value: float) -> float:
    """Four significant digits: the page shows no more."""
    return float(f"{value:.4g}")


def label(name: str) -> str:
    """Plotly reads markup in labels; names are data."""
    return html.escape(printable(name), quote=False)
