"""Which plan the network chooses, and what each candidate gives after a refit.

SE-ResNet-20 is cut by the plan of each rule; the trial errors need no labels, top-1 is that on val/
after a refit on all calibration images, on which nothing was chosen. Every row of the CSV file is
one candidate; cells that are there are not run again.

    python benchmarks/candidates.py --checkpoint CHECKPOINT.pth --data FOLDER_OR_NPZ
"""

from __future__ import annotations

import argparse
import itertools
from pathlib import Path
from typing import Any

import torch
from cifar_arrays import Arrays, load_arrays, open_arrays
from csv_rows import read, write

from seprune.importance import Scoring, score
from seprune.importance.alternatives import alternatives
from seprune.measure.metrics import evaluate
from seprune.pipeline.network import open_network
from seprune.pruning.analyse import analyse
from seprune.pruning.prune import prune
from seprune.pruning.search import make_plan
from seprune.recipe.sections import ModelSection
from seprune.recovery.candidates import TrialOptions, choose_plan
from seprune.recovery.refit import RefitOptions, refit
from seprune.statistics import CollectOptions, collect_statistics

KEYS = ("macs", "seed")
COLUMNS = (*KEYS, "rule", "error", "images", "seconds", "top1", "choice")


def main() -> None:
    arguments = parsed()
    torch.set_num_threads(arguments.threads)
    rows = read(arguments.out)
    done = {tuple(row[k] for k in KEYS) for row in rows}
    arrays = load_arrays(arguments.data)
    for cell in itertools.product(arguments.macs, range(arguments.seeds)):
        if tuple(map(str, cell)) not in done:
            rows += measure(cell, arguments, arrays)
            print(rows[-1], flush=True)
            write(arguments.out, rows, COLUMNS)


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--checkpoint", required=True)
    parser.add_argument("--data", type=Path, required=True, help="train/ and val/, or an .npz file")
    parser.add_argument("--macs", type=float, nargs="+", default=[0.7, 0.5, 0.3, 0.15])
    parser.add_argument("--images", type=int, default=2048)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument(
        "--out", type=Path, default=Path(__file__).parent / "results" / "candidates.csv"
    )
    return parser.parse_args()


def measure(
    cell: tuple[float, int], arguments: argparse.Namespace, arrays: Arrays
) -> list[dict[str, Any]]:
    """All candidates of one budget."""
    macs, seed = cell
    device = arguments.device
    section = ModelSection(name="seprune/se_resnet20", classes=10, checkpoint=arguments.checkpoint)
    network = open_network(section, shape=(3, 32, 32))
    model, data = network.model, open_arrays(arrays, seed=seed)
    loader = data.calibration(arguments.images, seed=seed)
    structure = analyse(model, network.example())
    statistics = collect_statistics(
        model,
        loader,
        structure=structure,
        gradients="logits",
        options=CollectOptions(device=device, seed=seed),
    )
    rules = alternatives(Scoring(seed=seed), statistics)
    rules["gate_mean"] = Scoring("gate_mean", "mean", seed=seed)
    scores = {
        name: score(structure, statistics, model=model, scoring=way) for name, way in rules.items()
    }
    plans = {name: make_plan(structure, made, macs=macs) for name, made in scores.items()}
    choice = choose_plan(model, plans, loader, options=TrialOptions(device=device))
    options = RefitOptions(images=arguments.images, device=device)
    rows = []
    for trial in choice.trials:
        plan = plans[trial.name]
        small = refit(model, prune(model, plan), plan, loader, options=options).model
        top1 = evaluate(small, data.reporting(500), device=device).top1
        chosen = "chosen" if trial.name == choice.name else ""
        rows.append({
            "macs": str(macs), "seed": str(seed), "rule": trial.name,
            "error": f"{trial.error:.4f}", "images": str(trial.images),
            "seconds": f"{trial.seconds:.1f}", "top1": f"{top1:.4f}",
            "choice": "close" if trial.name in choice.close else chosen,
        })  # fmt: skip
    return rows


if __name__ == "__main__":
    main()
