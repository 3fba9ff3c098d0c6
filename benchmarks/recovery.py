"""What each part of recovery brings: plain fine-tuning, then BN recalibration, distillation, EMA.

A trained network is cut once at each budget (logit sensitivity, no refit); every variant adds one
part to the one before it and trains the same cut network for the same epochs on the same images.
Top-1 on the reporting images, of the last epoch and of the one that the validation split chose.
Cells (budget, variant, seed) that the result file holds are not run again.

    python benchmarks/recovery.py --checkpoint CHECKPOINT.pth --data FOLDER          # short, CPU
    python benchmarks/recovery.py --checkpoint CHECKPOINT.pth --data FOLDER --device cuda \
        --train 0 --reporting 0 --epochs 40 --batch 128 --calibration 4096
    python benchmarks/recovery.py --model seprune/se_resnet56 --checkpoint RUN/trained \
        --data FOLDER --device cuda --train 0 --reporting 0 --epochs 200 --batch 128 \
        --calibration 4096 --macs 0.47 0.39 0.30 --variants plain bn distilled ema refit
"""

from __future__ import annotations

import argparse
import itertools
import json
import platform
import sys
import time
from datetime import date
from pathlib import Path
from typing import Any

import csv_rows
import result_rows
import torch
from torch import nn

from seprune.data import Data, DataSettings, open_data
from seprune.importance import score
from seprune.measure.metrics import evaluate
from seprune.pipeline.network import LoadedNetwork, open_network
from seprune.pruning.analyse import analyse
from seprune.pruning.plan import PruningPlan
from seprune.pruning.prune import prune
from seprune.pruning.search import make_plan
from seprune.recipe.sections import ModelSection
from seprune.recovery.finetune import FineTuneSettings, finetune
from seprune.recovery.refit import RefitOptions, refit
from seprune.runtime.distributed import resolve_device
from seprune.statistics import CollectOptions, collect_statistics

RESULTS = Path(__file__).parent / "results"
# name -> what it adds to the one before; `refit` takes the place of BN recalibration in the last
VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "bn": {"recalibrate": True},
    "distilled": {"recalibrate": True, "distill": True},
    "ema": {"recalibrate": True, "distill": True, "ema": True},
    "refit": {"refit": True, "distill": True, "ema": True},
}


def main() -> None:
    arguments = parsed()
    torch.set_num_threads(arguments.threads)
    common = provenance(arguments)
    rows = kept(arguments.out, common["command"])
    data, network = opened(arguments)
    counts = [getattr(data.info, name) for name in ("training", "validation", "reporting")]
    common["data"] = (
        f"{arguments.data.name}: {counts[0]} train, {counts[1]} validation, "
        f"{arguments.calibration} calibration, {counts[2]} reporting"
    )
    if not rows:
        dense = {"stage": "dense", "metric": "top1", "value": top1(network.model, data, arguments)}
        rows.append(common | dense)
    cells = itertools.product(range(arguments.seeds), arguments.macs, arguments.variants)
    done = {(r.get("seed"), r.get("budget"), r.get("method")) for r in rows}
    left = [cell for cell in cells if tuple(map(str, cell)) not in done]
    for cell in left[: arguments.at_most or None]:
        measured = row(network, data, arguments, cell)
        rows += flat(measured, common)
        result_rows.write(arguments.out, rows)
        print(json.dumps(measured), flush=True)
    print(f"{max(len(left) - arguments.at_most, 0) if arguments.at_most else 0} cells are left")


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="seprune/se_resnet20")
    parser.add_argument("--checkpoint", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True, help="train/ and val/")
    parser.add_argument("--mean", type=float, nargs=3, default=(0.4914, 0.4822, 0.4465))
    parser.add_argument("--std", type=float, nargs=3, default=(0.2470, 0.2435, 0.2616))
    parser.add_argument("--macs", type=float, nargs="+", default=[0.5, 0.3])
    parser.add_argument("--variants", nargs="+", default=list(VARIANTS)[:4], choices=VARIANTS)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--train", type=int, default=6000, help="images of train/, 0: all")
    parser.add_argument("--reporting", type=int, default=5000, help="images of val/, 0: all")
    parser.add_argument("--calibration", type=int, default=2048)
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--lr", type=float, default=0.02)
    parser.add_argument("--ema", type=float, default=0.99)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--at-most", type=int, default=0, help="cells in this call, 0: all")
    parser.add_argument("--work", type=Path, default=Path("runs/recovery"))
    parser.add_argument("--out", type=Path, default=None)
    arguments = parser.parse_args()
    network = arguments.model.split("_")[-1].removesuffix("resnet20")
    words = ("recovery", network, resolve_device(arguments.device).type)
    name = "-".join(word for word in words if word) + ".csv"
    arguments.out = arguments.out or RESULTS / name
    return arguments


def provenance(arguments: argparse.Namespace) -> dict[str, Any]:
    """What all rows have in common; the command holds every setting that changes numbers."""
    device = resolve_device(arguments.device)
    shown = ("train", "reporting", "calibration", "epochs", "batch", "lr", "ema")
    settings = " ".join(f"--{name} {getattr(arguments, name)}" for name in shown)
    places = f"--checkpoint {arguments.checkpoint.name} --data {arguments.data.name}"
    cpu = f"{platform.machine()} CPU, {arguments.threads} thread"
    return {
        "network": arguments.model,
        "hardware": torch.cuda.get_device_name(device) if device.type == "cuda" else cpu,
        "versions": f"torch {torch.__version__}",
        "date": date.today().isoformat(),
        "command": f"python benchmarks/recovery.py {places} {settings}",
    }


def kept(path: Path, command: str) -> csv_rows.Rows:
    """The rows that are there; those of other settings are refused."""
    rows = csv_rows.read(path)
    if rows and rows[0]["command"] != command:
        sys.exit(f"{path} holds results of {rows[0]['command']}: choose another --out")
    return rows


def flat(cell: dict[str, Any], common: dict[str, Any]) -> csv_rows.Rows:
    """A cell in the schema of result files: a number a row."""
    own = common | {"budget": cell["macs"], "method": cell["variant"], "seed": cell["seed"]}
    split = [("untrained", cell["validation_at_start"])]
    split += [(f"epoch {n}", value) for n, value in enumerate(cell["validation"], 1)]
    numbers = [(stage, "validation_top1", value) for stage, value in split if value is not None]
    numbers += [(stage, "top1", cell[stage]) for stage in ("last", "chosen")]
    numbers.append(("chosen", "seconds", cell["seconds"]))
    return [own | {"stage": s, "metric": m, "value": v} for s, m, v in numbers]


def opened(arguments: argparse.Namespace) -> tuple[Data, LoadedNetwork]:
    settings = DataSettings(
        input=(3, 32, 32),
        mean=tuple(arguments.mean),
        std=tuple(arguments.std),
        cache="device",
        augment="crop",
    )
    folder = arguments.work / f"images-{arguments.train}-{arguments.reporting}"
    some(arguments.data / "train", folder / "train", arguments.train)
    some(arguments.data / "val", folder / "val", arguments.reporting)
    data = open_data(str(folder), settings)
    section = ModelSection(name=arguments.model, classes=10, checkpoint=str(arguments.checkpoint))
    return data, open_network(section, shape=(3, 32, 32))


def some(source: Path, into: Path, count: int) -> None:
    """Links to the first images of every class, `count` in all."""
    classes = sorted(p for p in source.iterdir() if p.is_dir())
    for folder in classes:
        (into / folder.name).mkdir(parents=True, exist_ok=True)
        files = sorted(folder.iterdir())
        for file in files[: count // len(classes) if count else None]:
            link = into / folder.name / file.name
            if not link.is_symlink():
                link.symlink_to(file.resolve())


def row(
    network: LoadedNetwork,
    data: Data,
    arguments: argparse.Namespace,
    cell: tuple[int, float, str],
) -> dict[str, Any]:
    """One cell: train one variant, score its last and its chosen epoch."""
    seed, macs, variant = cell
    start = time.perf_counter()
    small, how = cut(network, data, arguments, macs), VARIANTS[variant]
    if how.get("refit"):
        options = RefitOptions(images=arguments.calibration, device=arguments.device)
        loader = data.calibration(arguments.calibration)
        small = refit(network.model, small, planned(arguments, macs), loader, options=options).model
    on_gpu = resolve_device(arguments.device).type == "cuda"
    settings = FineTuneSettings(
        epochs=arguments.epochs,
        batch_size=arguments.batch,
        lr=arguments.lr,
        warmup_epochs=min(0.2, arguments.epochs / 10),
        recalibrate=arguments.calibration if how.get("recalibrate") else 0,
        ema=arguments.ema if how.get("ema") else None,
        precision="bf16" if on_gpu else "no",
        channels_last=on_gpu,
        device=arguments.device,
        seed=seed,
    )
    folder = arguments.work / f"{variant}-{macs}-{seed}-{arguments.epochs}"
    teacher = network.model if how.get("distill") else None
    tuned = finetune(small, data, settings, teacher=teacher, folder=folder)
    chosen = top1(tuned.model, data, arguments)
    same = tuned.last is tuned.model
    last = chosen if same else top1(tuned.last, data, arguments)
    first = tuned.recalibrated or tuned.before
    return {
        "seed": seed,
        "macs": macs,
        "variant": variant,
        "validation_at_start": first.top1 if first else None,
        "validation": [r.top1 for r in tuned.history],
        "chosen": chosen,
        "last": last,
        "seconds": round(time.perf_counter() - start, 1),
    }


def planned(arguments: argparse.Namespace, macs: float) -> PruningPlan:
    return PruningPlan.load(arguments.work / f"plan-{macs}.json")


def cut(
    network: LoadedNetwork, data: Data, arguments: argparse.Namespace, macs: float
) -> nn.Module:
    """The cut network; plans are made once, with statistics of the calibration images."""
    if not (arguments.work / f"plan-{macs}.json").exists():
        structure = analyse(network.model, network.example())
        statistics = collect_statistics(
            network.model,
            data.calibration(arguments.calibration),
            structure=structure,
            gradients="logits",
            options=CollectOptions(device=arguments.device),
        )
        importance = score(structure, statistics)
        for budget in arguments.macs:
            plan = make_plan(structure, importance, macs=budget)
            plan.save(arguments.work / f"plan-{budget}.json")
    return prune(network.model, planned(arguments, macs), network.example())


def top1(model: nn.Module, data: Data, arguments: argparse.Namespace) -> float:
    return evaluate(model, data.reporting(500), device=arguments.device).top1


if __name__ == "__main__":
    main()
