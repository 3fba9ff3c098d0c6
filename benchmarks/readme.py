"""Make the README's table from the JSON that runs wrote.

    python benchmarks/readme.py [RUN/report.json]

With a report it is first kept in benchmarks/results (measurements, versions, command, hardware,
date), then the table between the markers in README.md is made from what is kept there.
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

from seprune.files import write_json, write_text

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
    said = f"`{kept['command']}` on {where}, torch {kept['versions']['torch']}"
    return "\n".join(rows) + f"\n\n{said}, {kept['created'][:10]}, {base['count']:,} images."


def rendered(readme: str, made: str) -> str:
    """The README with the table between its markers."""
    start, end = f"<!-- {NAME}: made by benchmarks/readme.py -->", "<!-- end -->"
    before, _, rest = readme.partition(start)
    _, _, after = rest.partition(end)
    return f"{before}{start}\n{made}\n{end}{after}"


def main() -> None:
    """Keep a report if one is given; make the table."""
    if len(sys.argv) > 1:
        keep(Path(sys.argv[1]))
    path = ROOT / "README.md"
    write_text(path, rendered(path.read_text(), table(json.loads(KEPT.read_text()))))


if __name__ == "__main__":
    main()
