"""What a time costs in accuracy: budgets of MACs and of latency, and torch-pruning's magnitude.

A trained network is cut by each way to several sizes, refitted in the same way without labels,
timed in turns with its parent in ONNX Runtime (one thread, batch 1), and evaluated on val/. Ways
are compared at equal latency, by interpolation between the rows of the CSV file; rows that are
there are not measured again.

    python benchmarks/latency_accuracy.py --checkpoint CHECKPOINT.pth --data FOLDER
    python benchmarks/latency_accuracy.py --network mobilenet_v3_small --data FOLDER
"""

from __future__ import annotations

import argparse
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
import torch_pruning as tp
from cifar_arrays import MEAN, STD
from csv_rows import read, write
from kept_weights import NETWORKS, kept

from seprune.data import DataSettings, open_data
from seprune.errors import InputError
from seprune.graph.groups import NetworkStructure
from seprune.graph.removable import find_removable
from seprune.importance import Scoring, score
from seprune.measure.metrics import evaluate
from seprune.pipeline.context import Context, Runtime
from seprune.pipeline.inputs import open_network
from seprune.pipeline.network_timer import latency_of
from seprune.pipeline.parts import with_losses
from seprune.pruning.constraints import Allocation
from seprune.pruning.plan import PruningPlan, plan_of
from seprune.pruning.prune import prune
from seprune.pruning.search import make_plan
from seprune.recipe.sections import ModelSection, PlanSection
from seprune.recovery.refit import RefitOptions, refit
from seprune.statistics import CollectOptions, collect_statistics

OUT = Path(__file__).parent / "results" / "latency_accuracy.csv"
MACS, TIMES, RATIOS = (0.8, 0.65, 0.5, 0.35), (0.5, 0.65, 0.8), (0.05, 0.1, 0.2, 0.3)
WAYS: dict[str, tuple[float, ...]] = {
    "latency": TIMES, "latency, widths alone": TIMES, "macs fast": MACS, "macs 8": MACS,
    "torch-pruning l2": RATIOS,
    "macs 16": MACS, "macs 1": MACS,
}  # fmt: skip
COLUMNS = ("network", "way", "size", "seed", "macs", "latency", "top1", "dense_top1", "out")


def main() -> None:
    arguments = parsed()
    rows = read(arguments.out)
    mine = [row for row in rows if row["network"] == arguments.network]
    done = {(row["way"], float(row["size"]), int(row["seed"])) for row in mine}
    for seed in range(arguments.seeds):
        cells = [(way, size) for way, sizes in WAYS.items() for size in sizes]
        left = [cell for cell in cells if (*cell, seed) not in done]
        with ExitStack() as stack:
            trials = Trials(arguments, seed, stack) if left else None
            for cell in left if trials is not None else ():
                try:
                    rows.append(trials.row(*cell))
                except InputError as error:  # out of reach
                    print(cell, error.what, flush=True)
                    continue
                print(rows[-1], flush=True)
                write(arguments.out, rows, COLUMNS)


class Trials:
    """The network, its scores and its times, for one draw of the calibration images."""

    def __init__(self, arguments: argparse.Namespace, seed: int, stack: ExitStack) -> None:
        self.seed, self.network = seed, arguments.network
        name, side = NETWORKS[arguments.network]
        where = arguments.checkpoint or kept(arguments.network)
        if where is None:
            raise SystemExit(f"{arguments.network}: no weights are kept; give --checkpoint FILE")
        shape = (3, side, side)
        section = ModelSection(name=name, classes=10, checkpoint=str(where), input=shape)
        network = open_network(section, shape=shape)
        settings = DataSettings(input=shape, mean=MEAN, std=STD)
        data = open_data(str(arguments.data), settings)
        self.model, self.reporting = network.model, data.reporting(500)
        self.example = network.example()
        self.loader = data.calibration(arguments.images, seed=seed)
        self.refit = RefitOptions(images=arguments.images, device="cpu")
        context = Context(network, None, Runtime(torch.device("cpu")))
        self.structure = context.structure
        options = CollectOptions(device="cpu", seed=seed)
        statistics = collect_statistics(
            self.model, self.loader, structure=self.structure, gradients="logits", options=options
        )
        self.scores = score(self.structure, statistics, model=self.model, scoring=Scoring())
        self.timer, self.times = latency_of(context, PlanSection(runtime="onnx"), stack)
        found = find_removable(self.model, self.structure, self.example)
        self.parts = with_losses(found, context, data.calibration(512, seed=seed))
        self.dense_top1 = evaluate(self.model, self.reporting, device="cpu").top1

    def row(self, way: str, size: float) -> dict[str, Any]:
        """One network: its size, its time and its accuracy."""
        plan = self.plan(way, size)
        small = prune(self.model, plan)
        made = refit(self.model, small, plan, self.loader, options=self.refit).model
        ms = self.timer(plan)
        kept = {g.name: len(g.keep) for g in plan.groups}
        left = self.structure.without(plan.removed.modules).macs_at(kept)
        macs = left / self.structure.costs()["macs"]
        return {
            "out": " ".join(plan.removed.modules),
            "network": self.network, "way": way, "size": size, "seed": self.seed,
            "macs": f"{macs:.4f}",
            "latency": f"{ms / (self.timer.dense_ms or ms):.4f}",
            "top1": f"{evaluate(made, self.reporting, device='cpu').top1:.4f}",
            "dense_top1": f"{self.dense_top1:.4f}",
        }  # fmt: skip

    def plan(self, way: str, size: float) -> PruningPlan:
        """The channels that one way keeps."""
        if way.startswith("torch-pruning"):
            return torch_pruning_plan(self.model, self.structure, size, self.example)
        multiple = {"macs 1": 1, "macs 8": 8, "macs 16": 16}.get(way)
        given: dict[str, Any] = {"macs": size}
        if way.startswith("latency"):
            given = {"latency": size, "measure": self.timer, "times": self.times}
        parts = self.parts if way == "latency" else ()
        allocation = Allocation(round_to=multiple, parts=parts)
        return make_plan(self.structure, self.scores, allocation=allocation, **given)


def torch_pruning_plan(
    model: torch.nn.Module, structure: NetworkStructure, ratio: float, example: torch.Tensor
) -> PruningPlan:
    """The channels that torch-pruning's magnitude pruner keeps, one ranking over all groups, in
    multiples of 8; read off its groups without cutting them."""
    head = [m for m in model.modules() if isinstance(m, torch.nn.Linear)][-1]
    pruner = tp.pruner.BasePruner(
        model, example, importance=tp.importance.GroupMagnitudeImportance(p=2),
        global_pruning=True, pruning_ratio=ratio, max_pruning_ratio=0.9, round_to=8,
        ignored_layers=[head], in_channel_groups={}, out_channel_groups={}, num_heads={},
    )  # fmt: skip
    names = {module: name for name, module in model.named_modules()}
    gone: dict[str, set[int]] = {}
    for group in pruner.step(interactive=True):
        root = group[0]
        gone.setdefault(names[root.dep.target.module], set()).update(root.idxs)
    keep = {}
    for group in structure.groups:
        for member in group.members:
            if member.side == "out" and gone.get(member.layer) and group.channels == group.units:
                removed = gone[member.layer]
                units = range(group.units)
                keep[group.name] = [u for u in units if int(member.index[u, 0]) not in removed]
    return plan_of(structure.groups, keep, {})


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--network", choices=list(NETWORKS), default="se_resnet20")
    parser.add_argument("--checkpoint", type=Path, help="not for networks whose weights are kept")
    parser.add_argument("--data", type=Path, required=True, help="train/ and val/")
    parser.add_argument("--images", type=int, default=2048)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--out", type=Path, default=OUT)
    return parser.parse_args()


if __name__ == "__main__":
    main()
