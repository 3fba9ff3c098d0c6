"""Thousands of random networks against independent checks (see tests/random_networks.py).

Every row of the CSV file is one network: its seed, its blocks, and what is wrong, empty where
nothing is. Seeds that are there are not run again.

    python benchmarks/random_networks.py --seeds 0:5000
"""

from __future__ import annotations

import argparse
import csv
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tests"))

from random_networks import network, problems  # noqa: E402

COLUMNS = ("seed", "dims", "kinds", "head", "problems")


def main() -> None:
    arguments = parsed()
    torch.set_num_threads(1)
    first, last = map(int, arguments.seeds.split(":"))
    done = {int(row["seed"]) for row in read(arguments.out)}
    with arguments.out.open("a", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        if not done:
            writer.writeheader()
        for seed in range(first, last):
            if seed not in done:
                row = measured(seed)
                writer.writerow(row)
                file.flush()
                if row["problems"]:
                    print(row, flush=True)
    rows = read(arguments.out)
    wrong = sum(bool(row["problems"]) for row in rows)
    print(f"{wrong} of {len(rows)} networks with problems")


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", default="0:5000", help="first and end, such as 0:5000")
    out = ROOT / "benchmarks" / "results" / "random_networks.csv"
    parser.add_argument("--out", type=Path, default=out)
    return parser.parse_args()


def measured(seed: int) -> dict[str, object]:
    model = network(seed)
    try:
        found = problems(seed)
    except Exception as error:  # a crash is a finding
        found = [f"{type(error).__name__}: {error}".partition("\n")[0]]
    return {
        "seed": seed,
        "dims": model.nd,
        "kinds": " ".join(model.kinds),
        "head": model.head,
        "problems": "; ".join(found),
    }


def read(path: Path) -> list[dict[str, str]]:
    if not path.is_file():
        return []
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


if __name__ == "__main__":
    main()
