"""How many images and rows a refit needs: its error on other images.

A network is cut to a part of its MACs and refitted on calibration images with different numbers of
images and of rows (output positions per layer). Columns: squared error of the logits against the
parent's, relative to their variance, on 1,024 training images that no refit sees; top-1 on val/,
on which nothing is chosen. Rows 0 are the default. What it costs: benchmarks/scaling.py. Every cell
is a row of the CSV; rows that are there are not measured again. With `--layers` a second CSV has
the error of every layer on the images that no refit sees, relative to the variance of its target.

    python benchmarks/refit_samples.py --network se_resnet20 --checkpoint FILE --data DATA
    python benchmarks/refit_samples.py --network regnety --data DATA    # kept weights
    python benchmarks/refit_samples.py --render
"""

from __future__ import annotations

import argparse
import itertools
import time
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from statistics import mean, median
from typing import Any

import torch
from cifar_arrays import Arrays, load_arrays, open_arrays
from collect import hardware
from csv_rows import Rows, read, write
from kept_weights import NETWORKS, kept
from torch import Tensor, nn

from seprune.importance import score
from seprune.measure.metrics import evaluate
from seprune.pipeline.inputs import open_network
from seprune.pruning.analyse import analyse
from seprune.pruning.plan import PruningPlan
from seprune.pruning.prune import prune
from seprune.pruning.search import make_plan
from seprune.recipe.sections import ModelSection
from seprune.recovery.refit import RefitOptions, refit
from seprune.runtime.files import write_text
from seprune.statistics import CollectOptions, collect_statistics

RESULTS = Path(__file__).parent / "results" / "refit_samples.csv"
LAYERS = RESULTS.with_name("refit_layers.csv")
PAGE = Path(__file__).parents[1] / "docs" / "refit.md"
KEYS = ("network", "macs", "images", "rows", "seed")
COLUMNS = (*KEYS, "error", "top1", "hardware", "date")
LAYER_COLUMNS = (*KEYS, "layer", "error")
HELD_OUT = 1024
MANY = 1 << 16  # rows that measure a layer
_EXACT = 1e-9  # of the variance: below, an error is rounding


def main() -> None:
    arguments = parsed()
    if not arguments.render:
        measure(arguments)
    render(read(arguments.out))


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--network", choices=list(NETWORKS), default="se_resnet20")
    parser.add_argument("--checkpoint", type=Path, help="not for networks whose weights are kept")
    parser.add_argument("--data", type=Path, help="train/ and val/, or an .npz file")
    parser.add_argument("--macs", type=float, nargs="+", default=[0.5])
    parser.add_argument("--images", type=int, nargs="+", default=[256, 1024, 2048, 8192])
    parser.add_argument(
        "--rows", type=int, nargs="+", default=[0, 1 << 12, 1 << 14, 1 << 15, 1 << 16, 1 << 18]
    )
    parser.add_argument("--most", type=int, default=8192, help="images before the held-out ones")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--reporting", type=int, default=5000)
    parser.add_argument("--layers", action="store_true", help="measure single layers too")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--render", action="store_true", help="make the table in docs/ anew")
    return parser.parse_args()


def measure(arguments: argparse.Namespace) -> None:
    """All cells that are not in the CSV."""
    torch.set_num_threads(1)
    trial = Trial(arguments)
    for cell in itertools.product(
        arguments.macs, arguments.seeds, arguments.images, arguments.rows
    ):
        macs, seed, images, count = cell
        rows, layers = read(arguments.out), read(LAYERS)
        key = (trial.name, f"{macs:g}", str(images), str(count), str(seed))
        if key in {tuple(row[k] for k in KEYS) for row in (layers if arguments.layers else rows)}:
            continue
        made = trial.refitted(macs, seed, images, count)
        if arguments.layers:
            errors = trial.layer_errors(made, macs, seed)
            layers += [dict(zip(LAYER_COLUMNS, (*key, *pair))) for pair in errors.items()]
            write(LAYERS, layers, LAYER_COLUMNS)
        rows = [row for row in rows if tuple(row[k] for k in KEYS) != key]
        rows.append(dict(zip(KEYS, key)) | trial.quality(made, seed))
        print(rows[-1], flush=True)
        write(arguments.out, rows, COLUMNS)


class Trial:
    """One trained network and its data."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.name, self.pixels = NETWORKS[arguments.network]
        where = arguments.checkpoint or kept(arguments.network)
        if where is None:
            raise SystemExit(f"{arguments.network}: no weights are kept; give --checkpoint FILE")
        section = ModelSection(name=self.name, classes=10, checkpoint=str(where))
        self.most = arguments.most
        self.network = open_network(section, shape=(3, self.pixels, self.pixels))
        self.arrays: Arrays = load_arrays(arguments.data)
        self.reporting = [
            (self.sized(images), labels)
            for images, labels in open_arrays(self.arrays, reporting=arguments.reporting).reporting(
                500
            )
        ]
        self.structure = analyse(self.network.model, self.network.example())

    def sized(self, images: Tensor) -> Tensor:
        """Images in the size of the network."""
        size = (self.pixels, self.pixels)
        if images.shape[-2:] == size:
            return images
        return nn.functional.interpolate(images, size, mode="bilinear")

    @cache  # noqa: B019
    def batches(self, seed: int) -> tuple[list[Tensor], list[Tensor]]:
        """Calibration images, most first, and those that are held out."""
        loader = open_arrays(self.arrays, seed=seed).calibration(self.most + HELD_OUT, seed=seed)
        images = torch.cat([self.sized(batch[0]) for batch in loader]).split(128)
        return list(images[: self.most // 128]), list(images[self.most // 128 :])

    @cache  # noqa: B019
    def plan(self, macs: float, seed: int) -> PruningPlan:
        """The default plan, from 2,048 images."""
        statistics = collect_statistics(
            self.network.model,
            self.batches(seed)[0][:16],
            structure=self.structure,
            gradients="logits",
            options=CollectOptions(device="cpu", seed=seed),
        )
        return make_plan(self.structure, score(self.structure, statistics), macs=macs)

    def refitted(self, macs: float, seed: int, images: int, rows: int) -> nn.Module:
        """One refit."""
        parent, plan = self.network.model.eval(), self.plan(macs, seed)
        calibration = self.batches(seed)[0][: images // 128]
        cut = prune(parent, plan, self.network.example())
        options = RefitOptions(images=images, rows=rows or None, device="cpu")
        return refit(parent, cut, plan, calibration, options=options).model.eval()

    def quality(self, made: nn.Module, seed: int) -> dict[str, Any]:
        """Its error on other images, and its accuracy."""
        return {
            "error": f"{error(self.network.model, made, self.batches(seed)[1]):.5f}",
            "top1": f"{evaluate(made, self.reporting, device='cpu').top1:.4f}",
            "hardware": hardware(torch.device("cpu")),
            "date": time.strftime("%Y-%m-%d"),
        }

    def layer_errors(self, made: nn.Module, macs: float, seed: int) -> dict[str, str]:
        """The error of every layer on other images before a refit that changes no weight."""
        options = RefitOptions(images=HELD_OUT, rows=MANY, ridge=1e12, device="cpu")
        found = refit(
            self.network.model, made, self.plan(macs, seed), self.batches(seed)[1], options=options
        )
        return {layer: f"{before:.5g}" for layer, (before, _) in found.errors.items()}


@torch.no_grad()
def forward(model: nn.Module, batches: Sequence[Tensor]) -> Tensor:
    """The logits of all images."""
    return torch.cat([model(batch) for batch in batches])


def error(parent: nn.Module, model: nn.Module, batches: Sequence[Tensor]) -> float:
    """Squared error of the logits, relative to the variance of the parent's."""
    wanted = forward(parent, batches)
    return float((forward(model, batches) - wanted).square().mean() / wanted.var())


def render(rows: Rows) -> None:
    """The table of docs/refit.md."""
    start, end = "<!-- made by benchmarks/refit_samples.py -->", "<!-- end -->"
    before, _, rest = PAGE.read_text().partition(start)
    lines = [*table(rows), *layer_table(read(LAYERS))]
    write_text(PAGE, "\n".join([before + start, *lines, end]) + rest.partition(end)[2])


def table(rows: Rows) -> list[str]:
    """Held-out error and cost by images and rows, one block for every network and budget."""
    lines: list[str] = []
    for network, macs in dict.fromkeys((r["network"], r["macs"]) for r in rows):
        own = [r for r in rows if (r["network"], r["macs"]) == (network, macs)]
        counts = sorted({int(r["rows"]) for r in own})
        names = [f"{count:,} rows" if count else "default" for count in counts]
        lines += ["", f"{network}, {macs} of the MACs: error (top-1)", ""]
        lines += ["| images | " + " | ".join(names) + " |", "|--:" * (len(counts) + 1) + "|"]
        for images in sorted({int(r["images"]) for r in own}):
            cells = [_cell([r for r in own if (r["images"], r["rows"]) == (str(images), str(c))])
                     for c in counts]  # fmt: skip
            lines.append(f"| {images:,} | " + " | ".join(cells) + " |")
    return lines


def layer_table(rows: Rows) -> list[str]:
    """How far the errors of single layers lie above those with the most rows that were measured.

    Relative to these, and in the last column in hundredths of the variance of the layer's target.
    """
    names = ("network", "MACs", "images", "rows", "layers", "mean", "median", "largest",
             "largest, of the variance")  # fmt: skip
    lines = ["", "| " + " | ".join(names) + " |", "|---" + "|--:" * (len(names) - 1) + "|"]
    most = str(max((int(r["rows"]) for r in rows), default=0))
    groups: dict[tuple[str, ...], list[tuple[float, float]]] = {}
    known = {tuple(r[k] for k in (*KEYS, "layer")): float(r["error"]) for r in rows}
    for (network, macs, images, count, seed, layer), error in known.items():
        best = known.get((network, macs, images, most, seed, layer))
        if best is not None and best > _EXACT and count != most:
            excess = groups.setdefault((network, macs, f"{int(images):,}", count), [])
            excess.append((100 * (error / best - 1), 100 * (error - best)))
    for key, pairs in groups.items():
        found = [relative for relative, _ in pairs]
        name = f"{int(key[3]):,}" if key[3] != "0" else "default"
        worst = max(points for _, points in pairs)
        each = (f"{v:+.1f} %" for v in (mean(found), median(found), max(found), worst))
        lines.append("| " + " | ".join([*key[:3], name, str(len(found)), *each]) + " |")
    return lines if groups else []


def _cell(rows: Rows) -> str:
    if not rows:
        return ""
    error, top1 = (sum(float(r[name]) for r in rows) / len(rows) for name in ("error", "top1"))
    return f"{error:.4f} ({100 * top1:.2f})"


if __name__ == "__main__":
    main()
