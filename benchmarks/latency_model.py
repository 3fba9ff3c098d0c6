"""How well the latency table predicts whole networks: random plans, predicted and measured.

A row is one plan: its time as a share of the dense network's, by the table and measured in turns
with the dense network, and the error of the predicted milliseconds. Rows that the results file has
are not measured again.

    python benchmarks/latency_model.py --networks seprune/se_resnet20 --runtimes onnx
"""

from __future__ import annotations

import argparse
import itertools
import random
import statistics
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from csv_rows import read, write
from latency import NETWORKS, Timings

from seprune.errors import EnvironmentFault
from seprune.pipeline.context import Context, Runtime
from seprune.pipeline.inputs import open_network
from seprune.pipeline.network_timer import latency_of
from seprune.pruning.constraints import Allocation
from seprune.pruning.search import Search
from seprune.recipe.sections import ModelSection, PlanSection

OUT = Path(__file__).parent / "results" / "latency_model.csv"
COLUMNS = ("network", "runtime", "plan", "predicted", "measured", "error_ms")


def main() -> None:
    arguments = parsed()
    rows = read(arguments.out)
    done = {(row["network"], row["runtime"], int(row["plan"])) for row in rows}
    for name, runtime in itertools.product(arguments.networks, arguments.runtimes):
        left = [n for n in range(arguments.plans) if (name, runtime, n) not in done]
        with ExitStack() as stack:
            for row in measured(name, runtime, left, stack) if left else ():
                rows.append(row)
                write(arguments.out, rows, COLUMNS)
        own = [r for r in rows if r["network"] == name and r["runtime"] == runtime]
        shares = [abs(float(r["predicted"]) / float(r["measured"]) - 1) for r in own]
        times = [abs(float(r["error_ms"])) for r in own]
        for what, errors in (("shares", shares), ("milliseconds", times)):
            if errors:
                middle, largest = statistics.median(errors), max(errors)
                print(name, runtime, len(errors), what, f"{middle:.3f} {largest:.3f}", flush=True)


def measured(name: str, runtime: str, numbers: list[int], stack: ExitStack) -> Any:
    """A row for each of these random plans."""
    network = open_network(ModelSection(name=name))
    context = Context(network, None, Runtime(torch.device("cpu")))
    section = PlanSection(runtime=runtime)
    timings = Timings(context, section, stack)
    timer, model = latency_of(context, section, stack)
    search = Search(context.structure, timings.importance, Allocation(round_to=None), {})
    full = context.structure.full_widths()
    for number in numbers:
        draw = random.Random(number)
        share = draw.uniform(0.2, 1)  # of the widths of this plan, each around it
        kept = {
            g.name: search.rounded(g, max(1, int(g.units * min(1, share * draw.uniform(0.6, 1.4)))))
            for g in search.free
        }
        kept = search.followed({**full, **kept})
        try:
            ms = timer(search.plan(kept))
        except EnvironmentFault:
            continue
        dense = timer.dense_ms or ms
        yield {
            "network": name,
            "runtime": runtime,
            "plan": number,
            "predicted": f"{model.at(kept) / model.at(full):.4f}",
            "measured": f"{ms / dense:.4f}",
            "error_ms": f"{model.at(kept) / ms - 1:.4f}",
        }


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--networks", nargs="+", default=NETWORKS)
    parser.add_argument("--runtimes", nargs="+", default=("onnx", "eager"))
    parser.add_argument("--plans", type=int, default=30)
    parser.add_argument("--out", type=Path, default=OUT)
    return parser.parse_args()


if __name__ == "__main__":
    main()
