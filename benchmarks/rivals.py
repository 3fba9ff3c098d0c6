"""Rivals of today beside the default: one protocol, one run, one CSV.

Every way gets the same network, the same unlabelled calibration images, the same budgets of MACs
with widths as they come, and is measured on the same images of val/, on which nothing is chosen: as
cut, with its own weight update where it has one, and after BatchNorm recalibration. seprune's ways
and some of the others' plans are refitted too, and the default's refitted network is reconstructed
(`--reconstruct EPOCHS`). Rows that are there are not measured again.

    python benchmarks/rivals.py --data FOLDER --network se_resnet20 --checkpoint FILE
    python benchmarks/rivals.py --data FOLDER --network mobilenet_v3_small    # kept weights

torch-kirigami's rows need that package (`pip install torch-kirigami`); its magnitude and Taylor
are its own code, OSSCAR and VBP, which its wheel does not hold, and GRAIL are written from their
papers (benchmarks/rival_methods.py). torch-pruning's criteria are those of docs/importance.md.
"""

from __future__ import annotations

import argparse
import copy
import importlib.util
import time
from collections.abc import Callable
from datetime import date
from functools import cached_property
from pathlib import Path
from typing import Any

import result_rows
import torch
from collect import hardware
from csv_rows import read
from kept_weights import NETWORKS, kept
from rival_methods import Batches, grams, mapped_by, osscar, variance_pruned
from torch import nn

from seprune.data import DataSettings, in_turn, open_data
from seprune.errors import InputError
from seprune.importance import Scoring, score
from seprune.importance.alternatives import alternatives
from seprune.measure.flops import count
from seprune.measure.metrics import evaluate
from seprune.models.blocks import SqueezeExcitation
from seprune.pipeline.network import open_network
from seprune.pruning.analyse import analyse
from seprune.pruning.constraints import Allocation
from seprune.pruning.plan import PruningPlan
from seprune.pruning.prune import prune
from seprune.pruning.search import make_plan
from seprune.recipe.sections import ModelSection
from seprune.recovery.candidates import TrialOptions, choose_plan
from seprune.recovery.recalibrate import recalibrate
from seprune.recovery.reconstruct import ReconstructOptions, reconstruct
from seprune.recovery.refit import RefitOptions, refit
from seprune.statistics import CollectOptions, GateStatistics, collect_statistics

OUT = Path(__file__).parent / "results" / "rivals.csv"
MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)
DEFAULT = "seprune"
OURS = {
    "gate_logit joint": Scoring(),
    "gate_logit coupled": Scoring(combine="coupled"),
    "gate_mean_measured": Scoring("gate_mean_measured"),
}
THEIRS = ("l2", "l1", "fpgm", "bn_scale", "lamp", "taylor", "hessian", "random", "uniform")
REFITTED = {DEFAULT, *OURS, "l2", "hessian"}  # l2, hessian: what our refit makes of their plans
OWN = ("osscar", "vbp", "grail on seprune's plan", "grail on l2's plan",
       "kirigami magnitude", "kirigami taylor")  # fmt: skip
WAYS = (DEFAULT, *OURS, *OWN, *THEIRS)
WEIGHT_IMAGES = 256  # whose derivatives by the weights are collected, one at a time


def main() -> None:
    arguments = parsed()
    torch.set_num_threads(arguments.threads)
    rows = read(arguments.out)
    done = {(r["network"], r["budget"], r["method"], r["seed"]) for r in rows}
    for seed in arguments.seeds:
        cells = [(str(b), way) for b in arguments.budgets for way in arguments.ways]
        left = [c for c in cells if (arguments.network, *c, str(seed)) not in done]
        comparison = Comparison(arguments, seed) if left else None
        for budget, way in left if comparison is not None else ():
            rows += comparison.rows(way, float(budget))
            result_rows.write(arguments.out, rows)


class _Unsqueezed(SqueezeExcitation):
    """The same gate in a spelling that torch-kirigami 0.2 follows (no `[:, :, None, None]`)."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        gate: torch.Tensor = self.fc(x.mean((2, 3)))
        return x * gate.unsqueeze(-1).unsqueeze(-1)


def respelled(model: nn.Module) -> nn.Module:
    """A copy that torch-kirigami can analyse."""
    made = copy.deepcopy(model)
    for module in made.modules():
        if type(module) is SqueezeExcitation and module.squeeze == "mean":
            module.__class__ = _Unsqueezed
    return made


class Comparison:
    """One network, one draw of the calibration images."""

    def __init__(self, arguments: argparse.Namespace, seed: int) -> None:
        self.arguments, self.seed = arguments, seed
        name, side = NETWORKS[arguments.network]
        where = arguments.checkpoint or kept(arguments.network)
        if where is None:
            raise SystemExit(f"{arguments.network}: no weights are kept; give --checkpoint FILE")
        section = ModelSection(name=name, classes=10, checkpoint=str(where), input=(3, side, side))
        network = open_network(section, shape=(3, side, side))
        self.model, self.example = network.model.eval(), network.example()
        settings = DataSettings(input=(3, side, side), mean=MEAN, std=STD)
        data = open_data(str(arguments.data), settings)
        self.calibration: Batches = list(data.calibration(arguments.images, seed=seed))
        shown = data.reporting(250)
        shown.rows = in_turn(shown.store.labels, shown.rows, seed=0)[: arguments.reporting]
        self.reporting: Batches = list(shown)
        self.structure = analyse(self.model, self.example)
        self.dense = self.top1(self.model)
        self.plans: dict[tuple[str, float], PruningPlan] = {}

    @cached_property
    def effects(self) -> GateStatistics:
        return self.collected("logits", self.calibration)

    @cached_property
    def weights(self) -> GateStatistics:
        images = torch.cat([x for x, _ in self.calibration])[:WEIGHT_IMAGES]
        labels = torch.cat([y for _, y in self.calibration])[:WEIGHT_IMAGES]
        return self.collected("weights", list(zip(images.split(64), labels.split(64))))

    @cached_property
    def grams(self) -> dict[str, torch.Tensor]:
        return grams(self.model, self.structure, self.calibration)

    def collected(self, gradients: Any, batches: Batches) -> GateStatistics:
        options = CollectOptions(device="cpu", seed=self.seed)
        return collect_statistics(
            self.model, batches, structure=self.structure, gradients=gradients, options=options
        )

    def top1(self, model: nn.Module) -> float:
        return evaluate(model, self.reporting, device="cpu").top1

    def plan(self, way: str, budget: float) -> PruningPlan:
        """The channels that a criterion keeps; our default's are chosen among candidates."""
        if (way, budget) not in self.plans:
            self.plans[way, budget] = self.made(way, budget)
        return self.plans[way, budget]

    def made(self, way: str, budget: float) -> PruningPlan:
        if way == DEFAULT:
            plans = {
                name: self.scored(scoring, budget)
                for name, scoring in alternatives(Scoring(seed=self.seed), self.effects).items()
            }
            options = TrialOptions(device="cpu")
            return choose_plan(self.model, plans, self.calibration, options=options).plan
        if way in OURS:
            return self.scored(OURS[way], budget)
        return self.scored(Scoring(way, "mean", seed=self.seed), budget)

    def scored(self, scoring: Scoring, budget: float) -> PruningPlan:
        effects = scoring.criterion.startswith("gate")
        by_weights = scoring.criterion in ("taylor", "hessian")
        statistics = self.effects if effects else self.weights if by_weights else None
        scores = score(self.structure, statistics, model=self.model, scoring=scoring)
        try:
            return make_plan(self.structure, scores, macs=budget)
        except InputError:  # out of reach with eight channels of every group
            return make_plan(
                self.structure, scores, allocation=Allocation(min_channels=2), macs=budget
            )

    def rows(self, way: str, budget: float) -> list[dict[str, Any]]:
        """All stages of one way at one budget."""
        begun = time.perf_counter()
        try:
            stages = self.stages(way, budget)
        except Exception as error:
            if way in (DEFAULT, *OURS, *THEIRS):
                raise
            found = {
                "stage": "cut",
                "metric": "failed",
                "value": f"{type(error).__name__}: {error}"[:200],
            }
            print(way, budget, found["value"], flush=True)
            return [self.row(way, budget, found)]
        made = []
        for stage, model in stages.items():
            macs = count(model, self.example[:1]).macs
            top1 = self.top1(model)
            found = {"stage": stage, "metric": "top1", "value": f"{top1:.4f}", "macs": macs}
            made.append(self.row(way, budget, found))
        seconds = time.perf_counter() - begun
        shown = ", ".join(f"{r['stage']} {r['value']}" for r in made)
        print(f"{self.seed} {budget} {way}: {shown} ({seconds:.0f} s)", flush=True)
        return made

    def stages(self, way: str, budget: float) -> dict[str, nn.Module]:
        """The networks to measure, by what was done to them."""
        if way.startswith("grail"):
            plan = self.plan(DEFAULT if "seprune" in way else "l2", budget)
            return self.updated(mapped_by(self.model, self.structure, plan, self.grams))
        if way in OWN:
            return self.updated(self.rival(way)(budget))
        plan = self.plan(way, budget)
        cut = prune(self.model, plan, self.example)
        found = {"cut": cut, "bn": recalibrate(cut, self.calibration, device="cpu")}
        if way in REFITTED:
            options = RefitOptions(images=self.arguments.images, device="cpu")
            fitted = refit(self.model, cut, plan, self.calibration, options=options).model
            found["refit"] = fitted
            if way == DEFAULT and self.arguments.reconstruct:
                training = ReconstructOptions(
                    images=self.arguments.images, epochs=self.arguments.reconstruct, device="cpu",
                    seed=self.seed,
                )  # fmt: skip
                made = reconstruct(self.model, fitted, plan, self.calibration, options=training)
                found["reconstruct"] = made.model
        return found

    def updated(self, small: nn.Module) -> dict[str, nn.Module]:
        return {"own": small, "own bn": recalibrate(small, self.calibration, device="cpu")}

    def rival(self, way: str) -> Callable[[float], nn.Module]:
        if way == "osscar":
            return lambda b: osscar(self.model, self.structure, self.calibration, b)
        if way == "vbp":
            return lambda b: variance_pruned(self.model, self.structure, self.calibration, b)
        return lambda b: self.kirigami(way.rpartition(" ")[2], b)

    def kirigami(self, metric: str, budget: float) -> nn.Module:
        """torch-kirigami's greedy ranking under the parameter budget that leaves these MACs."""
        from torch_kirigami import DependencyGraph
        from torch_kirigami import pruning as kirigami

        limit = budget * self.structure.costs()["macs"]
        full = sum(p.numel() for p in self.model.parameters())
        low, high, best = 0.02, 1.0, None
        for _ in range(7):
            share = (low + high) / 2
            model = respelled(self.model)
            if metric == "taylor":
                for images, labels in self.calibration[: max(1, WEIGHT_IMAGES // 128)]:
                    nn.functional.cross_entropy(model(images), labels).backward()
            graph = DependencyGraph.build(model, args=(self.example,))
            pruner = kirigami.Pruner(model, graph=graph)
            score = kirigami.WeightTaylor() if metric == "taylor" else kirigami.GroupMagnitude(p=2)
            small, _ = pruner.prune(
                pruner.discover_candidates(),
                budget=kirigami.ParameterBudget(max_params=int(share * full)),
                strategy=kirigami.Greedy(score),
            )
            if count(small, self.example[:1]).macs <= limit:
                low, best = share, small
            else:
                high = share
        if best is None:
            raise ValueError("out of reach")
        best.zero_grad(set_to_none=True)
        return best

    def row(self, way: str, budget: float, found: dict[str, Any]) -> dict[str, Any]:
        images = f"{self.arguments.images} calibration, {self.arguments.reporting} reporting"
        network = self.arguments.network
        return {
            "network": network, "data": f"cifar10: 0 train, {images}",
            "budget": budget, "method": way, "seed": self.seed, "latency": "",
            "hardware": hardware(torch.device("cpu")), "versions": f"torch {torch.__version__}",
            "date": date.today().isoformat(),
            "command": f"python benchmarks/rivals.py --data FOLDER --network {network}",
            **found,
        }  # fmt: skip


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="train/ and val/")
    parser.add_argument("--network", choices=list(NETWORKS), default="se_resnet20")
    parser.add_argument("--checkpoint", type=Path)
    parser.add_argument("--budgets", type=float, nargs="+", default=[0.5, 0.3, 0.7, 0.15])
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=available())
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--images", type=int, default=1024)
    parser.add_argument("--reporting", type=int, default=2500)
    parser.add_argument("--reconstruct", type=int, default=0, metavar="EPOCHS")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=OUT)
    return parser.parse_args()


def available() -> list[str]:
    """All ways, but those of a package that is not installed."""
    there = importlib.util.find_spec("torch_kirigami") is not None
    return [way for way in WAYS if there or not way.startswith("kirigami")]


if __name__ == "__main__":
    main()
