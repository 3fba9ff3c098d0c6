"""What collecting costs on top of the model's own work, measured side by side.

Batch by batch in one process: a bare forward, then the same batch observed, and so on; the claim is
the ratio of the medians, of wall time on a GPU and of the process's own CPU time on a CPU, which
other processes disturb less. With gradients the bare loop runs forward and backward to the image
over the same graph (parameters frozen), which is less than a training step.

    python benchmarks/collect.py --threads 1                      # CPU, batches of 8
    python benchmarks/collect.py --batch 128 --precision bf16     # GPU
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from seprune.graph.groups import find_structure
from seprune.models import build
from seprune.runtime.distributed import resolve_device
from seprune.runtime.inference import autocast
from seprune.statistics.columns import ColumnLayout
from seprune.statistics.for_structure import units_and_couplings
from seprune.statistics.gate_gradients import inspect_units, resolve_couplings
from seprune.statistics.observe import Observer, ObserverSettings

MODELS = ("timm/seresnet50", "torchvision/mobilenet_v3_large", "timm/legacy_senet154")
RESULTS = Path(__file__).parent / "results"


def settings_of(
    model: nn.Module, images: Tensor, mode: str, arguments: argparse.Namespace
) -> ObserverSettings:
    """Statistics alone, with u of the gates, or all that the default criterion needs."""
    structure = find_structure(model, images[:2])
    gates = tuple(g for g in structure.gates if g.runs)
    taps, couplings = units_and_couplings(structure) if mode == "criterion" else ({}, {})
    units, copied = inspect_units(model, (), images[:2], taps=taps)
    sizes = units | {g.name: g.channels for g in gates}
    layout = ColumnLayout(
        tuple(g.name for g in gates),
        tuple(g.channels for g in gates),
        tuple(g.activation for g in gates),
        1000,
        images.device,
    )
    return ObserverSettings(
        model=model,
        gates=gates,
        layout=layout,
        gradients="none" if mode == "none" else "logits",
        units=units,
        taps=taps,
        copied=copied,
        couplings=resolve_couplings(couplings, sizes, images.device),
        precision=arguments.precision,
        channels_last=images.device.type == "cuda",
    )


def bare(model: nn.Module, images: Tensor, mode: str, precision: str) -> None:
    with torch.set_grad_enabled(mode != "none"):
        start = images.detach().requires_grad_(mode != "none")
        with autocast(images.device, precision):
            logits = model(start)
        if mode != "none":
            torch.autograd.grad(logits.float().sum(), start)


def seconds(work: Callable[[], None], device: torch.device) -> float:
    if device.type != "cuda":
        start = time.process_time()
        work()
        return time.process_time() - start
    torch.cuda.synchronize()
    start = time.perf_counter()
    work()
    torch.cuda.synchronize()
    return time.perf_counter() - start


def measure(name: str, mode: str, arguments: argparse.Namespace) -> dict[str, object]:
    device = resolve_device(arguments.device)
    torch.manual_seed(0)
    model = build(name).to(device).eval().requires_grad_(False)
    images = torch.randn(arguments.batch, 3, 224, 224, device=device)
    if device.type == "cuda":
        images = images.contiguous(memory_format=torch.channels_last)
    labels = torch.randint(0, 1000, (arguments.batch,), device=device)
    observer = Observer(settings_of(model, images, mode, arguments))

    def plain() -> None:
        for _ in range(arguments.group):
            bare(model, images, mode, arguments.precision)

    def observed() -> None:
        with observer.attached():
            for _ in range(arguments.group):
                observer.observe((images, labels))

    plain(), observed()
    pairs = [(seconds(plain, device), seconds(observed, device)) for _ in range(arguments.repeat)]
    alone, together = (statistics.median(column) / arguments.group for column in zip(*pairs))
    ratios = sorted(b / a for a, b in pairs)
    return {
        "model": name,
        "mode": mode,
        "gates": len(observer.settings.gates),
        "channels": observer.settings.layout.width,
        "units": sum((observer.settings.units or {}).values()),
        "bare_seconds": round(alone, 6),
        "observed_seconds": round(together, 6),
        "overhead": round(together / alone - 1, 4),
        "overhead_of_pairs": [round(ratios[len(ratios) * k // 4] - 1, 4) for k in (1, 2, 3)],
        "images_per_second": round(arguments.batch / together, 2),
    }


def hardware(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    model = next((line.partition(":")[2].strip() for line in lines if "model name" in line), "")
    return f"{model or platform.processor()}, {torch.get_num_threads()} threads"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--precision", default="no", help="no, bf16 or fp16")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--group", type=int, default=1, help="batches per measurement")
    parser.add_argument("--repeat", type=int, default=15, help="pairs of measurements")
    parser.add_argument("--models", nargs="+", default=MODELS)
    parser.add_argument("--modes", nargs="+", default=("none", "gates", "criterion"))
    parser.add_argument("--threads", type=int, help="CPU threads of torch")
    arguments = parser.parse_args()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    device = resolve_device(arguments.device)
    result: dict[str, Any] = {
        "command": " ".join(["python", "benchmarks/collect.py", *sys.argv[1:]]),
        "hardware": hardware(device),
        "date": date.today().isoformat(),
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
        "clock": "wall" if device.type == "cuda" else "CPU time of the process",
        "batch": arguments.batch,
        "precision": arguments.precision,
        "rows": [],
    }
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"collect-{device.type}.json"
    for name in arguments.models:
        for mode in arguments.modes:
            result["rows"].append(measure(name, mode, arguments))
            print(json.dumps(result["rows"][-1]), file=sys.stderr)
            path.write_text(json.dumps(result, indent=1) + "\n")
    print(path)


if __name__ == "__main__":
    main()
