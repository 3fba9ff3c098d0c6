"""Changed files whose checksums are right, by the thousand; benchmarks/results/fuzz-signed.json.

    python benchmarks/fuzz_signed.py [--cases 5000]
    python benchmarks/fuzz_signed.py --cases 0    only the table of docs/reliability.md

The cases are shared out over every kind of file that is read (tests/reliability/signed.py), each in
a child process with 10 s of CPU time and 2 GB more than it had at its start. Resumable: what was
done before is in the JSON. Status 1 if anything but a right result or a documented error came out.
"""

from __future__ import annotations

import argparse
import os
import platform
import sys
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "reliability")]

import torch  # noqa: E402
from child import Child, Crash  # noqa: E402
from signed import SUBJECTS  # noqa: E402

from seprune.runtime.files import write_json, write_text  # noqa: E402
from seprune.runtime.reading import read_json  # noqa: E402

RESULT = ROOT / "benchmarks" / "results" / "fuzz-signed.json"
SECONDS, PATIENCE = 10, 300  # of CPU time; of a clock, which a busy machine makes long
EVERY = 25  # cases between two writes of the JSON
MARK = "<!-- fuzz-signed: made by benchmarks/fuzz_signed.py -->"
Kept = dict[str, Any]


class Reader:
    """The child process, started anew where it died."""

    def __init__(self) -> None:
        self.child = Child("signed.py")
        self.warm: set[str] = set()

    def __call__(self, name: str, seed: int) -> str:
        """The outcome of one case.

        Raises:
            Crash: it hung or died.
        """
        if name not in self.warm:  # making the good files is not the change's fault
            self.child([name, None], limit=1800)
            self.warm.add(name)
        found, seconds = self.child([name, seed], limit=PATIENCE)
        if seconds > SECONDS:
            raise Crash(f"hang: {seconds:.1f} s")
        return str(found)

    def again(self) -> None:
        self.child.close()
        self.__init__()  # type: ignore[misc]


def due(kept: Kept, each: int) -> Iterator[tuple[str, int]]:
    """What hung or crashed before, then each kind in turn: what is done is always a fair sample."""
    for name, row in kept["kinds"].items():
        for _ in range(len(row["broken"])):
            text = row["broken"].pop(0)
            row["cases"] -= 1
            yield name, int(text.partition(":")[0].removeprefix("seed "))
    for seed in range(each):
        for name in SUBJECTS:
            if kept["kinds"].get(name, {"cases": 0})["cases"] <= seed:
                yield name, seed


def attack(kept: Kept, each: int) -> Iterator[None]:
    """The cases that are due, each counted."""
    reader = Reader()
    for name, seed in due(kept, each):
        row = kept["kinds"].setdefault(name, {"cases": 0, "read": 0, "codes": {}, "broken": []})
        try:
            found = reader(name, seed)
        except Crash as error:
            print(error, file=sys.stderr)
            row["broken"].append(f"seed {seed}: {str(error).strip().splitlines()[-1][:200]}")
            reader.again()
        else:
            if found == "read":
                row["read"] += 1
            else:
                row["codes"][found] = row["codes"].get(found, 0) + 1
        row["cases"] += 1
        yield
    reader.child.close()


def tabulate(kept: Kept) -> None:
    """Put the table of the JSON between the marks in docs/reliability.md."""
    lines = ["| file | cases | read | refused | hangs and crashes |", "|---|---|---|---|---|"]
    total = [0, 0, 0, 0]
    for name, row in kept["kinds"].items():
        counts = [row["cases"], row["read"], sum(row["codes"].values()), len(row["broken"])]
        total = [a + b for a, b in zip(total, counts)]
        lines.append(f"| {name} | {' | '.join(f'{n:,}' for n in counts)} |")
    lines.append(f"| together | {' | '.join(f'{n:,}' for n in total)} |")
    left = "" if total[0] >= kept["cases"] else "; the same command does the rest"
    lines += ["", f"{total[0]:,} cases of `{kept['command']}` on {kept['hardware']}, torch "
              f"{kept['torch']}, {kept['date']}{left}."]  # fmt: skip
    page = ROOT / "docs" / "reliability.md"
    head, _, rest = page.read_text().partition(MARK)
    _, end, tail = rest.partition("<!-- end -->")
    write_text(page, "\n".join([head + MARK, *lines, end]) + tail)


def main() -> int:
    """Do what is left of the cases, write the JSON and the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cases", type=int, default=5000)
    given = parser.parse_args()
    kept: Kept = read_json(RESULT) if RESULT.exists() else {"kinds": {}}
    if given.cases:
        kept |= {
            "cases": given.cases,
            "command": f"python benchmarks/fuzz_signed.py --cases {given.cases}",
            "date": datetime.now(UTC).date().isoformat(),
            "hardware": f"{platform.machine()}, {os.cpu_count()} cores",
            "torch": torch.__version__,
        }
        try:
            for number, _ in enumerate(attack(kept, -(-given.cases // len(SUBJECTS)))):
                if number % EVERY == 0:
                    write_json(RESULT, kept)
        finally:
            write_json(RESULT, kept)
    tabulate(kept)
    return int(any(row["broken"] for row in kept["kinds"].values()))


if __name__ == "__main__":
    sys.exit(main())
