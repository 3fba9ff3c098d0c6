"""How much of the parent's accuracy a cut keeps without labels and training, by every way to cut.

Variants of the recipe (criterion, allocation, steps, images) are compared on the validation split,
which is carved from train/: top-1 of the cut alone, after BatchNorm recalibration, and refitted.
With `--report` the one with the best refitted mean, of those measured at all budgets, is measured
once on val/.
Cells that are in the results file are not measured again, so the command goes on where it stopped.

    python benchmarks/refit.py --checkpoint CHECKPOINT.pth --data FOLDER
    python benchmarks/refit.py --checkpoint CHECKPOINT.pth --data FOLDER --report
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from datetime import date
from pathlib import Path
from typing import Any

import torch
from collect import hardware
from torch import nn

from seprune.data import in_turn
from seprune.measure.metrics import evaluate
from seprune.pipeline import stages
from seprune.pipeline.collection import collect
from seprune.pipeline.context import Context, Runtime
from seprune.pipeline.inputs import open_both
from seprune.pipeline.settings import CutSettings
from seprune.pruning.limits import Budget
from seprune.pruning.plan import PruningPlan
from seprune.recipe import recipe_of
from seprune.recovery.recalibrate import recalibrate
from seprune.recovery.refit.targets import TargetFinder
from seprune.runtime.distributed import resolve_device
from seprune.runtime.files import write_json, write_text
from seprune.runtime.reading import read_json
from seprune.statistics import GateStatistics

RESULTS = Path(__file__).parent / "results"
_LOGIT = {"importance.criterion": "gate_logit", "importance.combine": "coupled"}
_COST_AWARE = {**_LOGIT, "plan.allocation": "cost_aware"}
VARIANTS: dict[str, dict[str, Any]] = {
    "gate_logit coupled, cost_aware": _COST_AWARE,
    "gate_logit mean, global": {
        **_LOGIT, "importance.combine": "mean", "plan.allocation": "global"
    },
    "gate_logit coupled, cost_aware, ReLU not in the target": {**_COST_AWARE, "refit": "linear"},
    "gate_logit coupled, cost_aware, plain target": {**_COST_AWARE, "refit": "plain"},
    "l2, global": {"importance.criterion": "l2"},
    "gate_logit coupled, global": {**_LOGIT, "plan.allocation": "global"},
    "gate_logit joint, cost_aware": {**_COST_AWARE, "importance.combine": "joint"},
    "gate_logit coupled, cost_aware, at least 8": {**_COST_AWARE, "plan.min_channels": 8},
    "gate_logit coupled, cost_aware, 3 steps": {**_COST_AWARE, "plan.steps": 3},
    "gate_mean, propagated": {"importance.criterion": "gate_mean",
                              "importance.ungated": "propagate"},
    "gate_mean, probes": {"importance.criterion": "gate_mean", "importance.probe.images": 4096},
    "gate_logit coupled, sensitivity": {
        **_LOGIT, "plan.allocation": "sensitivity", "sensitivity.shares": [0.1, 0.3, 0.5, 0.7, 0.9],
        "sensitivity.images": 256,
    },
    "gate_logit mean, cost_aware": {**_COST_AWARE, "importance.combine": "mean"},
    "l2, cost_aware": {"importance.criterion": "l2", "plan.allocation": "cost_aware"},
    "uniform": {"importance.criterion": "uniform"},
    "gate_logit coupled, cost_aware, 6,144 images": {**_COST_AWARE, "collect.images": 6144},
}  # fmt: skip
SOME = {  # budgets, where not all of them are worth the time
    "l2, global": (0.5, 0.3), "gate_logit coupled, global": (0.3,),
    "gate_logit coupled, cost_aware, ReLU not in the target": (0.5,),
    "gate_logit coupled, cost_aware, plain target": (0.5,),
    "gate_logit coupled, sensitivity": (0.3,), "gate_mean, propagated": (0.5,),
    "gate_mean, probes": (0.5,), "gate_logit mean, global": (0.5, 0.3),
    "gate_logit coupled, cost_aware, at least 8": (0.3,),
    "gate_logit coupled, cost_aware, 3 steps": (0.3,),
    "l2, cost_aware": (0.3,), "uniform": (0.3,),
    "gate_logit coupled, cost_aware, 6,144 images": (0.7,),
}  # fmt: skip


def main() -> None:
    arguments = parsed()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    path = RESULTS / arguments.out
    result = read_json(path) if path.exists() and "choice" in read_json(path) else fresh(arguments)
    work = Work(arguments)
    for name, macs in wanted(arguments, result):
        split = "reporting" if arguments.report else "validation"
        result["rows" if arguments.report else "choice"].append(work.cell(name, macs, split))
        print(result["rows" if arguments.report else "choice"][-1], flush=True)
        write_json(path, result)
    if arguments.report and "parent" not in result:
        model = work.dense.network.model
        result["parent"] = work.top1(model, "reporting")
        result["parent_validation"] = work.top1(model, "validation")
        result["reporting_images"] = work.dense.images().info.reporting
        write_json(path, result)
    if arguments.out == "refit-choice.json":
        document(result)


def document(result: dict[str, Any]) -> None:
    """Make the tables of docs/results.md and docs/refit.md anew."""
    means = {"cut": "cut", "bn": "BN recalibrated", "refit": "refitted"}
    head = ["| variant | MACs | " + " | ".join(means.values()) + " |", "|---|---|---|---|---|"]
    choice = head + [
        f"| {r['variant']} | {r['macs']} | "
        + " | ".join(f"{r[k]:.4f}" if k in r else "" for k in means) + " |"
        for r in sorted(result["choice"], key=lambda r: (-r["macs"], -r["refit"]))
    ]  # fmt: skip
    made = [f"`{result['command']}`, {result['hardware']}, {result['date']}: top-1 on 2,000 images "
            "of the validation split, which is carved from train/.", ""]  # fmt: skip
    _between("results.md", made + choice)
    rows = ["| MACs | refitted | lost, points |", "|---|---|---|"] + [
        f"| {r['macs']} | {r['refit']:.4f} | {100 * (result['parent'] - r['refit']):.2f} |"
        for r in result["rows"]
        if "parent" in result
    ]
    where = f"{result.get('reporting_images', 0):,} images of val/, parent"
    intro = f"Chosen on the validation split: {result.get('chosen', '')}. On {where} "
    _between("refit.md", [intro + f"{result.get('parent', 0):.4f}:", "", *rows])


def _between(name: str, lines: list[str]) -> None:
    path = Path(__file__).parents[1] / "docs" / name
    start, end = "<!-- made by benchmarks/refit.py -->", "<!-- end -->"
    before, found, rest = path.read_text().partition(start)
    if not found:
        return
    after = rest.partition(end)[2]
    write_text(path, "\n".join([before + start, *lines, end]) + after)


def wanted(arguments: argparse.Namespace, result: dict[str, Any]) -> list[tuple[str, float]]:
    """The cells that are not measured yet: of all variants, or of the best one."""
    names = list(VARIANTS)
    if arguments.report:
        result["chosen"] = best(result["choice"], arguments.macs)
        names = [result["chosen"]]
    done = {(r["variant"], r["macs"]) for r in result["rows" if arguments.report else "choice"]}
    every = [(n, m) for n in names for m in arguments.macs if m in SOME.get(n, (m,))]
    return [cell for cell in every if cell not in done][: arguments.cells]


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="seprune/se_resnet20")
    parser.add_argument("--classes", type=int, default=10)
    parser.add_argument("--checkpoint", type=Path, required=True)
    parser.add_argument("--data", required=True)
    parser.add_argument("--mean", type=float, nargs=3, default=(0.4914, 0.4822, 0.4465))
    parser.add_argument("--std", type=float, nargs=3, default=(0.2470, 0.2435, 0.2616))
    parser.add_argument("--macs", type=float, nargs="+", default=[0.7, 0.5, 0.3])
    parser.add_argument("--device", default="auto")
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--cells", type=int, default=100, help="measure no more at a time")
    parser.add_argument("--report", action="store_true", help="the best one, on val/")
    parser.add_argument("--out", default="refit-choice.json")
    return parser.parse_args()


def fresh(arguments: argparse.Namespace) -> dict[str, Any]:
    names = {str(arguments.checkpoint): arguments.checkpoint.name}
    names[arguments.data] = Path(arguments.data).name  # folders of this machine say nothing
    words = [names.get(word, word) for word in sys.argv[1:]]
    return {
        "command": " ".join(["python", "benchmarks/refit.py", *words]),
        "date": date.today().isoformat(),
        "hardware": hardware(resolve_device(arguments.device)),
        "torch": torch.__version__,
        "choice": [],
        "rows": [],
    }


def best(rows: list[dict[str, Any]], budgets: list[float]) -> str:
    """The variant with the highest mean of its refitted top-1, of those with all budgets."""
    means = {}
    for name in {row["variant"] for row in rows}:
        own = [row["refit"] for row in rows if row["variant"] == name]
        if len(own) == len(budgets):
            means[name] = sum(own) / len(own)
    return max(means, key=lambda name: means[name])


@contextmanager
def aiming(parts: str) -> Iterator[None]:
    """Refit with less in the targets: no ReLU (`linear`), nor what residual sums need (`plain`)."""
    unchanged = TargetFinder.find
    less = {"whole": {}, "linear": {"rectified": False},
            "plain": {"rectified": False, "branch": None, "other": None}}[parts]  # fmt: skip

    def find(finder: TargetFinder, plan: PruningPlan) -> Any:
        targets, skipped = unchanged(finder, plan)
        return [replace(target, **less) for target in targets], skipped

    TargetFinder.find = find
    try:
        yield
    finally:
        TargetFinder.find = unchanged


class Work:
    """The network and the data, opened once, and statistics that several cells share."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.arguments = arguments
        recipe = self.recipe({})
        self.dense = Context(*open_both(recipe), Runtime(resolve_device(recipe.device)))
        self.statistics: dict[tuple[Any, ...], GateStatistics | None] = {}

    def recipe(self, changes: dict[str, Any]) -> Any:
        a = self.arguments
        values = {
            "name": "refit",
            "device": a.device,
            "model": {"name": a.model, "classes": a.classes, "checkpoint": str(a.checkpoint)},
            "data": {"source": a.data, "mean": list(a.mean), "std": list(a.std)},
        }
        overrides = {
            "plan.round_to": 1,
            "plan.candidates": False,
            "importance.combine": "mean",
            **changes,
        }
        return recipe_of(values, [f"{key}={value}" for key, value in overrides.items()])

    def cell(self, name: str, macs: float, split: str) -> dict[str, Any]:
        """One variant at one budget: top-1 on a split, widths, seconds."""
        changes = {**VARIANTS[name], "plan.macs": macs}
        parts = changes.pop("refit", "whole")
        recipe = self.recipe(changes)
        settings = CutSettings.of(recipe)
        joint = recipe.importance.combine == "joint"
        key = (recipe.importance.criterion, recipe.importance.probe, recipe.collect, joint)
        if key not in self.statistics:
            needed = settings.needs_statistics
            self.statistics[key] = collect(self.dense, settings) if needed else None
        began = time.perf_counter()
        with aiming(parts):
            cut = stages.cut_in_steps(
                self.dense, settings, self.statistics[key], Budget.parse(macs=macs)
            )
        row = {
            "variant": name,
            "macs": macs,
            "reached": cut.plan.facts["macs"][1] / self.dense.structure.costs()["macs"],
            "widths": {n: w for n, (b, w) in cut.plan.widths().items() if b > 8},
            "seconds": round(time.perf_counter() - began, 1),
            "refit": self.top1(cut.recovered, split),
        }
        if recipe.plan.steps == 1 and split == "validation":  # in steps they are refitted before
            loader = self.dense.images().calibration(recipe.collect.images, seed=recipe.seed)
            normed = recalibrate(cut.pruned, loader, device=recipe.device)
            row |= {"cut": self.top1(cut.pruned, split), "bn": self.top1(normed, split)}
        return row

    def top1(self, model: nn.Module, split: str) -> float:
        """On all images of val/ (`reporting`), or on 2,000 of the validation split."""
        data = self.dense.images()
        if split == "reporting":
            loader = data.reporting(500)
        else:
            loader = data.validation(500)
            loader.rows = in_turn(loader.store.labels, loader.rows, seed=0)[:2000]
        return evaluate(model, loader, device=self.arguments.device).top1


if __name__ == "__main__":
    main()
