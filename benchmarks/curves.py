"""The README's picture: top-1 without training against MACs and against time, and its table."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import standings

NETWORK = "se_resnet20"
BLUE, AMBER, GREEN, PURPLE, RED, GREY = (
    ("#2563eb", "#60a5fa"), ("#d97706", "#fbbf24"), ("#0f766e", "#2dd4bf"),
    ("#9333ea", "#c084fc"), ("#dc2626", "#f87171"), ("#6b7280", "#9ca3af"),
)  # fmt: skip
# label, colour on light and on dark, method, how it was recovered
BY_MACS = (
    ("seprune, refitted", BLUE, "gate_logit joint cost_aware, least 2", "refit"),
    ("l2, refitted by seprune", AMBER, "l2", "refit"),
    ("seprune, BN recalibrated", GREEN, "gate_logit joint cost_aware, least 2", "bn"),
    ("Taylor, BN recalibrated", PURPLE, "taylor", "bn"),
    ("Hessian, BN recalibrated", RED, "hessian", "bn"),
    ("l2, BN recalibrated", GREY, "l2", "bn"),
)
# label, colours, way of benchmarks/latency_accuracy.py
BY_TIME = (
    ("seprune, latency budget", BLUE, "latency"),
    ("seprune, MACs budget", GREEN, "macs fast"),
    ("torch-pruning l2, refitted by seprune", GREY, "torch-pruning l2"),
)
_TOP, _WIDE, _HIGH = 34, 390, 250
# x of a point, mean of the seeds, worst and best of them
Point = tuple[float, float, float, float]


@dataclass(frozen=True)
class Panel:
    """One pair of axes: where it stands, what x means, and the lines in it."""

    left: int
    title: str
    ticks: tuple[float, ...]
    percents: range
    dense: float
    lines: list[tuple[str, tuple[str, str], list[Point]]] = field(default_factory=list)

    def x(self, value: float) -> float:
        low, high = min(self.ticks) - 0.05, 1.0
        return round(self.left + _WIDE * (value - low) / (high - low), 1)

    def y(self, top1: float) -> float:
        low, high = self.percents[0], self.percents[-1]
        return round(_TOP + _HIGH * (high - 100 * top1) / (high - low), 1)

    def drawn(self, *, dark: bool) -> list[str]:
        """Axes, lines and, below, what each line is."""
        ink, grid = ("#e5e7eb", "#374151") if dark else ("#1f2937", "#e5e7eb")
        parts = [
            f'<text x="{self.left}" y="16" font-size="14">{self.title}</text>',
            *self._axes(ink, grid),
        ]
        for number, (label, colours, points) in enumerate(self.lines):
            colour = colours[dark]
            parts += self._line(points, colour)
            x, y = self.left + 200 * (number % 2), _TOP + _HIGH + 44 + 20 * (number // 2)
            parts.append(_stroke(x, y, x + 20, y, colour, 2.5))
            parts.append(f'<text x="{x + 26}" y="{y + 4}">{label}</text>')
        return parts

    def _axes(self, ink: str, grid: str) -> list[str]:
        parts = []
        for percent in self.percents:
            y = self.y(percent / 100)
            parts.append(_stroke(self.left, y, self.left + _WIDE, y, grid, 1))
            parts.append(
                f'<text x="{self.left - 8}" y="{y + 4}" text-anchor="end">{percent} %</text>'
            )
        for tick in self.ticks:
            parts.append(
                f'<text x="{self.x(tick)}" y="{_TOP + _HIGH + 20}" text-anchor="middle">'
                f"{tick:g}</text>"
            )
        x, y = self.x(1.0), self.y(self.dense)
        parts.append(f'<circle cx="{x}" cy="{y}" r="5" fill="{ink}"/>')
        dense = f"dense {100 * self.dense:.1f} %"
        parts.append(f'<text x="{x}" y="{y - 10}" text-anchor="end">{dense}</text>')
        return parts

    def _line(self, points: Sequence[Point], colour: str) -> list[str]:
        places = " ".join(f"{self.x(x)},{self.y(mean)}" for x, mean, _, _ in points)
        parts = [f'<polyline points="{places}" fill="none" stroke="{colour}" stroke-width="2.5"/>']
        for value, mean, worst, best in points:
            x = self.x(value)
            if not math.isclose(worst, best):
                parts.append(_stroke(x, self.y(worst), x, self.y(best), colour, 1.5))
            parts.append(f'<circle cx="{x}" cy="{self.y(mean)}" r="3.5" fill="{colour}"/>')
        return parts


def picture(kept: Mapping[str, Any], *, dark: bool) -> str:
    """An SVG on a transparent ground; means over seeds, bars from the worst seed to the best."""
    ink = "#e5e7eb" if dark else "#1f2937"
    parts = [
        '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 920 390" font-family="sans-serif" '
        f'font-size="12" fill="{ink}">',
        *by_macs(kept["rows"]).drawn(dark=dark),
        *by_time(kept["times"]).drawn(dark=dark),
    ]
    return "\n".join([*parts, "</svg>"]) + "\n"


def light(kept: Mapping[str, Any]) -> str:
    """For a light page."""
    return picture(kept, dark=False)


def dark(kept: Mapping[str, Any]) -> str:
    """For a dark page."""
    return picture(kept, dark=True)


def by_macs(rows: Sequence[standings.Row]) -> Panel:
    """The leaderboard's SE-ResNet-20: every method at every budget."""
    mine = [row for row in rows if row["network"] == NETWORK]
    title = "SE-ResNet-20, top-1 without training, by MACs kept"
    panel = Panel(52, title, (0.15, 0.3, 0.5, 0.7, 1.0), range(0, 101, 20), float(mine[0]["dense"]))
    for label, colours, method, column in BY_MACS:
        found: dict[float, list[tuple[float, float]]] = {}
        tops = standings.accuracies(mine, method=method, column=column)
        for (_, budget, _), top1 in tops.items():
            found.setdefault(budget, []).append((budget, top1))
        panel.lines.append((label, colours, _points(found)))
    return panel


def by_time(rows: Sequence[Mapping[str, str]]) -> Panel:
    """The same network timed in ONNX Runtime: budgets of time and of MACs, and torch-pruning."""
    title = "the same, by measured latency in ONNX Runtime"
    panel = Panel(
        520, title, (0.5, 0.6, 0.7, 0.8, 0.9, 1.0), range(70, 91, 5), float(rows[0]["dense_top1"])
    )
    for label, colours, way in BY_TIME:
        found: dict[float, list[tuple[float, float]]] = {}
        for row in rows:
            if row["way"] == way:
                size = float(row["size"])
                found.setdefault(size, []).append((float(row["latency"]), float(row["top1"])))
        panel.lines.append((label, colours, _points(found)))
    return panel


def _points(found: Mapping[float, Sequence[tuple[float, float]]]) -> list[Point]:
    """A point for each size: the means of its seeds, and their worst and best top-1."""
    points = []
    for pairs in found.values():
        xs, tops = zip(*pairs, strict=True)
        points.append((statistics.fmean(xs), statistics.fmean(tops), min(tops), max(tops)))
    return sorted(points)


def _stroke(x1: float, y1: float, x2: float, y2: float, colour: str, width: float) -> str:
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
_OURS = "gate_logit joint cost_aware, least 2"


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


def speeds(kept: Mapping[str, Any]) -> str:
    """A budget in time: the speed-up measured, what it costs, and torch-pruning at that speed."""
    rows = kept["rows"]
    ours, *_, rival = (line[2] for line in by_time(rows).lines)
    lines = [
        "| SE-ResNet-20, latency budget | speed-up measured | MACs kept | before | "
        "without training | torch-pruning `l2` at that speed, refitted |",
        "|---|---|---|---|---|---|",
    ]
    mine = [row for row in rows if row["way"] == "latency"]
    for size in sorted({float(row["size"]) for row in mine}, reverse=True):
        of_size = [row for row in mine if float(row["size"]) == size]
        macs, dense = (
            statistics.fmean(float(r[k]) for r in of_size) for k in ("macs", "dense_top1")
        )
        time, top1 = next(p[:2] for p in ours if math.isclose(p[1], _top1(of_size)))
        other = _between(rival, time)
        cells = (
            f"{size:g}", f"{1 / time:.2f}", f"{macs:.2f}", f"{100 * dense:.1f}",
            f"**{100 * top1:.1f}**" if other is None or top1 > other else f"{100 * top1:.1f}",
            "–" if other is None else f"{100 * other:.1f}",
        )  # fmt: skip
        lines.append("| " + " | ".join(cells) + " |")
    seeds = len({row["seed"] for row in mine})
    lines.append(
        f"\nTop-1 in %, means over {seeds} draws of calibration images; all of val/; ONNX Runtime, "
        "one thread, batch 1, timed in turns with the parent; –: not cut that far. "
        "`python benchmarks/latency_accuracy.py`."
    )
    return "\n".join(lines)


def _top1(rows: Sequence[Mapping[str, str]]) -> float:
    return statistics.fmean(float(row["top1"]) for row in rows)


def _between(points: Sequence[Point], x: float) -> float | None:
    """The line through the points at `x`; none where it does not reach."""
    for (x0, y0, *_), (x1, y1, *_) in pairwise(points):
        if x0 <= x <= x1:
            return y0 + (y1 - y0) * (x - x0) / (x1 - x0)
    return None
