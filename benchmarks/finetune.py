"""Images per second of `seprune.finetune` beside a bare PyTorch loop, block by block in turn.

Same network, images, batch size, precision, optimizer and memory format. The bare loop has its
images ready as normalised floats on the device; seprune crops, flips and normalises them anew. A
block is some steps of the one and then as many of the other, so that whatever else the machine
does meets both; the ratio is the median over blocks. The digits, scaled up, stand for images of
any size. On a CPU seconds are of processor time, and glibc is set to keep the memory it has: what
pages cost that go back and forth depends on chance, up to a tenth of a step for either loop.

    MALLOC_MMAP_THRESHOLD_=2147483648 MALLOC_TRIM_THRESHOLD_=4294967296 \
        python benchmarks/finetune.py                                    # SE-ResNet-20 at 32, CPU
    python benchmarks/finetune.py --device cuda --precision bf16 --channels-last --compile \
        --batch 512 --images 50000 --steps 20 --out finetune-cuda.json
    python benchmarks/finetune.py --device cuda --model seprune/se_resnet50 --side 224 \
        --precision bf16 --channels-last --batch 256 --images 12800 --steps 5 \
        --out finetune-cuda-224.json
"""

from __future__ import annotations

import argparse
import copy
import itertools
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Iterable, Iterator
from datetime import date
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from seprune.data import DataSettings, Loader, open_data
from seprune.models import build
from seprune.recovery.finetune import FineTuneSettings, finetune
from seprune.recovery.finetune.loss import decay_groups
from seprune.runtime.distributed import resolve_device
from seprune.runtime.files import write_json
from seprune.runtime.inference import autocast

RESULTS = Path(__file__).parent / "results"


def images_of(arguments: argparse.Namespace) -> Loader:
    settings = DataSettings(
        input=(3, arguments.side, arguments.side), cache="device", augment="crop", validation=0
    )
    loader = open_data("digits", settings).training(arguments.batch)
    loader.rows = loader.rows.repeat(arguments.images // len(loader.rows) + 1)[: arguments.images]
    return loader


class Bare:
    """The loop that people write by hand."""

    def __init__(self, model: nn.Module, loader: Loader, arguments: argparse.Namespace):
        self.device = resolve_device(arguments.device)
        self.precision, self.batch = arguments.precision, arguments.batch
        batches = list(loader.on(self.device))
        self.images = torch.cat([images for images, _ in batches])
        self.labels = torch.cat([labels for _, labels in batches])
        self.model = copy.deepcopy(model).to(self.device).train()
        if arguments.channels_last:
            self.model.to(memory_format=torch.channels_last)
            self.images = self.images.contiguous(memory_format=torch.channels_last)
        groups = decay_groups(self.model, 5e-4)
        self.optimizer = torch.optim.SGD(groups, lr=0.05, momentum=0.9, nesterov=True, fused=True)
        if arguments.compile:
            self.model.compile()
        self.total = torch.zeros((), device=self.device)
        self.batches = itertools.chain.from_iterable(self.epoch() for _ in itertools.count())

    def epoch(self) -> tuple[torch.Tensor, ...]:
        return torch.randperm(len(self.images), device=self.device).split(self.batch)

    def step(self) -> None:
        rows = next(self.batches)
        with autocast(self.device, self.precision):
            loss = F.cross_entropy(self.model(self.images[rows]), self.labels[rows])
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        self.total += loss.detach()


class Turns:
    """A `Track` that lets the bare loop take its turn after every block of seprune's steps."""

    def __init__(self, bare: Bare, steps: int) -> None:
        self.bare, self.steps = bare, steps
        self.pairs: list[tuple[float, float]] = []  # seconds of a block: bare, seprune

    def __call__(self, iterable: Iterable[Any], *, label: str, **_: Any) -> Iterator[Any]:
        start, taken = self.now(), 0
        for item in iterable:
            yield item
            taken += 1
            if label.startswith("epoch") and taken == self.steps:
                ours = self.now() - start
                start = self.now()
                for _turn in range(self.steps):
                    self.bare.step()
                self.pairs.append((self.now() - start, ours))
                start, taken = self.now(), 0

    def now(self) -> float:
        """Seconds; on a CPU those of this process, which others on the machine do not stretch."""
        if self.bare.device.type == "cpu":
            return time.process_time()
        torch.cuda.synchronize()
        return time.perf_counter()


def main() -> None:
    arguments = parsed()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    model = build(arguments.model, classes=10)
    loader = images_of(arguments)
    bare = Bare(model, loader, arguments)
    for _ in range(3):
        bare.step()
    turns = Turns(bare, arguments.steps)
    settings = FineTuneSettings(
        epochs=arguments.epochs,
        batch_size=arguments.batch,
        recalibrate=0,
        precision=arguments.precision,
        channels_last=arguments.channels_last,
        compile=arguments.compile,
        device=arguments.device,
    )
    finetune(model, loader, settings, track=turns)
    pairs = turns.pairs[max(1, len(turns.pairs) // 10) :]  # the first ones compile and warm up
    images = arguments.steps * arguments.batch
    malloc = [f"{k}={v}" for k, v in sorted(os.environ.items()) if k.startswith("MALLOC_")]
    ratios = statistics.quantiles([plain / ours for plain, ours in pairs], n=4)
    result = {
        "command": " ".join([*malloc, "python", "benchmarks/finetune.py", *sys.argv[1:]]),
        "date": date.today().isoformat(),
        "hardware": torch.cuda.get_device_name(bare.device)
        if bare.device.type == "cuda"
        else f"{platform.machine()} CPU, {arguments.threads} thread",
        "torch": torch.__version__,
        "settings": {k: v for k, v in vars(arguments).items() if k != "out"},
        "blocks": len(pairs),
        "bare_images_per_second": images / statistics.median(plain for plain, _ in pairs),
        "seprune_images_per_second": images / statistics.median(ours for _, ours in pairs),
        "ratio": ratios[1],
        "ratio_quartiles": [ratios[0], ratios[2]],
    }
    write_json(RESULTS / arguments.out, result)
    print(json.dumps(result, indent=1))


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="seprune/se_resnet20")
    parser.add_argument("--side", type=int, default=32)
    parser.add_argument("--images", type=int, default=2560)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--steps", type=int, default=1, help="of one block")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--precision", default="no", choices=["no", "bf16", "fp16"])
    parser.add_argument("--channels-last", action="store_true")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--out", default="finetune-cpu.json")
    return parser.parse_args()


if __name__ == "__main__":
    main()
