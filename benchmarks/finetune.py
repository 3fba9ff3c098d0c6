"""Images per second of `seprune.finetune` beside a bare PyTorch loop, interleaved in one process.

Same network, images, batch size, precision, optimizer and memory format. The bare loop has its
images ready as normalised floats on the device; seprune crops, flips and normalises them anew, and
saves nothing. The digits, scaled up, stand for images of any size.

    python benchmarks/finetune.py                                        # SE-ResNet-20 at 32, CPU
    python benchmarks/finetune.py --precision bf16 --batch 512 --images 50000 --compile
    python benchmarks/finetune.py --model seprune/se_resnet50 --side 224 --precision bf16 \
        --channels-last --batch 256 --images 12800
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import time
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F

from seprune.data import DataSettings, Loader, open_data
from seprune.evaluation import autocast
from seprune.finetuning import FineTuneSettings, finetune
from seprune.finetuning.objective import decay_groups
from seprune.models import build
from seprune.processes import resolve_device

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
        self.count = arguments.images // self.batch * self.batch
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

    def epoch(self) -> float:
        start = time.perf_counter()
        total = torch.zeros((), device=self.device)
        for rows in torch.randperm(self.count, device=self.device).split(self.batch):
            with autocast(self.device, self.precision):
                loss = F.cross_entropy(self.model(self.images[rows]), self.labels[rows])
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()
            total += loss.detach()
        total.item()
        return self.count / (time.perf_counter() - start)


def ours(model: nn.Module, loader: Loader, arguments: argparse.Namespace) -> list[float]:
    """Images per second of each epoch but the first, which compiles and warms up."""
    settings = FineTuneSettings(
        epochs=2,
        batch_size=arguments.batch,
        recalibrate=0,
        precision=arguments.precision,
        channels_last=arguments.channels_last,
        compile=arguments.compile,
        device=arguments.device,
    )
    history = finetune(model, loader, settings).history
    return [row.images_per_second for row in history[1:]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="seprune/se_resnet20")
    parser.add_argument("--side", type=int, default=32)
    parser.add_argument("--images", type=int, default=3840)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--precision", default="no", choices=["no", "bf16", "fp16"])
    parser.add_argument("--channels-last", action="store_true")
    parser.add_argument("--compile", action="store_true")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    model = build(arguments.model, classes=10)
    loader = images_of(arguments)
    bare = Bare(model, loader, arguments)
    bare.epoch()
    rounds = []
    for _ in range(arguments.rounds):
        plain = bare.epoch()
        rounds.append((plain, ours(model, loader, arguments)[0]))
    device = bare.device
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    result = {
        **vars(arguments),
        "device": name,
        "torch": torch.__version__,
        "bare_images_per_second": statistics.median(r[0] for r in rounds),
        "seprune_images_per_second": statistics.median(r[1] for r in rounds),
        "ratio": statistics.median(r[1] / r[0] for r in rounds),
        "ratios": sorted(r[1] / r[0] for r in rounds),
    }
    RESULTS.mkdir(exist_ok=True)
    network = arguments.model.rpartition("/")[2]
    file = RESULTS / f"finetune-{network}-{device.type}.json"
    file.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
