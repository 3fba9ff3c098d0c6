"""What collecting costs beside one epoch of fine-tuning, on the same network and images.

The statistics of each criterion over the calibration images of a recipe, as `seprune collect` takes
them, against plain training steps (forward, backward, SGD; no distillation, no scoring) on as many
images, taken to all training images. CPU time of the process on a CPU, wall time on a GPU.

    python benchmarks/epoch.py --checkpoint CHECKPOINT.pth --data FOLDER --threads 1
"""

from __future__ import annotations

import argparse
import copy
import sys
from collections.abc import Callable
from datetime import date
from functools import partial
from pathlib import Path
from typing import Any

import torch
from collect import hardware, seconds
from torch.nn import functional as F

from seprune.pipeline.collection import collect
from seprune.pipeline.context import Context, Runtime
from seprune.pipeline.inputs import open_both
from seprune.pipeline.settings import CutSettings
from seprune.recipe import Recipe, recipe_of
from seprune.runtime.distributed import resolve_device
from seprune.runtime.files import write_json

RESULTS = Path(__file__).parent / "results"
CRITERIA = ("gate_mean", "gate_logit", "gate_fisher", "taylor")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="seprune/se_resnet20")
    parser.add_argument("--classes", type=int, default=10)
    parser.add_argument("--checkpoint", type=Path, required=True)
    parser.add_argument("--data", required=True)
    parser.add_argument("--images", type=int, default=2048)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--out", default="epoch.json")
    arguments = parser.parse_args()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    device = resolve_device(arguments.device)
    plain = recipe(arguments, "gate_logit")
    context = Context(*open_both(plain), Runtime(device))
    rows = []
    collect(context, CutSettings.of(plain))  # the first one pays for what the process does once
    for name in CRITERIA:
        own = CutSettings.of(recipe(arguments, name))
        taken = seconds(partial(collect, context, own), device)
        rows.append({"criterion": name, "gradients": own.gradients, "seconds": round(taken, 2)})
    step = seconds(training(context, arguments, device), device) / arguments.images
    images = context.images().info.training
    epoch = step * images
    for row in rows:
        row["of_an_epoch"] = round(row["seconds"] / epoch, 4)
        row["image_beside_a_training_image"] = round(row["seconds"] / arguments.images / step, 3)
    result = {
        "command": " ".join(["python", "benchmarks/epoch.py", *shown(arguments)]),
        "date": date.today().isoformat(),
        "hardware": hardware(device),
        "torch": torch.__version__,
        "clock": "wall" if device.type == "cuda" else "CPU time of the process",
        "calibration_images": arguments.images,
        "training_images": images,
        "epoch_seconds": round(epoch, 1),
        "rows": rows,
    }
    write_json(RESULTS / arguments.out, result)
    print(*rows, result["epoch_seconds"], sep="\n")


def shown(arguments: argparse.Namespace) -> list[str]:
    names = {str(arguments.checkpoint): arguments.checkpoint.name}
    names[arguments.data] = Path(arguments.data).name  # folders of this machine say nothing
    return [names.get(word, word) for word in sys.argv[1:]]


def recipe(arguments: argparse.Namespace, criterion: str) -> Recipe:
    values: dict[str, Any] = {
        "name": "epoch",
        "device": arguments.device,
        "model": {"name": arguments.model, "classes": arguments.classes,
                  "checkpoint": str(arguments.checkpoint)},
        "data": {"source": arguments.data},
        "collect": {"images": arguments.images},
        "importance": {"criterion": criterion},
    }  # fmt: skip
    return recipe_of(values)


def training(
    context: Context, arguments: argparse.Namespace, device: torch.device
) -> Callable[[], None]:
    """Training steps on as many images as are collected from."""
    model = copy.deepcopy(context.network.model).to(device).train()
    optimizer = torch.optim.SGD(model.parameters(), 0.01, momentum=0.9, weight_decay=5e-4)
    loader = context.images().calibration(arguments.images, seed=0).on(device)

    def work() -> None:
        for images, labels in loader:
            optimizer.zero_grad()
            F.cross_entropy(model(images), labels).backward()
            optimizer.step()

    return work


if __name__ == "__main__":
    main()
