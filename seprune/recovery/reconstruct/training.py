"""The epochs of a reconstruction; every step is the same on one process and on several."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from seprune.data.augment import Augment, crop_and_flip, draw, generator
from seprune.errors import UsageError
from seprune.graph.trace import record
from seprune.measure.activations import saved_bytes
from seprune.recovery.finetune.loss import decay_groups, rate
from seprune.recovery.reconstruct.matching import Matching
from seprune.recovery.reconstruct.options import ReconstructOptions
from seprune.recovery.reconstruct.state import State, weights_of
from seprune.runtime.distributed import join, sum_over_processes
from seprune.runtime.inference import device_of
from seprune.runtime.memory import memory_budget
from seprune.statistics.calibration_inputs import CalibrationInputs

_HELD_OUT = 8  # one image of so many judges
_DECAY = 1e-4
_SCALES_FROM = 512  # images that the variances are taken from


class Training:
    """Trains the pruned network of `matching`, and keeps the weights that were best."""

    def __init__(
        self, matching: Matching, images: CalibrationInputs, options: ReconstructOptions
    ) -> None:
        self.matching, self.images, self.options = matching, images, options
        self.model, self.device = matching.pruned, device_of(matching.parent)
        self.rank, self.world = join(self.device)
        order = torch.randperm(len(images), generator=generator(options.seed))
        count = max(1, len(images) // _HELD_OUT)
        self.judging, self.learning = order[:count], order[count:]
        self.steps = -(-len(self.learning) // options.batch_size)
        self.optimizer = torch.optim.AdamW(decay_groups(self.model, _DECAY), lr=options.lr)
        self.part = _part_size(matching, images, options)
        self.at, self.best = State(), weights_of(self.model)

    def start(self) -> None:
        """Measure the variances."""
        rows = self.learning[:_SCALES_FROM]
        self.matching.measure(images for images, _ in self.parts(rows))

    def first_error(self) -> None:
        """Judge the network given."""
        error, layers = self.judge()
        self.at.errors, self.at.before, self.at.after = [error], layers, layers

    def epoch(self) -> None:
        """One pass over the images; its weights are chosen if none were better."""
        number = self.at.epoch + 1
        order = torch.randperm(len(self.learning), generator=generator(self.options.seed, number))
        for step, rows in enumerate(torch.split(self.learning[order], self.options.batch_size)):
            self.step(rows, number, step)
        error, layers = self.judge()
        self.at.epoch = number
        if error < self.at.errors[self.at.best]:
            self.at.best, self.at.after, self.best = number, layers, weights_of(self.model)
        self.at.errors.append(error)

    def step(self, rows: Tensor, epoch: int, step: int) -> None:
        """One step of the optimizer on the images of these numbers."""
        total = self.options.epochs * self.steps
        factor = rate((epoch - 1) * self.steps + step, steps=total, warmup=0, schedule="onecycle")
        for group in self.optimizer.param_groups:
            group["lr"] = self.options.lr * factor
        self.optimizer.zero_grad(set_to_none=True)
        for images, own in self.parts(rows):
            images = self.augmented(images, own, len(rows), key=(epoch, step))
            gap = self.matching(images)
            (gap.loss(self.options.layers) * (len(own) / len(rows))).backward()  # type: ignore[no-untyped-call]
        for parameter in self.model.parameters():
            if self.world > 1 and parameter.requires_grad:
                own_part = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
                parameter.grad = sum_over_processes(own_part)
        self.optimizer.step()

    def judge(self) -> tuple[float, list[float]]:
        """Errors on the held-out images: of the outputs, and of each layer."""
        sums: Tensor | None = None
        for images, own in self.parts(self.judging):
            with torch.no_grad():
                gap = self.matching(images)
            new = torch.stack([gap.outputs, *gap.layers]).double() * len(own)
            sums = new if sums is None else sums + new
        if sums is None:  # more processes than images
            sums = torch.zeros(1 + len(self.matching.targets), dtype=torch.float64)
        found = (sum_over_processes(sums.to(self.device)) / len(self.judging)).tolist()
        return (found[0] if math.isfinite(found[0]) else math.inf), found[1:]

    def live(self) -> str:
        """The error of the network given and the smallest one so far."""
        return f"error {self.at.errors[0]:.4f} -> {self.at.errors[self.at.best]:.4f}"

    def parts(self, rows: Tensor) -> Iterator[tuple[Any, Tensor]]:
        """This process's images of `rows`, as many at a time as fit, and their places in it."""
        places = torch.arange(len(rows))[self.rank :: self.world]
        for own in torch.split(places, self.part) if len(places) else ():
            yield self.images.rows(rows[own].tolist(), self.device), own

    def augmented(self, images: Any, own: Tensor, count: int, *, key: tuple[int, int]) -> Any:
        """Images shifted and mirrored, each by draws of its own; other inputs stay as they are."""
        if not isinstance(images, Tensor) or images.dim() != 4:
            return images
        height, width = images.shape[-2:]
        pad = round(self.options.shift * max(height, width))
        augment = Augment(pad=pad, flip=self.options.flip)
        draws = draw(augment, count, (height, width), key=(self.options.seed, *key))
        return crop_and_flip(images, draws.take(own).to(images.device), pad=pad).contiguous()


def _part_size(matching: Matching, images: CalibrationInputs, options: ReconstructOptions) -> int:
    """Images of one forward and backward pass.

    Raises:
        UsageError: not even one fits.
    """
    device = device_of(matching.parent)
    need = 2 * saved_bytes(record(matching.parent, images.example(matching.parent)))
    budget = memory_budget(device, options.memory)
    if need > budget:
        raise UsageError(
            f"memory={budget:,} bytes is too little for one image",
            why=f"one image needs {need:,} bytes in one step of this network",
            fix=f"give memory={2 * need} or more, or memory=auto",
        )
    return max(1, min(options.batch_size, budget // 2 // max(1, need)))
