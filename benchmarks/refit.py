"""How much of the parent's accuracy `seprune.refit` gives back, without labels and training.

SE-ResNet-20 (or any network with a checkpoint), logit sensitivity, one shot, at each budget: top-1
on the reporting images of the cut network, after BatchNorm recalibration, and after the refit.

    python benchmarks/refit.py --checkpoint CHECKPOINT.pth --data FOLDER
    python benchmarks/refit.py --checkpoint CHECKPOINT.pth --data FOLDER --device cuda --images 8192
"""

from __future__ import annotations

import argparse
import platform
import sys
import time
from datetime import date
from pathlib import Path
from typing import Any

import torch
from torch import nn

from seprune.budget import make_plan
from seprune.checkpoint import apply_weights, load_weights
from seprune.data import Data, DataSettings, open_data
from seprune.evaluation import evaluate, recalibrate
from seprune.files import write_json
from seprune.importance import Importance, collecting, score
from seprune.models import build
from seprune.processes import resolve_device
from seprune.pruning import cuttable, prune
from seprune.refitting import RefitOptions, refit
from seprune.statistics import CollectOptions, collect_statistics

RESULTS = Path(__file__).parent / "results"


def main() -> None:
    arguments = parsed()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    model = build(arguments.model, classes=arguments.classes)
    apply_weights(model, load_weights(arguments.checkpoint), path=arguments.checkpoint)
    data = open_data(
        arguments.data,
        DataSettings(mean=tuple(arguments.mean), std=tuple(arguments.std), batch_size=128),
    )
    first, _ = next(iter(data.calibration(4)))
    structure = cuttable(model.eval(), first)
    importance = logit_scores(model, structure, data, arguments)
    rows = [row(model, structure, importance, data, arguments, b) for b in arguments.macs]
    device = resolve_device(arguments.device)
    result = {
        "command": " ".join(["python", "benchmarks/refit.py", *shown(sys.argv[1:], arguments)]),
        "date": date.today().isoformat(),
        "hardware": torch.cuda.get_device_name(device)
        if device.type == "cuda"
        else f"{platform.machine()} CPU, {torch.get_num_threads()} threads",
        "torch": torch.__version__,
        "parent": top1(model, data, arguments),
        "reporting_images": data.info.reporting,
        "rows": rows,
    }
    write_json(RESULTS / arguments.out, result)
    print(*rows, sep="\n")


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="seprune/se_resnet20")
    parser.add_argument("--classes", type=int, default=10)
    parser.add_argument("--checkpoint", type=Path, required=True)
    parser.add_argument("--data", required=True)
    parser.add_argument("--mean", type=float, nargs=3, default=(0.4914, 0.4822, 0.4465))
    parser.add_argument("--std", type=float, nargs=3, default=(0.2470, 0.2435, 0.2616))
    parser.add_argument("--macs", type=float, nargs="+", default=[0.7, 0.5, 0.3])
    parser.add_argument("--images", type=int, default=2048, help="for the refit")
    parser.add_argument("--scored", type=int, default=4000, help="images for the scores")
    parser.add_argument("--rows", type=int, default=RefitOptions.rows)
    parser.add_argument("--ridge", type=float, default=RefitOptions.ridge)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--out", default="refit.json")
    return parser.parse_args()


def shown(words: list[str], arguments: argparse.Namespace) -> list[str]:
    """The command without the folders of this machine."""
    names = {str(arguments.checkpoint): arguments.checkpoint.name}
    names[arguments.data] = Path(arguments.data).name
    return [names.get(word, word) for word in words]


def logit_scores(
    model: nn.Module, structure: Any, data: Data, arguments: argparse.Namespace
) -> Importance:
    options = collecting(structure, CollectOptions(device=arguments.device))
    statistics = collect_statistics(
        model,
        data.calibration(arguments.scored),
        gates=structure.gates,
        gradients="logits",
        options=options,
    )
    return score(structure, statistics)


def row(
    model: nn.Module,
    structure: Any,
    importance: Importance,
    data: Data,
    arguments: argparse.Namespace,
    macs: float,
) -> dict[str, Any]:
    plan = make_plan(structure, importance, macs=macs)
    small = prune(model, plan)
    options = RefitOptions(
        images=arguments.images,
        rows=arguments.rows,
        ridge=arguments.ridge,
        device=arguments.device,
    )
    began = time.perf_counter()
    found = refit(model, small, plan, data.calibration(arguments.images), options=options)
    seconds = time.perf_counter() - began
    normed = recalibrate(small, data.calibration(arguments.images), device=arguments.device)
    return {
        "macs": macs,
        "images": arguments.images,
        "cut": top1(small, data, arguments),
        "bn": top1(normed, data, arguments),
        "refit": top1(found.model, data, arguments),
        "seconds": round(seconds, 1),
        "layers": len(found.layers),
        "skipped": dict(found.skipped),
    }


def top1(model: nn.Module, data: Data, arguments: argparse.Namespace) -> float:
    return evaluate(model, data.reporting(500), device=arguments.device).top1


if __name__ == "__main__":
    main()
