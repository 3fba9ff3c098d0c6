"""Seconds to plan and cut a network to half its MACs, and torch-pruning's own way beside it.

torch-pruning has no target: its pruner is stepped, and the network counted after each step, until
it is small enough (`BasePruner(iterative_steps=...)`, `count_ops_and_params`, magnitude scores, the
SE bottlenecks as it treats them). Both start from the same network in one process; tracing is
included on both sides. Errors are |reached - target| / target, each by the tool's own count. The
ratio is of the process's own CPU time, which other processes disturb less than the clock.

    python benchmarks/plan.py
    python benchmarks/plan.py --repeat 1 --networks timm/seresnet50 --beside      # one network
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

import torch
import torch_pruning as tp
from torch import nn

from seprune.importance import Scoring, score
from seprune.measure.latency import device_name
from seprune.models import build, input_size
from seprune.pruning.analyse import analyse
from seprune.pruning.prune import prune
from seprune.pruning.search import make_plan
from seprune.runtime.environment import environment
from seprune.runtime.files import write_json

RESULTS = Path(__file__).parent / "results" / "plan.json"
NETWORKS = ("seprune/se_resnet50", "timm/legacy_senet154", "timm/efficientnet_b7")
BESIDE = ("seprune/se_resnet50", "torchvision/mobilenet_v3_small")
BUDGET = 0.5


def ours(model: nn.Module, images: torch.Tensor) -> dict[str, Any]:
    """Trace, trial cut, scores, plan, cut: what `seprune prune --importance l2` does."""
    marks, spent = [time.perf_counter()], time.process_time()
    structure = analyse(model, images)
    marks.append(time.perf_counter())
    importance = score(structure, model=model, scoring=Scoring("l2"))
    plan = make_plan(structure, importance, macs=BUDGET)
    marks.append(time.perf_counter())
    prune(model, plan)
    marks.append(time.perf_counter())
    before, after = plan.facts["macs"]
    return {
        "seconds": marks[-1] - marks[0],
        "cpu_seconds": time.process_time() - spent,
        "analyse": marks[1] - marks[0],
        "plan": marks[2] - marks[1],
        "cut": marks[3] - marks[2],
        "error": abs(after / (BUDGET * before) - 1),
    }


def theirs(
    model: nn.Module, images: torch.Tensor, *, steps: int, limit: float = 120.0
) -> dict[str, Any]:
    """Step, count, repeat, for at most `limit` seconds of CPU time. `model` is cut in place."""
    began, spent = time.perf_counter(), time.process_time()
    outputs = {m for m in model.modules() if isinstance(m, nn.Linear) and m.out_features == 1000}
    before, _ = tp.utils.count_ops_and_params(model, images[:1])
    pruner = tp.pruner.BasePruner(
        model,
        images[:1],
        importance=tp.importance.MagnitudeImportance(p=2),
        global_pruning=True,
        pruning_ratio=1.0,
        max_pruning_ratio=0.9,
        iterative_steps=steps,
        ignored_layers=list(outputs),
        in_channel_groups={},  # the defaults are shared between pruners
        out_channel_groups={},
        num_heads={},
    )
    after, taken = before, 0
    while after > BUDGET * before and taken < steps and time.process_time() - spent < limit:
        pruner.step()
        after, _ = tp.utils.count_ops_and_params(model, images[:1])
        taken += 1
    return {
        "seconds": time.perf_counter() - began,
        "cpu_seconds": time.process_time() - spent,
        "steps": taken,
        "of": steps,
        "error": abs(after / (BUDGET * before) - 1),
        "reached": after / before,
    }


def network(name: str, batch: int) -> tuple[nn.Module, torch.Tensor]:
    torch.manual_seed(0)
    model = build(name).eval()
    return model, torch.randn(batch, *input_size(name, model))


def timed(run: Callable[[], dict[str, Any]], repeat: int) -> dict[str, Any]:
    """The run with the median time."""
    runs = sorted((run() for _ in range(repeat)), key=lambda r: float(r["seconds"]))
    return {**runs[(len(runs) - 1) // 2], "all_seconds": [r["seconds"] for r in runs]}


def side_by_side(name: str, steps: int, repeat: int) -> dict[str, Any]:
    """Both ways, in turns, on the same network."""
    ours_runs, their_runs = [], []
    for _ in range(repeat):
        model, images = network(name, 2)
        ours_runs.append(ours(model, images))
        their_runs.append(theirs(model, images, steps=steps))
    middle = lambda runs, key: statistics.median(r[key] for r in runs)  # noqa: E731
    return {
        "network": name,
        "steps": steps,
        "seprune": {k: middle(ours_runs, k) for k in ("seconds", "cpu_seconds", "error")},
        "torch_pruning": {
            k: middle(their_runs, k) for k in ("seconds", "cpu_seconds", "error", "steps")
        },
        "times_faster": middle(their_runs, "cpu_seconds") / middle(ours_runs, "cpu_seconds"),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--networks", nargs="*", default=NETWORKS)
    parser.add_argument("--beside", nargs="*", default=BESIDE)
    parser.add_argument("--steps", type=int, nargs="+", default=[50, 200, 800])
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    packages = environment(devices=False)["packages"]
    result: dict[str, Any] = {
        "command": " ".join(["python", "benchmarks/plan.py", *sys.argv[1:]]),
        "hardware": f"{device_name('cpu')}, {os.cpu_count()} cores, {arguments.threads} threads",
        "date": date.today().isoformat(),
        "versions": {n: packages[n] for n in ("torch", "torchvision", "torch-pruning")},
        "budget": BUDGET,
        "load": os.getloadavg()[0],
        "networks": [],
        "beside": [],
    }
    side_by_side(BESIDE[-1], 10, 1)  # what is imported and cached on first use
    for name in arguments.networks:
        model, images = network(name, 2)
        entry = timed(lambda model=model, images=images: ours(model, images), arguments.repeat)
        result["networks"].append({"network": name, "input": list(images.shape), **entry})
        print(json.dumps(result["networks"][-1]), file=sys.stderr, flush=True)
        write_json(RESULTS, result)
    for name in arguments.beside:
        for steps in arguments.steps:
            result["beside"].append(side_by_side(name, steps, arguments.repeat))
            print(json.dumps(result["beside"][-1]), file=sys.stderr, flush=True)
            write_json(RESULTS, result)


if __name__ == "__main__":
    main()
