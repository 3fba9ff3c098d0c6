"""What a model is worth on labelled images, and its BatchNorm statistics measured afresh."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.data import DataLoader, DistributedSampler

from seprune.data import Loader
from seprune.errors import EnvironmentFault, InputError
from seprune.processes import join, out_of_memory, resolve_device, sum_over_processes
from seprune.progress import Track, silent

Batches = Iterable[Any]  # of (images, labels, ...)


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
        for images, labels in track(part, label="evaluating", total=_length(part), unit="batches"):
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


def recalibrate(
    model: nn.Module, loader: Batches, *, device: str = "auto", track: Track = silent
) -> nn.Module:
    """A copy of `model` whose BatchNorm statistics are the mean over the batches of `loader`.

    Batches count by their images; the variance is the mean of the unbiased variances within
    batches. All other layers run in eval mode.

    Raises:
        InputError: an empty loader, or statistics that are not finite; names the layer.
    """
    place = resolve_device(device)
    rank, world = join(place)
    fresh = copy.deepcopy(model)
    norms = {n: m for n, m in fresh.named_modules() if _measures(m)}
    if not norms:
        return fresh
    momenta = {name: norm.momentum for name, norm in norms.items()}
    seen = 0
    with evaluating(fresh, place), torch.no_grad():
        for norm in norms.values():
            norm.reset_running_stats()
            norm.train()
        part = share(loader, place, rank, world)
        for images, _ in track(
            part, label="recalibrating BatchNorm", total=_length(part), unit="batches"
        ):
            seen += len(images)
            for norm in norms.values():
                norm.momentum = len(images) / seen
            fresh(images)
        count = _pool(norms, seen, place) if world > 1 else seen
    if count == 0:
        raise InputError(
            "BatchNorm cannot be recalibrated without images",
            why="the loader is empty",
            fix="give a loader that has batches",
        )
    for name, norm in norms.items():
        norm.momentum = momenta[name]
        _require_finite(name, norm)
    return fresh


def _measures(module: nn.Module) -> bool:
    return isinstance(module, _BatchNorm) and module.track_running_stats


def _pool(norms: dict[str, Any], seen: int, device: torch.device) -> float:
    """Average the statistics over the processes, each by its images; returns all images."""
    total = sum_over_processes(torch.tensor(float(seen), dtype=torch.float64, device=device))
    for norm in norms.values():
        for value in (norm.running_mean, norm.running_var):
            value.copy_(sum_over_processes(value.double() * seen) / total)
    return float(total)


def _require_finite(name: str, norm: Any) -> None:
    if not (norm.running_mean.isfinite().all() and norm.running_var.isfinite().all()):
        raise InputError(
            f"{name}: recalibrated BatchNorm statistics are not finite",
            why="a weight before it or an image holds NaN or infinity, or a batch holds one value",
            fix="check the checkpoint and the calibration images",
        )


def share(
    loader: Batches, device: torch.device, rank: int, world: int, *, training: bool = False
) -> Loader | Placed:
    """This process's part of `loader`, on `device`.

    `training`: batches too small for every process to get a part are left out.
    """
    if isinstance(loader, Loader):
        return loader.on(device, rank, world)
    whole = isinstance(loader, DataLoader) and not isinstance(loader.sampler, DistributedSampler)
    return Placed(loader, device, *((rank, world) if whole else (0, 1)), training=training)


class Placed:
    """Somebody else's loader, each batch shared among the processes. Iterates as `Loader` does."""

    def __init__(
        self, loader: Batches, device: torch.device, rank: int, world: int, *, training: bool
    ):
        self.loader, self.device, self.rank, self.world = loader, device, rank, world
        self.least = world if training else 1
        self.batch_size = 0  # of the batch last given, over all processes

    def set_epoch(self, epoch: int, first: int = 0) -> None:
        """Pass the epoch on to a distributed sampler, and draw anew from the loader's generator."""
        sampler: Any = getattr(self.loader, "sampler", None)
        if hasattr(sampler, "set_epoch"):
            sampler.set_epoch(epoch)
        if getattr(self.loader, "generator", None) is not None:
            self.loader.generator.manual_seed(torch.initial_seed())  # type: ignore[attr-defined]

    def __len__(self) -> int:
        return _length(self.loader)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for batch in self.loader:
            images, labels = (t[self.rank :: self.world] for t in (batch[0], batch[1]))
            self.batch_size = len(batch[0])
            if self.batch_size >= self.least and len(images):
                yield (
                    images.to(self.device, non_blocking=True),
                    labels.to(self.device, non_blocking=True),
                )


def _length(loader: Any) -> int:
    return len(loader) if hasattr(loader, "__len__") else 0


@contextmanager
def evaluating(model: nn.Module, device: torch.device) -> Iterator[None]:
    """`model` in eval mode on `device`; afterwards modes and device are as before."""
    modes = {module: module.training for module in model.modules()}
    home = device_of(model)
    try:
        model.to(device).eval()
        yield
    except RuntimeError as error:
        if not out_of_memory(error):
            raise
        raise EnvironmentFault(
            f"out of memory on {device}",
            why=str(error).splitlines()[0],
            fix="choose a smaller data.batch_size, a smaller input, or another device",
        ) from error
    finally:
        model.to(home)
        for module, mode in modes.items():
            module.training = mode


def device_of(model: nn.Module) -> torch.device:
    """Where the model's parameters are; CPU if it has none."""
    return next((p.device for p in model.parameters()), torch.device("cpu"))


def autocast(device: torch.device, precision: str) -> Any:
    """The autocast context of `precision`: `no`, `bf16` or `fp16`."""
    dtype = torch.float16 if precision == "fp16" else torch.bfloat16
    return torch.autocast(device.type, dtype=dtype, enabled=precision != "no")


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
