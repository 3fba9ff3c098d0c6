"""What a model is worth on labelled images, and its BatchNorm statistics measured afresh."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from seprune.data.placement import Batches, length, share
from seprune.errors import InputError
from seprune.runtime.distributed import join, resolve_device, sum_over_processes
from seprune.runtime.inference import autocast, evaluating
from seprune.runtime.progress import Track, silent


@dataclass(frozen=True)
class Evaluation:
    """Fractions of `count` images; `loss` is the mean cross-entropy of those with finite logits.

    An image with a NaN or an infinite logit counts as wrong and in `nonfinite`. Equal logits are
    ranked by class number.
    """

    top1: float
    top5: float
    loss: float
    count: int
    nonfinite: int


def evaluate(
    model: nn.Module,
    loader: Batches,
    *,
    device: str = "auto",
    precision: str = "no",
    track: Track = silent,
) -> Evaluation:
    """Score `model` on all images of `loader`; under `torchrun` every process has to call it.

    Args:
        loader: gives (images, labels); a `Loader` or a `DataLoader` is shared among the processes,
            anything else has to give each process its own part.
        precision: `no`, `bf16` or `fp16` autocast.

    Raises:
        InputError: no images, or labels that the model has no output for.
    """
    place = resolve_device(device)
    rank, world = join(place)
    # top1, top5, loss, count, nonfinite, labels out of range: summed on the device, read once.
    sums = torch.zeros(6, dtype=torch.float64, device=place)
    classes = 0
    with evaluating(model, place), torch.no_grad(), autocast(place, precision):
        part = share(loader, place, rank, world)
        for images, labels in track(part, label="evaluating", total=length(part), unit="batches"):
            logits = logits_of(model(images)).float()
            classes = logits.shape[1]
            sums += _sums(logits, labels)
    top1, top5, loss, count, nonfinite, strange = sum_over_processes(sums).tolist()
    if count == 0:
        raise InputError(
            "there are no images to evaluate on",
            why="the loader gave no batch",
            fix="give a loader that has batches",
        )
    if strange:
        raise InputError(
            f"{strange:.0f} of {count:.0f} labels are outside 0..{classes - 1}",
            why=f"the model has {classes} outputs",
            fix="evaluate on the data the model was trained for, or set the number of classes",
        )
    finite = count - nonfinite
    return Evaluation(
        top1=top1 / count,
        top5=top5 / count,
        loss=loss / finite if finite else float("nan"),
        count=int(count),
        nonfinite=int(nonfinite),
    )


def _sums(logits: Tensor, labels: Tensor) -> Tensor:
    classes = logits.shape[1]
    strange = (labels < 0) | (labels >= classes)
    labels = labels.clamp(0, classes - 1)
    finite = logits.isfinite().all(1)
    own = logits.gather(1, labels[:, None])
    earlier = torch.arange(classes, device=logits.device) < labels[:, None]
    place = ((logits > own) | ((logits == own) & earlier)).sum(1)
    loss = F.cross_entropy(logits, labels, reduction="none").double()
    columns = (
        (place < 1) & finite,
        (place < 5) & finite,
        loss.where(finite, loss.new_zeros(())),
        torch.ones_like(finite),
        ~finite,
        strange,
    )
    return torch.stack([column.double().sum() for column in columns])


def logits_of(output: Any) -> Tensor:
    """The class logits (B, C) in a model's output; auxiliary outputs are left aside."""
    if isinstance(output, tuple):
        output = output[0]
    if not isinstance(output, Tensor) or output.ndim != 2:
        shape = tuple(output.shape) if isinstance(output, Tensor) else type(output).__name__
        raise InputError(
            f"the model's output is no table of class logits (images, classes), but {shape}",
            why="classes are scored by one number each",
            fix="wrap the model so that it returns a tensor (B, C)",
        )
    return output
