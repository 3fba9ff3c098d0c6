"""The table of docs/results.md about other tasks, from the rows of benchmarks/tasks.py."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

from seprune.measure.metric_names import metric_title

STAGES = {"cut": "cut alone", "refitted": "refitted", "tuned": "refitted and tuned"}
NAMES = {"default": "seprune's default", "taylor": "`taylor`", "l2": "`l2`", "random": "random"}
Rows = Sequence[dict[str, Any]]


def table(kept: dict[str, Any]) -> str:
    """A block for each task and budget; the best of each column is bold."""
    rows: Rows = kept["rows"]
    lines = ["| task, MACs kept | scores | " + " | ".join(STAGES.values()) + " |",
             "|---" * (2 + len(STAGES)) + "|"]  # fmt: skip
    for task in dict.fromkeys(row["task"] for row in rows):
        mine = [row for row in rows if row["task"] == task]
        budgets = dict.fromkeys(row["macs"] for row in mine if row["method"] != "dense")
        for macs in budgets:
            lines += block([row for row in mine if row["macs"] == macs], head(mine, macs))
    return "\n".join(lines)


def head(rows: Rows, macs: str) -> str:
    """The first cell of a block: the task, its budget, the dense network."""
    dense = [float(row["value"]) for row in rows if row["method"] == "dense"]
    title = metric_title(rows[0]["metric"])
    return f"{rows[0]['task']} at {macs}; dense {title} {spread(dense)}"


def block(rows: Rows, title: str) -> list[str]:
    """A line for each way of scoring, over the seeds that all of them have."""
    methods = [name for name in NAMES if any(row["method"] == name for row in rows)]
    found = {(row["method"], row["stage"], row["seed"]): float(row["value"]) for row in rows}
    seeds = {
        stage: [
            seed
            for seed in dict.fromkeys(row["seed"] for row in rows)
            if all((name, stage, seed) in found for name in methods)
        ]
        for stage in STAGES
    }
    cells = {
        (name, stage): [found[name, stage, seed] for seed in seeds[stage]]
        for name in methods
        for stage in STAGES
    }
    best = {
        stage: max(statistics.fmean(cells[name, stage] or [0.0]) for name in methods)
        for stage in STAGES
    }
    lines = []
    for number, name in enumerate(methods):
        shown = []
        for stage in STAGES:
            values = cells[name, stage]
            bold = values and statistics.fmean(values) == best[stage]
            shown.append(f"**{spread(values)}**" if bold else spread(values))
        lines.append(f"| {'' if number else title} | {NAMES[name]} | {' | '.join(shown)} |")
    return lines


def spread(values: Sequence[float]) -> str:
    """Percent, with the standard deviation over seeds; how many there are, if only one."""
    if not values:
        return ""
    mean = f"{100 * statistics.fmean(values):.1f}"
    if len(values) == 1:
        return f"{mean} (1 seed)"
    return f"{mean} ± {100 * statistics.stdev(values):.1f}"
