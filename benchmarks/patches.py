"""Ways to the normal equations of a convolution: what each costs, beside the convolution itself.

Sampled rows: the patches of the sampled positions taken one by one (what a refit does), or picked
from a strided view of the padded input, or from an unfolding of all positions. All rows: patches of
all positions multiplied, or shifted products of the padded input with itself, which need no patches
(stride 1, and edges still to be taken off). Ratios of processor times, the least of some rounds.

    python benchmarks/patches.py        # one CSV, one table in docs/refit.md
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from collect import hardware
from csv_rows import Rows, read, write
from torch import Tensor, nn
from torch.nn import functional

from seprune.recovery.refit.least_squares import gram
from seprune.recovery.refit.options import RefitOptions
from seprune.recovery.refit.products import observe
from seprune.recovery.refit.sampling import Sampling
from seprune.runtime.files import write_text

RESULTS = Path(__file__).parent / "results" / "patches.csv"
PAGE = Path(__file__).parents[1] / "docs" / "refit.md"
COLUMNS = ("layer", "way", "rows", "milliseconds", "hardware", "date")
CONVOLUTION = "the convolution itself"
IMAGES, BLOCK, ROUNDS = 2048, 128, 5


@dataclass(frozen=True)
class Layer:
    """A convolution of some network: channels in and out, pixels of a side."""

    name: str
    inputs: int
    outputs: int
    pixels: int
    kernel: int = 3
    stride: int = 1
    groups: int = 1

    def made(self) -> nn.Conv2d:
        """It with random weights."""
        return nn.Conv2d(self.inputs, self.outputs, self.kernel, self.stride, self.kernel // 2,
                         groups=self.groups, bias=False)  # fmt: skip


LAYERS = (
    Layer("3x3, 16 channels, 32 pixels", 16, 16, 32),
    Layer("3x3, 64 channels, 8 pixels", 64, 64, 8),
    Layer("3x3, 64 channels, 56 pixels", 64, 64, 56),
    Layer("3x3, 128 channels, 28 pixels, stride 2", 128, 128, 28, stride=2),
    Layer("1x1, 256 channels, 28 pixels", 256, 64, 28, kernel=1),
    Layer("depthwise 5x5, 96 channels, 28 pixels", 96, 96, 28, kernel=5, groups=96),
)


class Ways:
    """The ways for one layer and one block of images."""

    def __init__(self, layer: Layer) -> None:
        torch.manual_seed(0)
        self.layer, self.conv = layer, layer.made()
        images = BLOCK if layer.pixels < 56 else BLOCK // 4
        self.x = torch.randn(images, layer.inputs, layer.pixels, layer.pixels)
        with torch.no_grad():
            call = observe(self.conv, self.x)
        assert call is not None
        self.call = call
        columns = layer.kernel**2 * layer.inputs // layer.groups
        rows = min(RefitOptions().rows_of(columns, IMAGES), IMAGES * call.positions)
        self.index = Sampling(IMAGES, rows).index(call.positions, images, first=0, images=images)
        self.every = torch.arange(call.positions).expand(images, -1)

    def all(self) -> dict[str, Callable[[], Tensor]]:
        """Way -> what gives the Gram matrices (conv groups, K, K)."""
        ways: dict[str, Callable[[], Tensor]] = {
            "sampled rows one by one": lambda: gram(self.call.patches(self.index)),
            "sampled rows of a strided view": lambda: gram(self.viewed()),
            "all unfolded, sampled rows picked": lambda: gram(self.picked()),
            "all rows as patches": lambda: gram(self.call.patches(self.every)),
        }
        if self.layer.stride == self.layer.groups == 1:
            ways["all rows by shifted products"] = self.shifted
        return ways

    def padded(self) -> Tensor:
        """The input with its padding."""
        return functional.pad(self.x, (self.layer.kernel // 2,) * 4)

    def grouped(self, rows: Tensor) -> Tensor:
        """(B, P, C, kernel) as (conv groups, B x P, kernel x C)."""
        split = rows.flatten(0, 1).unflatten(1, (self.layer.groups, -1))
        return split.permute(1, 0, 3, 2).flatten(2)

    def viewed(self) -> Tensor:
        """Windows as a view of the padded input; the sampled ones copied out of it."""
        k, s = self.layer.kernel, self.layer.stride
        windows = self.padded().unfold(2, k, s).unfold(3, k, s)
        width = windows.shape[3]
        image = torch.arange(len(self.x))[:, None]
        rows = windows[image, :, self.index // width, self.index % width]  # (B, P, C, k, k)
        return self.grouped(rows.flatten(3))

    def picked(self) -> Tensor:
        """All windows copied, then the sampled ones."""
        k, s = self.layer.kernel, self.layer.stride
        every = functional.unfold(self.x, k, padding=k // 2, stride=s)  # (B, C x kernel, positions)
        where = self.index[:, None].expand(-1, every.shape[1], -1)
        rows = every.gather(2, where).mT
        return self.grouped(rows.unflatten(2, (self.layer.inputs, k * k)))

    def shifted(self) -> Tensor:
        """(1, C x distances, C): all images, padded, times themselves shifted by each distance.

        Blocks of the Gram matrix with the same distance are equal but for the edges of the images,
        which would have to be taken off: this is less than the work needed.
        """
        reach, side = self.layer.kernel - 1, self.layer.pixels + self.layer.kernel - 1
        flat = self.padded().movedim(1, -1).reshape(-1, self.layer.inputs)
        ways = range(-reach, reach + 1)
        steps = [down * side + right for down in range(reach + 1) for right in ways]
        steps = [step for step in steps if step >= 0]
        return torch.cat([flat[: len(flat) - step].mT @ flat[step:] for step in steps])[None]


def main() -> None:
    arguments = parsed()
    if not arguments.render:
        write(RESULTS, [row for layer in LAYERS for row in measured(layer)], COLUMNS)
    start, end = "<!-- made by benchmarks/patches.py -->", "<!-- end -->"
    before, _, rest = PAGE.read_text().partition(start)
    write_text(
        PAGE, "\n".join([before + start, *table(read(RESULTS)), end]) + rest.partition(end)[2]
    )


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--render", action="store_true", help="make the table in docs/ anew")
    return parser.parse_args()


@torch.no_grad()
def measured(layer: Layer) -> Rows:
    """One row for every way, and one for the layer itself."""
    torch.set_num_threads(1)
    ways = Ways(layer)
    calls: dict[str, Callable[[], Tensor]] = {CONVOLUTION: lambda: ways.conv(ways.x), **ways.all()}
    least = dict.fromkeys(calls, float("inf"))
    for _ in range(ROUNDS):
        for name, call in calls.items():
            began = time.process_time()
            call()
            least[name] = min(least[name], time.process_time() - began)
    rows = {name: ways.every.numel() if name.startswith("all rows") else ways.index.numel()
            for name in calls}  # fmt: skip
    about = {"hardware": hardware(torch.device("cpu")), "date": time.strftime("%Y-%m-%d")}
    made = [
        {"layer": layer.name, "way": n, "rows": rows[n], "milliseconds": f"{1000 * s:.2f}"} | about
        for n, s in least.items()
    ]
    print(*made, sep="\n", flush=True)
    return made


def table(rows: Rows) -> list[str]:
    """Times of every way, relative to the convolution."""
    ways = list(dict.fromkeys(r["way"] for r in rows if r["way"] != CONVOLUTION))
    lines = ["", "| layer | " + " | ".join(ways) + " |", "|---" + "|--:" * len(ways) + "|"]
    for layer in dict.fromkeys(r["layer"] for r in rows):
        found = {r["way"]: float(r["milliseconds"]) for r in rows if r["layer"] == layer}
        cells = [f"{found[w] / found[CONVOLUTION]:.2f}" if w in found else "" for w in ways]
        lines.append(f"| {layer} | " + " | ".join(cells) + " |")
    return lines


if __name__ == "__main__":
    main()
