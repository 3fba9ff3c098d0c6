"""Damaged inputs by the thousand, read in a child process; benchmarks/results/fuzz.json.

    python benchmarks/fuzz.py [--cases 2000] [--seed 0]
    python benchmarks/fuzz.py --cases 0    the table of docs/reliability.md from the JSON alone

Cases are shared out over the kinds of input. A case is a draw of one to three flips, cuts,
insertions, zeroed, deleted or copied ranges. Status 1 if anything but the right result or a
documented error came out.
"""

from __future__ import annotations

import argparse
import collections
import os
import platform
import random
import sys
import tempfile
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "reliability")]

import torch  # noqa: E402
from child import Child, Crash  # noqa: E402
from damage import TARGETS, Range, Target, random_steps  # noqa: E402

from seprune.runtime.files import write_json, write_text  # noqa: E402
from seprune.runtime.reading import read_json  # noqa: E402

RESULT = ROOT / "benchmarks" / "results" / "fuzz.json"


def attack(target: Target, cases: int, source: random.Random) -> dict[str, Any]:
    """What `cases` damaged inputs of one kind came to."""
    codes: collections.Counter[str] = collections.Counter()
    counts: dict[str, Any] = {"cases": cases, "bytes": 0, "same": 0, "other": 0}
    broken: dict[str, list[str]] = {"hangs": [], "crashes": [], "wrong": []}
    with tempfile.TemporaryDirectory() as folder:
        reader = Child("reader.py")
        here = Range(target, Path(folder) / "x", reader)
        for _ in range(cases):
            steps = random_steps(source)
            counts["bytes"] += sum(1 if s[0] in ("flip", "cut") else len(s[3]) for s in steps)
            try:
                found = here.shoot(steps)
            except Crash as error:
                broken["hangs" if str(error).startswith("hang") else "crashes"].append(
                    f"{steps}: {error}"
                )
                reader.close()
                here.reader = reader = Child("reader.py")
                reader([target.reader, target.path(here.folder)], limit=120)
                continue
            except AssertionError as error:
                broken["wrong"].append(f"{steps}: {error}")
                continue
            if isinstance(found, dict):
                codes[str(found["code"])] += 1
            else:
                counts["same" if found == here.undamaged else "other"] += 1
        reader.close()
    return counts | {"refused": sum(codes.values()), "codes": dict(codes.most_common())} | broken


def tabulate() -> int:
    """Put the table of the JSON between the marks in docs/reliability.md."""
    result = read_json(RESULT)
    lines = [
        "| input | cases | bytes damaged | refused | read as before | read as another | hangs | "
        "crashes | wrong |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    keys = ("cases", "bytes", "refused", "same", "other", "hangs", "crashes", "wrong")
    for name, row in (*result["kinds"].items(), ("together", result["total"])):
        counts = [row[k] if isinstance(row[k], int) else len(row[k]) for k in keys]
        lines.append(f"| {name} | {' | '.join(f'{n:,}' for n in counts)} |")
    lines += [
        "",
        f"`{result['command']}` on {result['hardware']}, torch {result['torch']}, "
        f"{result['date']}.",
    ]
    page = ROOT / "docs" / "reliability.md"
    head, _, rest = page.read_text().partition("<!-- fuzz: made by benchmarks/fuzz.py -->")
    _, end, tail = rest.partition("<!-- end -->")
    mark = "<!-- fuzz: made by benchmarks/fuzz.py -->"
    write_text(page, "\n".join([head + mark, *lines, end]) + tail)
    return 0


def main() -> int:
    """Attack every kind, write the JSON and the table."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--cases", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    return attack_all(given.cases, given.seed) if given.cases else tabulate()


def attack_all(cases: int, seed: int) -> int:
    """Every kind in turn; the result is kept, and 1 says that something was not allowed."""
    each = cases // len(TARGETS)
    kinds = {}
    for name, target in TARGETS.items():
        kinds[name] = attack(target, each, random.Random(f"{seed} {name}"))
        print(name, {k: v for k, v in kinds[name].items() if k != "codes"}, file=sys.stderr)
    total = {
        key: sum(k[key] if isinstance(k[key], int) else len(k[key]) for k in kinds.values())
        for key in ("cases", "bytes", "refused", "same", "other", "hangs", "crashes", "wrong")
    }
    write_json(
        RESULT,
        {
            "command": f"python benchmarks/fuzz.py --cases {cases} --seed {seed}",
            "date": datetime.now(UTC).date().isoformat(),
            "hardware": f"{platform.machine()}, {os.cpu_count()} cores",
            "torch": torch.__version__,
            "total": total,
            "kinds": kinds,
        },
    )
    tabulate()
    return int(bool(total["hangs"] or total["crashes"] or total["wrong"]))


if __name__ == "__main__":
    sys.exit(main())
