"""How fast budgets make networks: MACs as the widths come, MACs in aligned widths, and latency.

Each network of a plan takes turns with the dense one in one process, and the shortest times count:
the ratios are what the rows hold. Weights are random and scores `l2`: times do not depend on them.
Rows that the results file has are not measured again, so the command goes on where it stopped.

    python benchmarks/latency.py
    python benchmarks/latency.py --networks torchvision/mobilenet_v3_large --runtimes onnx
"""

from __future__ import annotations

import argparse
import itertools
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from csv_rows import read, write

from seprune.errors import EnvironmentFault, InputError
from seprune.importance import Importance, Scoring, score
from seprune.measure.latency_table import LatencyModel
from seprune.pipeline.context import Context, Runtime
from seprune.pipeline.inputs import open_network
from seprune.pipeline.network_timer import NetworkTimer, latency_of
from seprune.pruning.constraints import Allocation
from seprune.pruning.search import make_plan
from seprune.recipe.sections import ModelSection, PlanSection

OUT = Path(__file__).parent / "results" / "latency.csv"
NETWORKS = (
    "seprune/se_resnet20", "torchvision/mobilenet_v3_large", "torchvision/regnet_y_400mf",
    "torchvision/efficientnet_b0", "timm/seresnet50",
)  # fmt: skip
BUDGETS = (0.5, 0.7, 0.35)
VARIANTS = {
    "macs 1": 1,
    "macs 4": 4,
    "macs 8": 8,
    "macs 16": 16,
    "macs fast": None,
    "latency": None,
}
"""What widths are multiples of; None: of what is fast."""
KEYS = ("network", "runtime", "batch", "budget", "variant")
FIELDS = (*KEYS, "macs", "latency", "speedup", "measured", "seconds", "note")


class Timings:
    """One network on one runtime: plans and their times, all in turns with the dense network."""

    def __init__(self, context: Context, section: PlanSection, stack: ExitStack) -> None:
        self.context, self.section, self.stack = context, section, stack
        model = context.network.model
        self.importance: Importance = score(context.structure, model=model, scoring=Scoring("l2"))
        self.timer = NetworkTimer(context, section, stack)
        self.times: LatencyModel | None = None

    def row(self, budget: float, variant: str) -> dict[str, Any]:
        """The numbers of one plan."""
        allocation, given = Allocation(round_to=VARIANTS[variant]), dict[str, Any](macs=budget)
        began = time.monotonic()
        if variant == "latency":
            if self.times is None:
                self.timer, self.times = latency_of(self.context, self.section, self.stack)
            given = {"latency": budget, "measure": self.timer, "times": self.times}
        try:
            plan = make_plan(
                self.context.structure, self.importance, allocation=allocation, **given
            )
            seconds = time.monotonic() - began
            ms = self.timer(plan)
        except (InputError, EnvironmentFault) as error:  # out of reach, or the machine too busy
            return {**dict.fromkeys(FIELDS[len(KEYS) :], ""), "note": error.what}
        share = ms / (self.timer.dense_ms or ms)
        macs = plan.facts["macs"]
        return {
            "macs": f"{macs[1] / macs[0]:.4f}", "latency": f"{share:.4f}",
            "speedup": f"{1 / share:.3f}", "seconds": f"{seconds:.1f}",
            "note": "", "measured": sum("latency" in entry for entry in plan.history),
        }  # fmt: skip


def main() -> None:
    arguments = parsed()
    rows = read(arguments.out)
    for name in arguments.networks:
        context = None
        for runtime, batch in itertools.product(arguments.runtimes, arguments.batches):
            cells = itertools.product(arguments.budgets, VARIANTS)
            keys = [(name, runtime, str(batch), str(b), v) for b, v in cells]
            done = {tuple(row[k] for k in KEYS) for row in rows}
            left = [key for key in keys if key not in done]
            if not left:
                continue
            context = context or Context(
                open_network(ModelSection(name=name)), None, Runtime(torch.device("cpu"))
            )
            with ExitStack() as stack:
                timings = Timings(context, PlanSection(runtime=runtime, batch=batch), stack)
                for key in left:
                    made = timings.row(float(key[3]), key[4])
                    rows.append({**dict(zip(KEYS, key)), **made})
                    print(rows[-1], flush=True)
                    write(arguments.out, rows, FIELDS)


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--networks", nargs="+", default=NETWORKS)
    parser.add_argument("--runtimes", nargs="+", default=("onnx", "eager"))
    parser.add_argument("--batches", nargs="+", type=int, default=(1,))
    parser.add_argument("--budgets", nargs="+", type=float, default=BUDGETS)
    parser.add_argument("--out", type=Path, default=OUT)
    return parser.parse_args()


if __name__ == "__main__":
    main()
