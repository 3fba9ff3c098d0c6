"""Make the tables of README.md and docs from what runs and benchmarks wrote.

    python benchmarks/readme.py [RUN/report.json]

With a report it is first kept in benchmarks/results (measurements, versions, command, hardware,
date), then the tables between their markers, and the figures, are made from what is kept there.
"""

from __future__ import annotations

import json
import re
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import curves
import result_rows
import standings
import task_table
from csv_rows import read

from seprune.runtime.files import write_json, write_text

ROOT = Path(__file__).parents[1]
NAME = "cifar10-seresnet20"
KEPT = ROOT / "benchmarks" / "results" / f"{NAME}.json"


def keep(report: Path) -> None:
    """Keep what the table needs of a run's report."""
    full = json.loads(report.read_text())
    wanted = ("name", "created", "command", "seed", "measurements", "seconds", "hashes")
    kept: dict[str, Any] = {key: full[key] for key in wanted}
    kept["versions"] = full["environment"]["packages"]
    # paths of the machine that ran it say nothing to others
    command = re.sub(r"--out \S+", "--out RUN", kept["command"])
    kept["command"] = re.sub(r"=\S*/", "=", command)
    write_json(KEPT, kept)


def table(kept: dict[str, Any]) -> str:
    """The Markdown table, and the line under it."""
    rows = ["| network | top-1 | MACs | kept | parameters | file | ms, batch 1 | ms, batch 64 |",
            "|---|---|---|---|---|---|---|---|"]  # fmt: skip
    base = kept["measurements"][0]
    for m in kept["measurements"]:
        name = m["stage"] + (f", {m['budget']}" if m["budget"] else "")
        times = {t["batch"]: t["median_ms"] for t in m["latency"] if t["runtime"] == "eager"}
        cells = [
            name,
            f"{100 * m['top1']:.2f} %",
            f"{m['macs'] / 1e6:.2f} M",
            f"{m['macs'] / base['macs']:.3f}",
            f"{m['params'] / 1e3:.1f} k",
            f"{m['bytes'] / 1e3:.0f} kB",
            *(f"{times[b]:.2f}" if times.get(b) else "" for b in (1, 64)),
        ]
        rows.append("| " + " | ".join(cells) + " |")
    latency = base["latency"][0] if base["latency"] else {"device": "?", "threads": "?"}
    where = f"{latency['device']}, {latency['threads']} threads"
    caption = f"`{kept['command']}` on {where}, torch {kept['versions']['torch']}"
    return "\n".join(rows) + f"\n\n{caption}, {kept['created'][:10]}, {base['count']:,} images."


VARIANTS = {
    "plain": "plain",
    "bn": "+ BN recalibration",
    "distilled": "+ distillation",
    "ema": "+ average of weights",
    "refit": "the same after a refit in place of BN",
}


# column of the table -> stage and metric of the rows
TUNED = {
    "untrained": ("untrained", "validation_top1"),
    "last": ("last", "top1"),
    "chosen": ("chosen", "top1"),
}


def recovery(kept: dict[str, Any]) -> str:
    """Top-1 of every variant at every budget: mean and standard deviation over seeds."""
    dense, *rows = kept["rows"]
    budgets = sorted({float(row["budget"]) for row in rows}, reverse=True)
    heads = [f"{b:g} of MACs: {' | '.join(TUNED)}" for b in budgets]
    lines = ["| fine-tuning | " + " | ".join(heads) + " |", "|---" * (1 + 3 * len(budgets)) + "|"]
    for variant in dict.fromkeys(row["method"] for row in rows):
        texts = [VARIANTS[variant]]
        for budget in budgets:
            same = [r for r in rows if (r["method"], float(r["budget"])) == (variant, budget)]
            for found in TUNED.values():
                values = [r["value"] for r in same if (r["stage"], r["metric"]) == found]
                texts.append(_spread([float(value) for value in values]))
        lines.append("| " + " | ".join(texts) + " |")
    caption = (
        f"{dense['network'].rpartition('/')[2]}, top-1 on the reporting images (untrained: on the "
        "validation split), mean ± standard deviation over seeds of the training (their number in "
        f"brackets); parent {100 * float(dense['value']):.2f} %. Images: {dense['data']}. Each row "
        f"adds to the one before. `{dense['command']}` on {dense['hardware']}, "
        f"{dense['versions']}, {dense['date']}."
    )
    return "\n".join(lines) + "\n\n" + caption


def _spread(values: list[float]) -> str:
    if not values:
        return ""
    mean = f"{100 * statistics.mean(values):.2f}"
    more = f" ± {100 * statistics.stdev(values):.2f}" if len(values) > 1 else ""
    return f"{mean}{more} ({len(values)})"


def speed(kept: dict[str, Any]) -> str:
    """One row: seprune beside the bare loop."""
    how = kept["settings"]
    low, high = kept["ratio_quartiles"]
    return (
        "| network | batch | precision | bare loop, images/s | seprune, images/s | ratio |\n"
        "|---|---|---|---|---|---|\n"
        f"| {how['model'].rpartition('/')[2]}, {how['side']}x{how['side']} | {how['batch']} "
        f"| {'fp32' if how['precision'] == 'no' else how['precision']} "
        f"| {kept['bare_images_per_second']:,.0f} | {kept['seprune_images_per_second']:,.0f} "
        f"| {kept['ratio']:.3f} ({low:.3f} to {high:.3f}) |\n\n"
        f"{kept['blocks']} blocks of {how['steps']} step of each in turn, medians: "
        f"`{kept['command']}` on {kept['hardware']}, torch {kept['torch']}, {kept['date']}."
    )


# what was tried of each kind of fault on run folders, in words, and what is counted
FAULTS = {
    "kills": ("`kill -9` at random instants of a whole quickstart, until it is through", "kills"),
    "kills-commands": (
        "`kill -9` at instants spread over each single command and each stage of a run",
        "kills",
    ),
    "signals": ("SIGTERM and SIGINT likewise", "signals"),
    "operations": ("each file operation of a run fails once, in four ways", "operations"),
    "concurrency": ("8 processes at once in one run folder", "rounds"),
    "bytes": ("damaged bytes in any file of a finished run", "files"),
}


def faults(kept: dict[str, Any]) -> str:
    """One row for each kind of fault; `kept` is the first of the results."""
    rows = ["| fault | tried | hangs | losses | and |", "|---|---|---|---|---|"]
    for name, (words, unit) in FAULTS.items():
        path = KEPT.parent / f"{name}.json"
        if not path.exists():
            continue
        found = json.loads(path.read_text())
        hangs = sum("a hang" in text for text in found["broken"])
        losses = len(found["broken"]) - hangs
        tried = f"{found['done']:,} {unit}"
        if name == "operations" and found["done"] < 4 * found["operations_of_a_run"]:
            tried += f" of {4 * found['operations_of_a_run']:,}, drawn by chance"
        if name == "kills-commands" and found["done"] < found["rounds"]:
            tried += f" of {found['rounds']:,}; the same command goes on"
        rows.append(f"| {words} | {tried} | {hangs} | {losses} | {_outcome(name, found)} |")
    caption = (
        "`python benchmarks/faults.py kills`, and `commands`, `signals`, `operations`, `crowds`, "
        f"`bytes`, on {kept['hardware']}, torch {kept['versions']['torch']}, {kept['date']}."
    )
    return "\n".join(rows) + "\n\n" + caption


def _outcome(name: str, found: dict[str, Any]) -> str:
    if name == "concurrency":
        return f"{found['refused_by_name']:,} were refused with the name of the one that worked"
    if name == "operations":
        ways = ", ".join(f"{how} {row['tried']}" for how, row in sorted(found["ways"].items()))
        return f"{ways}; each run then ended as the unbroken one"
    if name == "kills-commands":
        ways = ", ".join(f"{n} {row['kills']}" for n, row in found["commands"].items())
        return f"{ways}; the same command then made what the undisturbed one does"
    if name == "bytes":
        return (
            f"{found['changed']:,} of them changed: `verify` found it, or it was the end of the "
            "journal, which is read up to there; what was read again was right or refused"
        )
    runs = found.get("runs_compared", 0)
    return (
        f"finished stages were whole after each; {runs} run{'s'[: runs != 1]} through to the end, "
        "equal to the unbroken one bit for bit"
    )


WINNERS = "leaderboard-cpu.csv leaderboard-budgets.csv leaderboard-inner.csv"
# marker -> the document that holds it, the result files, and what makes the table
TABLES: dict[str, tuple[str, str, Callable[[dict[str, Any]], str]]] = {
    NAME: ("docs/results.md", f"{NAME}.json", table),
    "faults": ("docs/reliability.md", "kills.json", faults),
    "recovery": ("docs/finetuning.md", "recovery-cpu.csv", recovery),
    "finetune": ("docs/finetuning.md", "finetune-cpu.json", speed),
    "six": ("README.md", WINNERS, curves.six),
    "speeds": ("README.md", "latency_accuracy.csv", curves.speeds),
    "winners": ("docs/results.md", WINNERS, standings.short),
    "leaderboard": ("docs/results.md", "leaderboard-cpu.csv", standings.long),
    "budgets": ("docs/results.md", "leaderboard-budgets.csv", standings.long),
    "inner": ("docs/results.md", "leaderboard-inner.csv", standings.long),
    "iterative": ("docs/results.md", "leaderboard-iterative.csv", standings.choice),
    "choice": ("docs/results.md", "leaderboard-choice.csv", standings.choice),
    "tasks": ("docs/results.md", "tasks.csv", task_table.table),
    "calibration": ("docs/results.md", "leaderboard-calibration.csv", standings.study),
}
# figure -> network and budget of one panel of the leaderboard, or what draws it
FIGURES: dict[str, tuple[str, float] | Callable[[dict[str, Any]], str]] = {
    "docs/accuracy-light.svg": curves.light,
    "docs/accuracy-dark.svg": curves.dark,
    "docs/leaderboard-0.5.svg": ("se_resnet20", 0.5),
    "docs/leaderboard-0.3.svg": ("se_resnet20", 0.3),
    "docs/leaderboard-mobilenetv3-0.3.svg": ("mobilenet_v3_small", 0.3),
}


def drawn(figure: str) -> str:
    """A figure of the leaderboard, SVG."""
    kept, made = results(WINNERS), FIGURES[figure]
    if callable(made):
        return made(kept | {"times": read(KEPT.parent / "latency_accuracy.csv")})
    network, budget = made
    return standings.figure(kept["rows"], network=network, budget=budget)


def results(files: str) -> dict[str, Any]:
    """What is kept in a file; of several leaderboards all rows, under the facts of the first."""
    if files.startswith("leaderboard-"):
        boards = [result_rows.leaderboard(KEPT.parent / file) for file in files.split()]
        return boards[0] | {"rows": [row for board in boards for row in board["rows"]]}
    if files.endswith(".csv"):
        return {"rows": read(KEPT.parent / files)}
    return dict(json.loads((KEPT.parent / files).read_text()))


def rendered(text: str, marker: str) -> str:
    """A document with the table between its markers."""
    _, files, make = TABLES[marker]
    made = make(results(files))
    start, end = f"<!-- {marker}: made by benchmarks/readme.py -->", "<!-- end -->"
    before, _, rest = text.partition(start)
    _, _, after = rest.partition(end)
    return f"{before}{start}\n{made}\n{end}{after}"


def main() -> None:
    """Keep a report if one is given; make the tables."""
    if len(sys.argv) > 1:
        keep(Path(sys.argv[1]))
    for marker, (document, _, _) in TABLES.items():
        path = ROOT / document
        write_text(path, rendered(path.read_text(), marker))
    chinese = ROOT / "README.zh-CN.md"
    for marker in ("six", "speeds"):
        write_text(chinese, rendered(chinese.read_text(), marker))
    for figure in FIGURES:
        write_text(ROOT / figure, drawn(figure))


if __name__ == "__main__":
    main()
