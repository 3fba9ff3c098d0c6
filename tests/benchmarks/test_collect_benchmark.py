"""The benchmark of collecting measures what the default criterion needs, unit gates included."""

import argparse
import importlib.util
from pathlib import Path

FILE = Path(__file__).parents[2] / "benchmarks" / "collect.py"


def test_the_default_criterion_is_measured():
    spec = importlib.util.spec_from_file_location("benchmark_collect", FILE)
    benchmark = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(benchmark)
    arguments = argparse.Namespace(device="cpu", precision="no", batch=2, group=1, repeat=1)
    row = benchmark.measure("torchvision/mobilenet_v3_small", "criterion", arguments)
    widths = (16, 96, 240, 240, 120, 144, 288, 576, 576)  # Howard et al. 2019, table 2
    assert (row["gates"], row["channels"]) == (len(widths), sum(widths))
    assert row["units"] > row["channels"]
