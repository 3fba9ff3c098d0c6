"""What every step costs as networks, images and data sets grow, beside one bare forward.

Every point is a process of its own: it takes a network with random weights, runs each step once and
prints processor seconds and peak memory. A ratio is to a bare forward over the same images in the
same process, half before and half after the step. Rows that are in the CSV are not measured again.

    python benchmarks/scaling.py
    python benchmarks/scaling.py --again --only images/1024 images/2048 ImageNet/50
    python benchmarks/scaling.py --render docs/costs.md
"""

from __future__ import annotations

import argparse
import fnmatch
import json
import math
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from collect import hardware
from csv_rows import Rows, read, write

from seprune.importance import score
from seprune.models import build
from seprune.pruning.analyse import analyse
from seprune.pruning.prune import prune
from seprune.pruning.search import make_plan
from seprune.recovery.refit import RefitOptions, refit
from seprune.runtime.files import write_text
from seprune.statistics import CollectOptions, collect_statistics

RESULTS = Path(__file__).parent / "results" / "scaling.csv"
STEPS = ("forward", "analyse", "collect", "plan", "cut", "refit")
RATIOS = ("collect", "refit")  # go over all images
COLUMNS = ("series", "value", "network", "pixels", "images", "classes", "batch", "memory_gb",
           "macs", "step",
           "cpu_seconds", "forwards", "peak_mb", "torch", "hardware", "date")  # fmt: skip
KEYS = COLUMNS[:8]


@dataclass(frozen=True)
class Point:
    """One network on so many images; `value` is what the series varies.

    Attributes:
        memory_gb: the memory budget of collect and refit; 0: auto.
    """

    series: str
    value: float
    network: str = "seprune/se_resnet20"
    pixels: int = 32
    images: int = 256
    classes: int = 10
    batch: int = 128
    memory_gb: int = 0

    def key(self) -> tuple[str, ...]:
        """The point as it stands in the CSV."""
        return tuple(f"{v:g}" if isinstance(v, float) else str(v) for v in asdict(self).values())


POINTS = (
    *(Point("depth", float(d), f"seprune/se_resnet{d}") for d in (20, 32, 56, 110)),
    Point("bottlenecks", 164, "seprune/se_resnet164"),
    *(Point("images", float(n), images=n) for n in (256, 512, 1024, 2048, 4096)),
    *(Point("pixels", float(p), pixels=p, images=128) for p in (32, 64, 128)),
    *(Point("classes", float(c), classes=c) for c in (10, 100, 1000, 20_000)),
    Point("ImageNet", 18, "seprune/se_resnet18", 224, 128, 1000, 64),
    Point("ImageNet", 50, "seprune/se_resnet50", 224, 128, 1000, 64),
    Point("memory", 50, "seprune/se_resnet50", 224, 64, 1000, 64, 2),
    Point("memory", 7, "torchvision/efficientnet_b7", 600, 4, 1000, 4, 6),
)


def main() -> None:
    arguments = parsed()
    if arguments.point:
        print(json.dumps(measure(Point(**json.loads(arguments.point)), arguments.macs)))
        return
    if not arguments.render:
        run(arguments)
    target = arguments.render or Path("docs/costs.md")
    write_text(target, render(read(arguments.out)))


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", default=["*"], help="patterns of series, series/value")
    parser.add_argument("--again", action="store_true", help="measure known points again")
    parser.add_argument("--macs", type=float, default=0.5)
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--render", type=Path, help="write the page from the CSV, measure nothing")
    parser.add_argument("--point", help=argparse.SUPPRESS)
    return parser.parse_args()


def run(arguments: argparse.Namespace) -> None:
    """Measure every point that is not known, each in a process of its own."""
    rows = read(arguments.out)
    for point in POINTS:
        known = [r for r in rows if tuple(r[k] for k in KEYS) == point.key()]
        names = (point.series, f"{point.series}/{point.value:g}")
        wanted = any(fnmatch.fnmatch(n, p) for n in names for p in arguments.only)
        if not wanted or (known and not arguments.again):
            continue
        command = [sys.executable, __file__, "--point", json.dumps(asdict(point)),
                   "--macs", str(arguments.macs)]  # fmt: skip
        made = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)
        rows = [r for r in rows if r not in known] + made
        write(arguments.out, rows, COLUMNS)
        print(point, {r["step"]: r["forwards"] for r in made}, flush=True)


def measure(point: Point, macs: float) -> Rows:
    """The rows of one point, one for every step."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = build(point.network, classes=point.classes).eval()
    shape = (point.images, 3, point.pixels, point.pixels)
    loader = torch.randn(shape).split(point.batch)
    example = torch.randn(1, *shape[1:])
    clock = Clock(lambda: forward(model, loader))
    structure = clock.step("analyse", lambda: analyse(model, example))
    memory: int | Literal["auto"] = point.memory_gb << 30 or "auto"
    options = CollectOptions(device="cpu", memory=memory)
    statistics = clock.step(
        "collect",
        lambda: collect_statistics(
            model, loader, structure=structure, gradients="logits", options=options
        ),
    )
    plan = clock.step("plan", lambda: make_plan(structure, score(structure, statistics), macs=macs))
    fitting = RefitOptions(images=point.images, device="cpu", memory=memory)
    cut = clock.step("cut", lambda: prune(model, plan, example))
    clock.step(
        "refit",
        lambda: refit(model, cut, plan, loader, options=fitting),
    )
    own = dict(zip(KEYS, point.key()))
    facts = {
        "macs": str(structure.costs()["macs"]),
        "torch": torch.__version__,
        "hardware": hardware(torch.device("cpu")),
        "date": time.strftime("%Y-%m-%d"),
    }
    return [own | facts | row for row in clock.rows()]


class Clock:
    """Processor seconds and peak memory of steps, with bare forwards beside the long ones."""

    def __init__(self, bare: Callable[[], Any]) -> None:
        self.bare = bare
        bare()  # warm
        self.forwards = [self.seconds(bare)[0]]
        self.first_peak = _peak()
        self.seen: dict[str, tuple[float, float, int]] = {}

    def seconds(self, call: Callable[[], Any]) -> tuple[float, Any]:
        """Processor time of one call, all threads, and its result."""
        begun = time.process_time()
        result = call()
        return time.process_time() - begun, result

    def step(self, name: str, call: Callable[[], Any]) -> Any:
        """Run one step, then a bare forward if it goes over all images."""
        taken, result = self.seconds(call)
        peak = _peak()
        if name in RATIOS:
            self.forwards.append(self.seconds(self.bare)[0])
        self.seen[name] = taken, sum(self.forwards[-2:]) / len(self.forwards[-2:]), peak
        return result

    def rows(self) -> Rows:
        """One row a step; the bare forward is the first."""
        bare = min(self.forwards)
        rows = [_row("forward", bare, 1.0, self.first_peak)]
        return rows + [
            _row(name, taken, taken / beside, peak)
            for name, (taken, beside, peak) in self.seen.items()
        ]


def _row(step: str, seconds: float, forwards: float, peak: int) -> dict[str, str]:
    return {
        "step": step,
        "cpu_seconds": f"{seconds:.3f}",
        "forwards": f"{forwards:.2f}",
        "peak_mb": str(peak >> 10),
    }


def _peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # kB on Linux


@torch.no_grad()
def forward(model: torch.nn.Module, loader: Sequence[torch.Tensor]) -> None:
    """The network over all images, nothing kept."""
    for batch in loader:
        model(batch)


def exponent(pairs: Sequence[tuple[float, float]]) -> float:
    """b of y = a x^b by least squares over the logarithms of (x, y)."""
    logs = [(math.log(x), math.log(y)) for x, y in pairs]
    x0, y0 = (sum(values) / len(logs) for values in zip(*logs))
    return sum((x - x0) * (y - y0) for x, y in logs) / sum((x - x0) ** 2 for x, _ in logs)


PAGE = """# What the steps cost

Made by `python benchmarks/scaling.py --render docs/costs.md` from benchmarks/results/scaling.csv.
{hardware}, torch {torch}, {date}. Networks have random weights; half of the MACs are cut.

**Forwards**: processor time of the step over that of one bare forward over the same images, in the
same process on one thread. `analyse`, `plan` and `cut` look at one image or at none; theirs are in
seconds. A refit solves much the same equations for few images as for many, so its ratio falls as
images or positions grow. **Peak** is the largest resident memory of the process up to the end of
the step, PyTorch itself (about 0.3 GB) and the images included.
{sections}
## Exponents

b of cost = a x^b, fitted over each series: 1 is linear growth, 0 none.

{exponents}
"""


def render(rows: Rows) -> str:
    """The page with every series as a table, and the fitted exponents."""
    series = list(dict.fromkeys(r["series"] for r in rows))
    rows = sorted(rows, key=lambda r: float(r["value"]))
    facts = {k: ", ".join(dict.fromkeys(r[k] for r in rows)) for k in ("hardware", "torch", "date")}
    sections = "".join(
        f"\n## {_TITLES[name]}\n\n{_table([r for r in rows if r['series'] == name])}\n"
        for name in series
    )
    return PAGE.format(sections=sections, exponents=_exponents(rows), **facts)


_TITLES = {
    "depth": "Depth",
    "bottlenecks": "Bottleneck blocks",
    "images": "Images",
    "pixels": "Image size",
    "classes": "Classes",
    "ImageNet": "Networks for ImageNet",
    "memory": "A memory budget",
}


def _points(rows: Rows) -> list[dict[str, dict[str, str]]]:
    grouped: dict[tuple[str, ...], dict[str, dict[str, str]]] = {}
    for row in rows:
        grouped.setdefault(tuple(row[k] for k in KEYS), {})[row["step"]] = row
    return list(grouped.values())


def _table(rows: Rows) -> str:
    head = ("network", "pixels", "images", "classes", "budget GB", "forward s", "analyse s",
            "collect, forwards", "plan s", "cut s", "refit, forwards",
            "peak of collect GB", "of refit GB")  # fmt: skip
    lines = ["| " + " | ".join(head) + " |", "|---" + "|--:" * (len(head) - 1) + "|"]
    for steps in _points(rows):
        first = steps["forward"]
        cells = [first[k] for k in ("network", "pixels", "images", "classes")]
        cells += [first["memory_gb"] if first["memory_gb"] != "0" else "auto"]
        cells += [f"{float(steps[s]['cpu_seconds']):.1f}" for s in ("forward", "analyse")]
        cells += [steps["collect"]["forwards"]]
        cells += [f"{float(steps[s]['cpu_seconds']):.2f}" for s in ("plan", "cut")]
        cells += [steps["refit"]["forwards"]]
        cells += [f"{int(steps[s]['peak_mb']) / 1024:.1f}" for s in ("collect", "refit")]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _exponents(rows: Rows) -> str:
    lines = ["| series | " + " | ".join(STEPS) + " | peak memory |",
             "|---" + "|--:" * (len(STEPS) + 1) + "|"]  # fmt: skip
    for name in ("depth", "images", "pixels", "classes"):
        own = [r for r in rows if r["series"] == name]
        if len(_points(own)) < 3:
            continue
        fits = [_fit([r for r in own if r["step"] == s], "cpu_seconds") for s in STEPS]
        fits.append(_fit([r for r in own if r["step"] == "refit"], "peak_mb"))
        lines.append(f"| {name} | " + " | ".join(f"{b:.2f}" for b in fits) + " |")
    return "\n".join(lines)


def _fit(rows: Rows, column: str) -> float:
    return exponent([(float(r["value"]), float(r[column])) for r in rows])


if __name__ == "__main__":
    main()
