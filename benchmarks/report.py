"""Seconds to write the report of a run, and to read it again from its folder.

Noise images of 64 x 64 in ten classes and random weights: widths, gates and groups, and with them
the size of the report, are those of the real network. `write` puts the report together and writes
report.json, report.csv, report.html and the cards; latencies are measured before it and not part of
it. `command` is `seprune report RUN --html F` in a process of its own, imports included.

    python benchmarks/report.py
    python benchmarks/report.py --networks seprune/se_resnet50
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from seprune.measure.latency import device_name
from seprune.pipeline.run import run
from seprune.recipe import recipe_of
from seprune.report import html, measurement, table
from seprune.runtime.environment import environment
from seprune.runtime.files import write_json

RESULTS = Path(__file__).parent / "results" / "report.json"
NETWORKS = ("timm/seresnet50", "timm/legacy_senet154")
CLASSES = 10


def images(folder: Path) -> Path:
    """An image folder of noise."""
    chance = np.random.default_rng(0)
    for part, number in (("train", 4), ("val", 1)):
        for name in range(CLASSES):
            (folder / part / f"class{name}").mkdir(parents=True)
            for n in range(number):
                pixels = chance.integers(0, 256, (72, 72, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / part / f"class{name}" / f"{n}.png")
    return folder


def measure(name: str, folder: Path) -> dict[str, Any]:
    """One run up to its report, which is timed."""
    recipe = recipe_of(
        {
            "name": name,
            "model": {"name": name, "classes": CLASSES, "input": [3, 64, 64]},
            "data": {"source": str(images(folder / "images")), "workers": 0},
            "collect": {"images": 16, "batch_size": 8},
            "plan": {"macs": [0.7, 0.5]},
            "prune": {"recover": "none"},
            "finetune": {"epochs": 0, "recalibrate": 0},
            "report": {"latency": False},
            "device": "cpu",
        }
    )
    out = folder / "run"
    report = run(recipe, out)
    began, spent = time.perf_counter(), time.process_time()
    measurement.write(report, out / "report.json")
    table.write_csv(report, out / "report.csv")
    html.write_html(report, out / "report.html")
    seconds, cpu = time.perf_counter() - began, time.process_time() - spent
    command = [sys.executable, "-m", "seprune", "report", str(out), "--html", str(out / "2.html")]
    began = time.perf_counter()
    subprocess.run(command, check=True)
    return {
        "network": name,
        "gates": len(report.gates),
        "channels": sum(g.channels for g in report.gates),
        "write_seconds": seconds,
        "write_cpu_seconds": cpu,
        "command_seconds": time.perf_counter() - began,
        "html_bytes": (out / "report.html").stat().st_size,
        "json_bytes": (out / "report.json").stat().st_size,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--networks", nargs="*", default=NETWORKS)
    arguments = parser.parse_args()
    packages = environment(devices=False)["packages"]
    result: dict[str, Any] = {
        "command": " ".join(["python", "benchmarks/report.py", *sys.argv[1:]]),
        "hardware": f"{device_name('cpu')}, {os.cpu_count()} cores, "
        f"{torch.get_num_threads()} threads",
        "date": date.today().isoformat(),
        "versions": {n: packages[n] for n in ("torch", "timm", "plotly") if n in packages},
        "load": os.getloadavg()[0],
        "networks": [],
    }
    for name in arguments.networks:
        with tempfile.TemporaryDirectory() as folder:
            result["networks"].append(measure(name, Path(folder)))
        print(json.dumps(result["networks"][-1]), file=sys.stderr, flush=True)
        write_json(RESULTS, result)


if __name__ == "__main__":
    main()
