"""What the leaderboard's rows say: means, spreads, paired differences, tables and a figure.

A row is one accuracy: network, method, budget, seed, column (how it was recovered). Two methods are
compared seed by seed, on the same calibration images and the same order of training; `a` wins over
`b` where the mean of the differences is larger than their standard deviation.
"""

from __future__ import annotations

import math
import re
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

Row = Mapping[str, Any]
COLUMNS = {
    "cut": "cut alone",
    "bn": "BN recalibrated",
    "refit": "refitted",
    "bn short": "BN, short tuning",
    "refit short": "refit, short tuning",
    "refit full": "refit, full tuning",
    "refit full last": "the same, last epoch",
    "scratch short": "fresh weights, short",
    "scratch total": "fresh weights, total budget",
}


@dataclass(frozen=True)
class Spread:
    """Mean and sample standard deviation (0 of one value) of `count` numbers."""

    mean: float
    spread: float
    count: int

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        spread = statistics.stdev(values) if len(values) > 1 else 0.0
        return cls(statistics.fmean(values), spread, len(values))

    @property
    def verdict(self) -> str:
        """Of paired differences: `wins`, `loses`, or `open`; one pair alone decides nothing."""
        if self.count < 2 or abs(self.mean) <= self.spread:
            return "open"
        return "wins" if self.mean > 0 else "loses"


def accuracies(rows: Iterable[Row], **where: Any) -> dict[tuple[Any, ...], float]:
    """Top-1 by (network, budget, seed) of the rows with these values."""
    found = {}
    for row in rows:
        if all(row[key] == value for key, value in where.items()) and "top1" in row:
            found[row["network"], row["budget"], row["seed"]] = float(row["top1"])
    return found


def paired(rows: Sequence[Row], a: str, b: str, **where: Any) -> Spread | None:
    """Accuracy of method `a` minus that of `b` on the seeds (networks, budgets) both have."""
    first = accuracies(rows, method=a, **where)
    second = accuracies(rows, method=b, **where)
    both = sorted(first.keys() & second.keys())
    return Spread.of([first[key] - second[key] for key in both]) if both else None


def standing(rows: Sequence[Row], method: str, **where: Any) -> Spread | None:
    """Accuracy of a method over seeds."""
    found = accuracies(rows, method=method, **where)
    return Spread.of(list(found.values())) if found else None


def methods(rows: Iterable[Row]) -> list[str]:
    """In the order of the rows."""
    return list(dict.fromkeys(row["method"] for row in rows))


def columns(rows: Iterable[Row]) -> list[str]:
    """Those that the rows have, in the order of `COLUMNS`."""
    found = {row["column"] for row in rows}
    return [name for name in COLUMNS if name in found]


def table(rows: Sequence[Row], *, network: str, budget: float) -> str:
    """One network and budget: a row for each method, best after BN first."""
    mine = [r for r in rows if r["network"] == network and r["budget"] in (budget, None)]
    shown = columns(mine)
    ranked = sorted(methods(mine), key=lambda m: _order(mine, m, shown), reverse=True)
    lines = [
        "| criterion | " + " | ".join(COLUMNS[c] for c in shown) + " |",
        "|---" * (len(shown) + 1) + "|",
    ]
    for method in ranked:
        cells = [_cell(standing(mine, method, column=c)) for c in shown]
        lines.append(f"| {_name(method)} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def against(rows: Sequence[Row], champion: str, *, network: str, budget: float) -> str:
    """Paired differences of one method to all others, in points, with the verdict."""
    mine = [r for r in rows if r["network"] == network and r["budget"] in (budget, None)]
    shown = [c for c in columns(mine) if c != "cut"]
    lines = [
        f"| {champion} minus | " + " | ".join(COLUMNS[c] for c in shown) + " |",
        "|---" * (len(shown) + 1) + "|",
    ]
    for other in methods(mine):
        if other != champion:
            found = [paired(mine, champion, other, column=c) for c in shown]
            lines.append(f"| {_name(other)} | " + " | ".join(map(_difference, found)) + " |")
    return "\n".join(lines)


def duels(rows: Sequence[Row], champion: str, rivals: Sequence[str]) -> str:
    """A row for each network and budget: the champion, and what it is ahead of the best rival."""
    shown = [c for c in columns(rows) if c != "cut"]
    lines = [
        "| network, MACs | " + " | ".join(COLUMNS[c] for c in shown) + " |",
        "|---" * (len(shown) + 1) + "|",
    ]
    for network in dict.fromkeys(row["network"] for row in rows):
        budgets = {row["budget"] for row in rows if row["network"] == network} - {None}
        for budget in sorted(budgets, reverse=True):
            mine = [r for r in rows if (r["network"], r["budget"]) == (network, budget)]
            cells = [_duel(mine, champion, rivals, column) for column in shown]
            lines.append(f"| {network} at {budget} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _duel(rows: Sequence[Row], champion: str, rivals: Sequence[str], column: str) -> str:
    ours = standing(rows, champion, column=column)
    theirs = {m: s for m in rivals if (s := standing(rows, m, column=column)) is not None}
    if ours is None or not theirs:
        return ""
    best = max(theirs, key=lambda m: theirs[m].mean)
    ahead = _difference(paired(rows, champion, best, column=column))
    return f"{100 * ours.mean:.1f}: {ahead} over {_name(best)}"


def _order(rows: Sequence[Row], method: str, shown: Sequence[str]) -> float:
    column = "bn" if "bn" in shown else shown[-1]
    found = standing(rows, method, column=column)
    return found.mean if found else -math.inf


def _name(method: str) -> str:
    first = re.split(r"[ ,]", method)[0]
    return f"`{first}`{method[len(first) :]}"


def _cell(found: Spread | None) -> str:
    if found is None:
        return ""
    if found.count == 1:
        return f"{100 * found.mean:.1f} (1 seed)"
    return f"{100 * found.mean:.1f} ± {100 * found.spread:.1f}"


def _difference(found: Spread | None) -> str:
    if found is None:
        return ""
    if found.count == 1:
        return f"{100 * found.mean:+.1f} (1 seed)"
    text = f"{100 * found.mean:+.1f} ± {100 * found.spread:.1f}"
    return {"wins": f"**{text}**", "loses": f"{text} (loses)", "open": text}[found.verdict]


def rank_correlation(a: Sequence[float], b: Sequence[float]) -> float:
    """Spearman's: the correlation of the ranks, ties sharing their mean; NaN if one is flat."""
    first, second = _ranks(a), _ranks(b)
    try:
        return statistics.correlation(first, second)
    except statistics.StatisticsError:
        return math.nan


def _ranks(values: Sequence[float]) -> list[float]:
    order = sorted(range(len(values)), key=values.__getitem__)
    ranks = [0.0] * len(values)
    start = 0
    while start < len(order):
        end = start
        while end + 1 < len(order) and values[order[end + 1]] == values[order[start]]:
            end += 1
        for place in order[start : end + 1]:
            ranks[place] = (start + end) / 2 + 1
        start = end + 1
    return ranks


def sizes(rows: Sequence[Row]) -> str:
    """Calibration images against rank stability and accuracy after BN recalibration."""
    lines = ["| images | " + " | ".join(f"`{m}`: ρ, top-1" for m in methods(rows)) + " |"]
    lines.append("|---" * (len(methods(rows)) + 1) + "|")
    for images in sorted({int(r["images"]) for r in rows}):
        cells = []
        for method in methods(rows):
            mine = [r for r in rows if r["images"] == images and r["method"] == method]
            stable = [float(r["spearman"]) for r in mine if r.get("spearman") is not None]
            found = standing(mine, method, column="bn")
            text = f"{statistics.fmean(stable):.3f}" if stable else ""
            cells.append(f"{text}, {_cell(found)}" if found else "")
        lines.append(f"| {images:,} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


CHAMPION = "gate_logit joint cost_aware, least 2"  # the default of these runs
RIVALS = (  # torch-pruning's, and width scaling
    "l1", "l2", "bn_scale", "lamp", "fpgm", "taylor", "hessian", "random", "uniform",
)  # fmt: skip


def short(kept: Mapping[str, Any]) -> str:
    """The README's table."""
    return duels(kept["rows"], CHAMPION, RIVALS) + provenance(kept)


def long(kept: Mapping[str, Any]) -> str:
    """All methods of every network and budget, and the champion against each."""
    parts = []
    for network, budget in sorted({(r["network"], r["budget"]) for r in kept["rows"]})[::-1]:
        dense = next(r["dense"] for r in kept["rows"] if r["network"] == network and "dense" in r)
        parts.append(f"{network} at {budget} of the MACs; dense {100 * dense:.1f} %:")
        parts.append(table(kept["rows"], network=network, budget=budget))
        parts.append(against(kept["rows"], CHAMPION, network=network, budget=budget))
    return "\n\n".join(parts) + provenance(kept)


def choice(kept: Mapping[str, Any]) -> str:
    """The candidates for the default."""
    parts = []
    for network, budget in sorted({(r["network"], r["budget"]) for r in kept["rows"]})[::-1]:
        parts.append(f"{network} at {budget} of the MACs:")
        parts.append(table(kept["rows"], network=network, budget=budget))
    return "\n\n".join(parts) + provenance(kept)


def study(kept: Mapping[str, Any]) -> str:
    """What the number of calibration images does."""
    return sizes(kept["rows"]) + provenance(kept)


def provenance(kept: Mapping[str, Any]) -> str:
    """The line under a table."""
    seeds = {row["seed"] for row in kept["rows"]}
    count = next(row["count"] for row in kept["rows"] if "count" in row)
    hardware = kept["hardware"].replace("1 threads", "1 thread")
    return (
        f"\n\nTop-1 in %, mean ± standard deviation over {len(seeds)} seeds; "
        f"{count:,} images; {hardware}, torch {kept['torch']}, {kept['date']}."
    )


_INK, _PALE, _ROW, _LEFT, _WIDE = "#1f2937", "#9ca3af", 22, 225, 420
_DOTS = {"bn": "#d97706", "refit": "#2563eb", "bn short": "#059669", "refit full": "#7c3aed"}


def figure(rows: Sequence[Row], *, network: str, budget: float) -> str:
    """An SVG: a line a method, a dot a recovery, a bar from the worst seed to the best."""
    mine = [r for r in rows if r["network"] == network and r["budget"] == budget]
    shown = [c for c in columns(mine) if c in _DOTS]
    ranked = sorted(methods(mine), key=lambda m: _order(mine, m, shown), reverse=True)
    low = min(r["top1"] for r in mine if r["column"] in shown)
    high = max([r["top1"] for r in mine if r["column"] in shown] + [mine[0]["dense"]])
    low, high = math.floor(20 * low) / 20, math.ceil(20 * high) / 20

    def at(top1: float) -> float:
        return round(_LEFT + _WIDE * (top1 - low) / (high - low), 1)

    height = _ROW * len(ranked) + 84
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_LEFT + _WIDE + 30} {height}" '
        f'font-family="sans-serif" font-size="12" fill="{_INK}">',
        f'<rect width="100%" height="100%" fill="white"/><text x="10" y="18">{network} at {budget} '
        "of the MACs: top-1, all seeds</text>",
    ]
    for number, column in enumerate(shown):
        x = _LEFT + number * 135
        parts.append(f'<circle cx="{x}" cy="34" r="4" fill="{_DOTS[column]}"/>')
        parts.append(f'<text x="{x + 9}" y="38">{COLUMNS[column]}</text>')
    for number, method in enumerate(ranked):
        y = 60 + _ROW * number
        parts.append(f'<text x="10" y="{y + 4}">{method}</text>')
        parts.append(_line(_LEFT, y, _LEFT + _WIDE, _PALE, 0.5))
        for column in shown:
            values = list(accuracies(mine, method=method, column=column).values())
            if values:
                parts.append(_line(at(min(values)), y, at(max(values)), _DOTS[column], 3))
                middle = at(statistics.fmean(values))
                parts.append(f'<circle cx="{middle}" cy="{y}" r="4" fill="{_DOTS[column]}"/>')
    for mark in (low, (low + high) / 2, high):
        parts.append(
            f'<text x="{at(mark)}" y="{height - 10}" text-anchor="middle">{100 * mark:.0f} %</text>'
        )
    return "\n".join([*parts, "</svg>"]) + "\n"


def _line(left: float, y: float, right: float, colour: str, width: float) -> str:
    return (
        f'<line x1="{left}" y1="{y}" x2="{right}" y2="{y}" stroke="{colour}" '
        f'stroke-width="{width}"/>'
    )
