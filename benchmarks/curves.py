"""The README's picture: top-1 without training against the MACs kept, seprune and its rivals."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

import standings

NETWORK = "se_resnet20"
# method, how it was recovered, label, colour on light and on dark
LINES = (
    ("gate_logit joint trade, least 2", "refit", "seprune, refitted", "#2563eb", "#60a5fa"),
    ("l2", "refit", "l2, refitted by seprune", "#d97706", "#fbbf24"),
    ("gate_logit joint trade, least 2", "bn", "seprune, BN recalibrated", "#0f766e", "#2dd4bf"),
    ("taylor", "bn", "Taylor, BN recalibrated", "#9333ea", "#c084fc"),
    ("hessian", "bn", "Hessian, BN recalibrated", "#dc2626", "#f87171"),
    ("l2", "bn", "l2, BN recalibrated", "#6b7280", "#9ca3af"),
)
_LEFT, _TOP, _WIDE, _HIGH = 52, 30, 400, 260
_SLOPE = 0.9


def picture(rows: Sequence[standings.Row], *, dark: bool) -> str:
    """An SVG on a transparent ground; means over seeds, bars from the worst seed to the best."""
    ink, grid = ("#e5e7eb", "#374151") if dark else ("#1f2937", "#e5e7eb")
    mine = [row for row in rows if row["network"] == NETWORK]
    parts = [
        '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 700 350" font-family="sans-serif" '
        f'font-size="12" fill="{ink}">',
        f'<text x="{_LEFT}" y="16" font-size="14">SE-ResNet-20 on CIFAR-10: top-1 without '
        "training, by MACs kept</text>",
        *_axes(ink, grid, float(mine[0]["dense"])),
    ]
    for number, (method, column, label, light, night) in enumerate(LINES):
        colour = night if dark else light
        points = _points(mine, method, column)
        parts += _drawn(points, colour)
        y = _TOP + 12 + 22 * number
        parts.append(_line(_LEFT + _WIDE + 22, y, _LEFT + _WIDE + 44, y, colour, 2.5))
        parts.append(f'<text x="{_LEFT + _WIDE + 50}" y="{y + 4}">{label}</text>')
    return "\n".join([*parts, "</svg>"]) + "\n"


def light(kept: Mapping[str, Any]) -> str:
    """For a light page."""
    return picture(kept["rows"], dark=False)


def dark(kept: Mapping[str, Any]) -> str:
    """For a dark page."""
    return picture(kept["rows"], dark=True)


def _points(
    rows: Sequence[standings.Row], method: str, column: str
) -> dict[float, tuple[float, float, float]]:
    """Budget -> mean, worst and best seed."""
    by_budget: dict[float, list[float]] = {}
    for (_, budget, _), top1 in standings.accuracies(rows, method=method, column=column).items():
        by_budget.setdefault(budget, []).append(top1)
    return {b: (statistics.fmean(v), min(v), max(v)) for b, v in sorted(by_budget.items())}


def _x(budget: float) -> float:
    return round(_LEFT + _WIDE * (budget - 0.1) / _SLOPE, 1)


def _y(top1: float) -> float:
    return round(_TOP + _HIGH * (1 - top1), 1)


def _axes(ink: str, grid: str, dense: float) -> list[str]:
    parts = []
    for percent in range(0, 101, 20):
        y = _y(percent / 100)
        parts.append(_line(_LEFT, y, _LEFT + _WIDE, y, grid, 1))
        parts.append(f'<text x="{_LEFT - 8}" y="{y + 4}" text-anchor="end">{percent} %</text>')
    for budget in (0.15, 0.3, 0.5, 0.7, 1.0):
        x = _x(budget)
        parts.append(
            f'<text x="{x}" y="{_TOP + _HIGH + 20}" text-anchor="middle">{budget:g}</text>'
        )
    x, y = _x(1.0), _y(dense)
    parts.append(f'<circle cx="{x}" cy="{y}" r="5" fill="{ink}"/>')
    parts.append(f'<text x="{x}" y="{y - 10}" text-anchor="end">dense {100 * dense:.1f} %</text>')
    return parts


def _drawn(points: Mapping[float, tuple[float, float, float]], colour: str) -> list[str]:
    places = " ".join(f"{_x(b)},{_y(mean)}" for b, (mean, _, _) in points.items())
    parts = [f'<polyline points="{places}" fill="none" stroke="{colour}" stroke-width="2.5"/>']
    for budget, (mean, worst, best) in points.items():
        x = _x(budget)
        if not math.isclose(worst, best):
            parts.append(_line(x, _y(worst), x, _y(best), colour, 1.5))
        parts.append(f'<circle cx="{x}" cy="{_y(mean)}" r="3.5" fill="{colour}"/>')
    return parts


def _line(x1: float, y1: float, x2: float, y2: float, colour: str, width: float) -> str:
    return (
        f'<line x1="{x1}" y1="{y1}" x2="{x2}" y2="{y2}" stroke="{colour}" stroke-width="{width}"/>'
    )


SIX = (
    ("se_resnet20", 0.5), ("se_resnet20", 0.3), ("mobilenet_v3_small", 0.5),
    ("mobilenet_v3_small", 0.3), ("regnety", 0.5), ("regnety", 0.3),
)  # fmt: skip
NAMES = {
    "se_resnet20": "SE-ResNet-20", "mobilenet_v3_small": "MobileNetV3-Small",
    "regnety": "RegNetY-200MF",
}  # fmt: skip
RIVALS = ("l1", "l2", "bn_scale", "lamp", "fpgm", "taylor", "hessian", "random", "uniform")
_OURS = "gate_logit joint trade, least 2"


def six(kept: Mapping[str, Any]) -> str:
    """Six rows: before, without training, after a short tuning, and the best rival of each."""
    lines = [
        "| network | MACs kept | before | without training | best rival | short tuning | "
        "best rival |",
        "|---|---|---|---|---|---|---|",
    ]
    for network, budget in SIX:
        mine = [r for r in kept["rows"] if (r["network"], r["budget"]) == (network, budget)]
        cells = [f"{100 * mine[0]['dense']:.1f}"]
        for column in ("refit", "bn short"):
            mean = {m: _mean(mine, m, column) for m in (_OURS, *RIVALS)}
            rivals = {m: v for m, v in mean.items() if m != _OURS and v is not None}
            best = max(rivals, key=lambda m: rivals[m] or 0.0)
            paired = standings.paired(mine, _OURS, best, column=column)
            own = f"{100 * (mean[_OURS] or 0):.1f}"
            wins = paired is not None and paired.verdict == "wins"
            cells += [f"**{own}**" if wins else own, f"{100 * (rivals[best] or 0):.1f} `{best}`"]
        lines.append(f"| {NAMES[network]} | {budget} | " + " | ".join(cells) + " |")
    return "\n".join([*lines, standings.provenance(kept).rstrip()])


def _mean(rows: Sequence[standings.Row], method: str, column: str) -> float | None:
    values = list(standings.accuracies(rows, method=method, column=column).values())
    return statistics.fmean(values) if values else None
