"""Segmentation and detection on the drawn shapes: what a cut, a refit and a short tuning leave.

Two small networks on SE-ResNet-8 are trained, one for each seed, and cut to parts of their MACs by
seprune's default, by `l2`, by torch-pruning's Taylor and at random; all methods have the same
images, budgets, recovery and tuning. Every row of the CSV file is one number; cells that are there
are not run again, and a training that was stopped goes on.

    python benchmarks/tasks.py --seeds 3
"""

from __future__ import annotations

import argparse
import itertools
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from csv_rows import read, write
from safetensors.torch import load_file, save_file
from torch import nn

import seprune
from seprune.data import Data, DataSettings, open_data
from seprune.models import build
from seprune.pruning.plan import with_facts
from seprune.pruning.rules import rules_to_try
from seprune.recovery.candidates import TrialOptions, choose_plan

KEYS = ("task", "seed", "method", "macs")
COLUMNS = (*KEYS, "stage", "metric", "value", "loss", "kept", "choice", "seconds")
METHODS = ("default", "l2", "taylor", "random")
NETWORKS = {"segmentation": "seprune/se_resnet8_fpn", "detection": "seprune/se_resnet8_ssd"}
SIDE = 64
CALIBRATION = 512  # images to collect and to refit on
TRAINING = {"batch_size": 32, "optimizer": "adamw", "weight_decay": 0.01, "device": "cpu"}


def main() -> None:
    arguments = parsed()
    torch.set_num_threads(arguments.threads)
    rows = read(arguments.out)
    done = {cell_of(row) for row in rows if row["stage"] in ("dense", "tuned")}
    for seed, task in itertools.product(range(arguments.seeds), arguments.tasks):
        cells = [(task, str(seed), "dense", "1.0")]
        cells += [(task, str(seed), m, str(b)) for b in arguments.macs for m in arguments.methods]
        left = [cell for cell in cells if cell not in done]
        if not left:
            continue
        data = open_data("shapes", DataSettings(task=task, workers=0, batch_size=64))
        model = trained(task, seed, arguments, data)
        for cell in left:
            rows = [row for row in rows if cell_of(row) != cell]  # of a cell begun by hand
            rows += list(measure(model, data, cell, arguments))
            print(rows[-1], flush=True)
            write(arguments.out, rows, COLUMNS)


def cell_of(row: dict[str, str]) -> tuple[str, ...]:
    """Which cell a row is of."""
    return tuple(row[key] for key in KEYS)


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tasks", nargs="+", choices=NETWORKS, default=list(NETWORKS))
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--macs", type=float, nargs="+", default=[0.5, 0.3])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=20, help="of the dense network")
    parser.add_argument("--tuning", type=int, default=2, help="epochs after the refit")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--work", type=Path, default=Path("runs/tasks"), help="trained networks")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "tasks.csv")
    return parser.parse_args()


def trained(task: str, seed: int, arguments: argparse.Namespace, data: Data) -> nn.Module:
    """The dense network, from the work folder if it was trained before."""
    path = arguments.work / f"{task}-{seed}-{arguments.epochs}.safetensors"
    torch.manual_seed(seed)
    model = build(NETWORKS[task], classes=5).eval()
    if path.exists():
        model.load_state_dict(load_file(path))
        return model
    settings = seprune.FineTuneSettings(
        epochs=arguments.epochs, lr=5e-3, schedule="cosine", norms="train", warmup_epochs=1,
        recalibrate=0, seed=seed, **TRAINING,
    )  # fmt: skip
    folder = path.with_suffix("")
    model = seprune.finetune(model, data, settings, folder=folder).model.eval()
    save_file(model.state_dict(), path)
    return model


@dataclass(frozen=True)
class Scored:
    """A network on the reporting images."""

    stage: str
    model: nn.Module
    choice: str = ""


def measure(
    model: nn.Module, data: Data, cell: tuple[str, str, str, str], arguments: argparse.Namespace
) -> Iterator[dict[str, str]]:
    """The rows of one cell."""
    one = torch.rand(1, 3, SIDE, SIDE)
    whole, start = seprune.count(model, one).macs, time.monotonic()
    stages = (
        [Scored("dense", model)]
        if cell[2] == "dense"
        else recovered(model, data, cell, arguments.tuning)
    )
    for found in stages:
        seconds = time.monotonic() - start
        score = seprune.evaluate(found.model, data.reporting(), device="cpu")
        yield {
            **dict(zip(KEYS, cell, strict=True)), "stage": found.stage, "metric": score.metric,
            "value": f"{score.value:.4f}", "loss": f"{score.loss:.4f}",
            "kept": f"{seprune.count(found.model, one).macs / whole:.4f}", "choice": found.choice,
            "seconds": f"{seconds:.0f}",
        }  # fmt: skip


def recovered(
    model: nn.Module, data: Data, cell: tuple[str, str, str, str], epochs: int
) -> Iterator[Scored]:
    """The cut network, refitted, and tuned; the default plans for what is made of the cut."""
    task, seed, method, macs = cell
    alone, plan = planned(model, data, method, macs=float(macs), seed=int(seed))
    loader = data.calibration(CALIBRATION, seed=int(seed))
    yield Scored("cut", seprune.prune(model, alone), chosen_of(alone))
    chosen, cut = chosen_of(plan), seprune.prune(model, plan)
    options = seprune.RefitOptions(images=CALIBRATION, device="cpu")
    refitted = seprune.refit(model, cut, plan, loader, options=options).model
    yield Scored("refitted", refitted, chosen)
    settings = seprune.FineTuneSettings(
        epochs=epochs, lr=1e-3, schedule="cosine", norms="train", recalibrate=0, seed=int(seed),
        **TRAINING,
    )  # fmt: skip
    teacher = model if task == "segmentation" else None  # a detector has none
    yield Scored("tuned", seprune.finetune(refitted, data, settings, teacher=teacher).model, chosen)


def chosen_of(plan: seprune.PruningPlan) -> str:
    """The rule that made a plan, where there were several."""
    return plan.facts.get("candidates", {}).get("chosen", "")


def planned(
    model: nn.Module, data: Data, method: str, *, macs: float, seed: int
) -> tuple[seprune.PruningPlan, seprune.PruningPlan]:
    """The plan of one method for a cut that stays as it is, and for one that is refitted.

    The default chooses each among its candidates; other methods have one.
    """
    loader = data.calibration(CALIBRATION, seed=seed)
    structure = seprune.analyse(model, torch.rand(2, 3, SIDE, SIDE))
    scoring = seprune.Scoring("gate_logit" if method == "default" else method, seed=seed)
    statistics = None
    if method in ("default", "taylor"):
        statistics = seprune.collect_statistics(
            model, loader, structure=structure,
            gradients="logits" if method == "default" else "weights",
            options=seprune.CollectOptions(device="cpu", seed=seed),
        )  # fmt: skip

    def best(recover: str) -> seprune.PruningPlan:
        rules = {method: (scoring, seprune.Allocation())}
        if method == "default":
            refits = recover == "refit"
            rules = rules_to_try(scoring, statistics, seprune.Allocation(), refits=refits)
        plans = {
            name: seprune.make_plan(
                structure, seprune.score(structure, statistics, model=model, scoring=way),
                allocation=own, macs=macs,
            )
            for name, (way, own) in rules.items()
        }  # fmt: skip
        images, held_out = {"none": (0, 512), "refit": (384, 128)}[recover]
        options = TrialOptions(images=images, held_out=held_out, recover=recover, device="cpu")
        choice = choose_plan(model, plans, loader, options=options)
        return with_facts(choice.plan, candidates=choice.facts()) if len(plans) > 1 else choice.plan

    return best("none"), best("refit")


if __name__ == "__main__":
    main()
