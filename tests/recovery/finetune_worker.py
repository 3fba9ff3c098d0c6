"""One process of the tests in test_finetuning.py: fine-tunes a tiny network into a folder."""

import json
import os
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from seprune.data import open_data
from seprune.measure.metrics import evaluate
from seprune.recovery.finetune import FineTuneSettings, finetune


def tiny(dropout: float = 0.0) -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, stride=2, bias=False),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Flatten(),
        nn.Dropout(dropout),
        nn.Linear(72, 10),
    )


def deadly(iterable, *, label, **_):
    """Kill this process, as nobody can catch it, before batch N of the epoch that KILL names."""
    where, _, batch = os.environ.get("KILL", ":").partition(":")
    for number, item in enumerate(iterable):
        if where and label.startswith(where) and number == int(batch):
            os.kill(os.getpid(), 9)
        yield item


def train(folder: Path) -> None:
    settings = FineTuneSettings(epochs=3, batch_size=64, ema=0.9, mixup=0.2, save_steps=5)
    tuned = finetune(tiny(0.2), open_data("digits"), settings, folder=folder, track=deadly)
    save_file(tuned.model.state_dict(), folder / "end.safetensors")


def together(folder: Path) -> None:
    """Everything that processes do together; not every batch divides by 2 or 3."""
    data = open_data("digits")
    settings = FineTuneSettings(epochs=2, batch_size=50, lr=0.02, recalibrate=0)
    tuned = finetune(tiny(), data, settings, folder=folder)
    images, labels = zip(*data.reporting(), strict=True)
    dataset = TensorDataset(torch.cat(images)[:100], torch.cat(labels)[:100])
    foreign = DataLoader(dataset, batch_size=34, shuffle=True)
    other = finetune(tiny(), foreign, settings)
    scores = {
        "own": evaluate(tiny(), data.reporting(70)).plain(),
        "foreign": evaluate(tiny(), foreign).plain(),
        "curve": [row.loss for row in tuned.history],
        "foreign curve": [row.loss for row in other.history],
    }
    if os.environ.get("RANK", "0") == "0":
        (folder / "end.json").write_text(json.dumps(scores))
        save_file(tuned.model.state_dict(), folder / "end.safetensors")


if __name__ == "__main__":
    torch.set_num_threads(1)
    (together if "together" in sys.argv else train)(Path(sys.argv[1]))
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
