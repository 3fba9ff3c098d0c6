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
    row = benchmark.measure("seprune/se_resnet8", "criterion", arguments)
    assert (row["gates"], row["channels"]) == (3, 16 + 32 + 64)
    assert row["units"] > row["channels"]
