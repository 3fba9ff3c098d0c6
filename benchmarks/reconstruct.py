"""What label-free reconstruction adds to the refit, by budget, epochs and images.

SE-ResNet-20 is cut, refitted on unlabelled images and reconstructed on the same ones; top-1 is that
on val/, on which nothing was chosen. Every cell is one row of a CSV file; rows that are there are
not run again.

    python benchmarks/reconstruct.py --checkpoint CHECKPOINT.pth --data FOLDER_OR_NPZ
"""

from __future__ import annotations

import argparse
import itertools
import time
from pathlib import Path
from typing import Any

import torch
from cifar_arrays import Arrays, load_arrays, open_arrays
from collect import hardware
from csv_rows import read, write

from seprune.importance import score
from seprune.measure.metrics import evaluate
from seprune.pipeline.network import open_network
from seprune.pruning.analyse import analyse
from seprune.pruning.prune import prune
from seprune.pruning.search import make_plan
from seprune.recipe.sections import ModelSection
from seprune.recovery.reconstruct import ReconstructOptions, reconstruct
from seprune.recovery.refit import RefitOptions, refit
from seprune.statistics import CollectOptions, collect_statistics

KEYS = ("macs", "images", "epochs", "seed")
COLUMNS = (*KEYS, "parent", "refitted", "reconstructed", "error_before", "error_after", "best",
           "seconds", "hardware", "date")  # fmt: skip


def main() -> None:
    arguments = parsed()
    torch.set_num_threads(arguments.threads)
    rows = read(arguments.out)
    done = {tuple(row[k] for k in KEYS) for row in rows}
    cells = itertools.product(
        arguments.macs, arguments.images, arguments.epochs, range(arguments.seeds)
    )
    arrays = load_arrays(arguments.data)
    for cell in cells:
        if tuple(map(str, cell)) not in done:
            rows.append(measure(cell, arguments, arrays))
            print(rows[-1], flush=True)
            write(arguments.out, rows, COLUMNS)


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--checkpoint", required=True)
    parser.add_argument("--data", type=Path, required=True, help="train/ and val/, or an .npz file")
    parser.add_argument("--macs", type=float, nargs="+", default=[0.7, 0.5, 0.3])
    parser.add_argument("--images", type=int, nargs="+", default=[2048])
    parser.add_argument("--epochs", type=int, nargs="+", default=[10, 40])
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument(
        "--out", type=Path, default=Path(__file__).parent / "results" / "reconstruct.csv"
    )
    return parser.parse_args()


def measure(
    cell: tuple[float, int, int, int], arguments: argparse.Namespace, arrays: Arrays
) -> dict[str, Any]:
    """One network cut, refitted and reconstructed."""
    macs, images, epochs, seed = cell
    device = arguments.device
    section = ModelSection(name="seprune/se_resnet20", classes=10, checkpoint=arguments.checkpoint)
    network = open_network(section, shape=(3, 32, 32))
    data = open_arrays(arrays, seed=seed)
    loader = data.calibration(images, seed=seed)
    structure = analyse(network.model, network.example())
    statistics = collect_statistics(
        network.model,
        loader,
        structure=structure,
        gradients="logits",
        options=CollectOptions(device=device, seed=seed),
    )
    plan = make_plan(structure, score(structure, statistics), macs=macs)
    cut = prune(network.model, plan, network.example())
    small = refit(
        network.model, cut, plan, loader, options=RefitOptions(images=images, device=device)
    ).model
    begun = time.perf_counter()
    options = ReconstructOptions(images=images, epochs=epochs, device=device, seed=seed)
    made = reconstruct(network.model, small, plan, loader, options=options)
    seconds = time.perf_counter() - begun
    top1 = [
        evaluate(model, data.reporting(500), device=device).top1
        for model in (network.model, small, made.model)
    ]
    return {
        **dict(zip(KEYS, map(str, cell))),
        **dict(zip(("parent", "refitted", "reconstructed"), (f"{v:.4f}" for v in top1))),
        "error_before": f"{made.errors[0]:.5f}",
        "error_after": f"{made.errors[made.best]:.5f}",
        "best": str(made.best),
        "seconds": f"{seconds:.0f}",
        "hardware": hardware(torch.device(device)),
        "date": time.strftime("%Y-%m-%d"),
    }


if __name__ == "__main__":
    main()
