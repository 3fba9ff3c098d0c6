"""Fine-tuning a refitted network with few images: whether it can lose.

SE-ResNet-20 cut to a part of its MACs and refitted on 2,048 images, then tuned with the default
settings on 200, 2,000 and 45,000 images (a tenth more make the validation split) for 1, 2 and 10
epochs. Every cell is one row of a CSV file; rows that are there are not run again.

    python benchmarks/finetune_small.py --checkpoint CHECKPOINT.pth --data FOLDER_OR_NPZ
    python benchmarks/finetune_small.py --checkpoint CHECKPOINT.pth --data cifar10.npz \
        --device cuda --images 200 2000 45000 --out benchmarks/results/finetune-small-cuda.csv
"""

from __future__ import annotations

import argparse
import itertools
import time
from pathlib import Path
from typing import Any

import torch
from cifar_arrays import Arrays, load_arrays, open_arrays
from csv_rows import read, write
from torch import nn

from seprune.export import pruned_model
from seprune.importance import score
from seprune.measure.metrics import evaluate
from seprune.pipeline.network import open_network
from seprune.pruning.analyse import analyse
from seprune.pruning.prune import prune
from seprune.pruning.search import make_plan
from seprune.recipe.sections import ModelSection
from seprune.recovery.finetune import FineTuneSettings, finetune
from seprune.recovery.refit import RefitOptions, refit
from seprune.runtime.distributed import resolve_device
from seprune.statistics import CollectOptions, collect_statistics

KEYS = ("macs", "images", "epochs", "seed")
COLUMNS = (*KEYS, "start", "tuned", "chosen", "split_start", "split_best", "optimizer",
           "lr", "norms", "trials", "seconds")  # fmt: skip


def main() -> None:
    arguments = parsed()
    torch.set_num_threads(arguments.threads)
    rows = read(arguments.out)
    done = {tuple(row[k] for k in KEYS) for row in rows}
    cells = itertools.product(
        [arguments.macs], arguments.images, arguments.epochs, range(arguments.seeds)
    )
    left = [cell for cell in cells if tuple(map(str, cell)) not in done]
    arrays = load_arrays(arguments.data)
    parent, start = networks(arguments, arrays)
    reporting = open_arrays(arrays, reporting=arguments.reporting).reporting(500)
    known = evaluate(start, reporting, device=arguments.device).top1
    for cell in left:
        rows.append(tune(cell, arguments, arrays, (parent, start, known)))
        print(rows[-1], flush=True)
        write(arguments.out, rows, COLUMNS)


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--checkpoint", required=True)
    parser.add_argument("--data", type=Path, required=True, help="train/ and val/, or an .npz file")
    parser.add_argument("--macs", type=float, default=0.5)
    parser.add_argument("--images", type=int, nargs="+", default=[200, 2000])
    parser.add_argument("--epochs", type=int, nargs="+", default=[1, 2, 10])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--reporting", type=int, default=5000)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--work", type=Path, default=Path("runs/finetune-small"))
    parser.add_argument(
        "--out", type=Path, default=Path(__file__).parent / "results" / "finetune-small.csv"
    )
    return parser.parse_args()


def networks(arguments: argparse.Namespace, arrays: Arrays) -> tuple[nn.Module, nn.Module]:
    """The parent, and the refitted cut, which is made once."""
    section = ModelSection(name="seprune/se_resnet20", classes=10, checkpoint=arguments.checkpoint)
    network = open_network(section, shape=(3, 32, 32))
    folder = arguments.work / f"refitted-{arguments.macs}"
    if not (folder / pruned_model.CONFIG).exists():
        calibration = open_arrays(arrays).calibration(2048)
        structure = analyse(network.model, network.example())
        statistics = collect_statistics(
            network.model,
            calibration,
            structure=structure,
            gradients="logits",
            options=CollectOptions(device=arguments.device),
        )
        plan = make_plan(structure, score(structure, statistics), macs=arguments.macs)
        cut = prune(network.model, plan, network.example())
        options = RefitOptions(device=arguments.device)
        found = refit(network.model, cut, plan, calibration, options=options)
        pruned_model.save(found.model.cpu(), folder, network.architecture.cut(plan))
    return network.model, pruned_model.load(folder)


def tune(
    cell: tuple[float, int, int, int],
    arguments: argparse.Namespace,
    arrays: Arrays,
    networks: tuple[nn.Module, nn.Module, float],
) -> dict[str, Any]:
    _, images, epochs, seed = cell
    parent, start, known = networks
    begun = time.perf_counter()
    cuda = resolve_device(arguments.device).type == "cuda"
    count = min(round(images / 0.9), len(arrays["train_labels"]))
    data = open_arrays(arrays, images=count, reporting=arguments.reporting, seed=seed)
    settings = FineTuneSettings(
        epochs=epochs,
        seed=seed,
        device=arguments.device,
        precision="bf16" if cuda else "no",
        channels_last=cuda,
    )
    tuned = finetune(start, data, settings, teacher=parent)
    reporting = data.reporting(500)
    numbers = tuned.numbers()
    unchanged = numbers["chosen"] == "start"
    top1 = known if unchanged else evaluate(tuned.model, reporting, device=arguments.device).top1
    found = {
        **dict(zip(KEYS, map(str, cell))),
        "start": f"{known:.4f}",
        "tuned": f"{top1:.4f}",
        "split_start": f"{numbers['validation_before']:.4f}",
        "split_best": f"{numbers['validation_best'] or numbers['validation_before']:.4f}",
        "lr": f"{numbers['lr']:.3g}",
        "seconds": f"{time.perf_counter() - begun:.0f}",
    }
    return found | {k: str(numbers[k]) for k in ("chosen", "optimizer", "norms", "trials")}


if __name__ == "__main__":
    main()
