"""The schema of result files (benchmarks/results/README.md): one measured number a row."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import csv_rows

COLUMNS = (
    "network", "data", "budget", "method", "stage", "seed", "metric", "value", "macs", "latency",
    "hardware", "versions", "date", "command",
)  # fmt: skip
_DATA = re.compile(r"(\w+): (\d*) train, (\d+) calibration, (\d*) reporting")


def flat(kept: Mapping[str, Any], *, data: str, command: str) -> csv_rows.Rows:
    """A leaderboard in the schema; the dense network is a stage, and a failure a metric."""
    common = {
        "hardware": kept["hardware"], "versions": f"torch {kept['torch']}",
        "date": kept["date"], "command": command,
    }  # fmt: skip
    made: dict[tuple[Any, ...], dict[str, Any]] = {}
    for row in kept["rows"]:
        images = f"{kept['train_images'] or ''} train, {row['images']} calibration"
        images = f"{data}: {images}, {row.get('count', '')} reporting"
        same = common | {"network": row["network"], "data": images}
        cut = same | {
            "budget": row["budget"], "method": row["method"], "stage": _stage(row),
            "seed": row["seed"], "macs": row.get("macs", ""),
        }  # fmt: skip
        measured = [
            cut | {"metric": name, "value": row[key]}
            for name, key in (("top1", "top1"), ("spearman", "spearman"), ("failed", "error"))
            if row.get(key) is not None
        ]
        if row.get("dense") is not None:
            measured.insert(0, same | {"stage": "dense", "metric": "top1", "value": row["dense"]})
        for found in measured:
            key = tuple(str(found.get(name, "")) for name in COLUMNS if name != "value")
            if made.setdefault(key, found)["value"] != found["value"]:
                raise ValueError(f"two values of {key}: {made[key]['value']}, {found['value']}")
    return list(made.values())


def _stage(row: Mapping[str, Any]) -> str:
    """Cuts in steps are recovered between them, so that a cut depends on what follows it."""
    several = row["column"] == "cut" and row["recover"] != "none"
    return f"cut before {row['recover']}" if several else str(row["column"])


def leaderboard(path: Path) -> dict[str, Any]:
    """A leaderboard as its tables and figures read it: a row for each cut and recovery."""
    rows = csv_rows.read(path)
    dense = {
        (r["network"], r["data"]): float(r["value"]) for r in rows if r["stage"] == "dense"
    }  # fmt: skip
    made: dict[tuple[str, ...], dict[str, Any]] = {}
    for row in rows:
        if row["stage"] == "dense":
            continue
        key = tuple(row[name] for name in ("network", "data", "budget", "method", "stage", "seed"))
        into = made.setdefault(key, _cell(row, dense))
        into[row["metric"]] = row["value"] if row["metric"] == "failed" else float(row["value"])
    first = rows[0]
    return {
        "rows": list(made.values()), "hardware": first["hardware"], "date": first["date"],
        "torch": first["versions"].removeprefix("torch "),
    }  # fmt: skip


def _cell(row: Mapping[str, str], dense: Mapping[tuple[str, str], float]) -> dict[str, Any]:
    counts = _DATA.fullmatch(row["data"])
    assert counts, row["data"]
    found: dict[str, Any] = {
        "network": row["network"], "method": row["method"],
        "column": row["stage"].partition(" before ")[0], "seed": int(row["seed"]),
        "images": int(counts[3]),
        "budget": float(row["budget"]) if row["budget"] else None,
    }  # fmt: skip
    if row["macs"]:
        found["macs"] = int(row["macs"])
    if counts[4]:
        found["count"] = int(counts[4])
    if (row["network"], row["data"]) in dense:
        found["dense"] = dense[row["network"], row["data"]]
    return found


def write(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """All rows of one result file."""
    csv_rows.write(path, list(rows), COLUMNS)
