"""Both networks' forwards over all batches, so that a whole network is refitted in one pass."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor, nn

from seprune.graph.tap_points import Tap
from seprune.recovery.refit.paused_forwards import Forward, Take, WholeForward
from seprune.recovery.refit.sampling import Reader, Sampling
from seprune.recovery.refit.targets import Target
from seprune.runtime.distributed import join, sum_over_processes
from seprune.runtime.memory import Ceiling
from seprune.statistics.calibration_inputs import CalibrationInputs

BLOCK = 128  # images per forward at most, and what processes share
Part = tuple[int, int]  # first and last number, plus one, of a batch


@dataclass
class RefitBatches:
    """The images of this process, batch by batch.

    Of several processes each has its share, the first process the first of them, in blocks of
    `BLOCK`. Fewer blocks than processes are not shared: then each process has them all.

    Attributes:
        size: images per forward, at most `BLOCK`.
    """

    images: CalibrationInputs
    device: torch.device
    size: int

    @cached_property
    def shared(self) -> bool:
        """Whether other processes have other images."""
        return 1 < join(self.device)[1] <= -(-len(self.images) // BLOCK)

    def parts(self) -> list[Part]:
        """The batches of this process."""
        (rank, world), count = join(self.device) if self.shared else (0, 1), len(self.images)
        return [
            (start, min(start + self.size, block + BLOCK, count))
            for block in range(0, count, BLOCK)[rank::world]
            for start in range(block, min(block + BLOCK, count), self.size)
        ]

    @property
    def own(self) -> int:
        """How many images are this process's."""
        return sum(stop - start for start, stop in self.parts())

    def smallest(self, number: int | None) -> int | None:
        """The smallest number that any process gives; every process has to call it."""
        if not self.shared:
            return number
        rank, world = join(self.device)
        given = torch.zeros(world, dtype=torch.int64, device=self.device)
        given[rank] = 0 if number is None else number + 1
        known = [n - 1 for n in sum_over_processes(given).tolist() if n]
        return min(known, default=None)

    def reader(self, part: Part, target: Target, keep: Tensor | None) -> Reader:
        """Takes a layer's rows out of a batch."""
        start, stop = part
        return Reader(self.sampling(target), start, stop - start, target.dim, keep)

    def sampling(self, target: Target) -> Sampling:
        """Which positions enter a layer's regression."""
        return Sampling(len(self.images), target.rows)


@dataclass
class ParentForwards:
    """The parent's side, for one refit or for several on the same images.

    Attributes:
        targets: of all refits, each layer once.
        at_once: there is memory for what is read in all layers, so that forwards need not wait.
        several: refits; what the first one reads, in all channels, is kept for the others.
    """

    model: nn.Module
    batches: RefitBatches
    targets: Sequence[Target]
    at_once: bool
    several: bool = False
    done: dict[Part, WholeForward] = field(default_factory=dict)

    def of(self, part: Part, targets: Sequence[Target]) -> Forward | WholeForward:
        """A batch's forward: done, or not yet under way."""
        run, images = self.batches.images.forward, self.batches.images
        if not self.at_once:
            batch = images.part(*part, self.batches.device)
            return Forward(run, self.model, batch, self.reads(part, targets))
        if part not in self.done:
            batch = images.part(*part, self.batches.device)
            self.done[part] = WholeForward(run, self.model, batch, self.reads(part, self.targets))
        return self.done[part]

    def reads(self, part: Part, targets: Sequence[Target]) -> dict[str, tuple[Tap, Take]]:
        """What is taken from a batch."""
        reads: dict[str, tuple[Tap, Take]] = {}
        for t in targets:
            read = self.batches.reader(part, t, None if self.several else t.keep)
            reads |= {f"{t.layer}:{name}": (tap, read) for name, tap in t.shown.items()}
        return reads

    def show(self, forward: Forward | WholeForward, target: Target) -> dict[str, Tensor]:
        """What a layer's target is made of, at the kept channels."""
        seen = {name: forward.take(f"{target.layer}:{name}") for name in target.shown}
        if not self.several or target.keep is None:
            return seen
        return {name: t.index_select(0, target.keep.to(t.device)) for name, t in seen.items()}

    def forget(self, target: Target) -> None:
        """Give back what a layer needed, unless others need it."""
        for forward in () if self.several else self.done.values():
            forward.forget(f"{target.layer}:{name}" for name in target.shown)


class Forwards:
    """The forwards of both networks, as far as they have come."""

    def __init__(
        self,
        parent: ParentForwards,
        model: nn.Module,
        targets: Sequence[Target],
        ceiling: Ceiling,
    ) -> None:
        self.parent, self.model, self.targets = parent, model, targets
        self.ceiling = ceiling
        self.batches = parent.batches
        self.waiting: list[tuple[Forward | WholeForward, Forward]] = []

    def __enter__(self) -> Forwards:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def halve(self) -> bool:
        """Take smaller batches from now on; False if they cannot be smaller."""
        self.stop()
        self.parent.done.clear()
        before = self.batches.size
        self.batches.size = max(1, before // 2)
        return self.batches.size < before

    def at(self, target: Target, *, wait: bool) -> Iterator[tuple[Part, dict[str, Tensor], Tensor]]:
        """For every batch the numbers of its images, what the parent shows, the layer's input.

        Without `wait` all forwards start anew and end when they have been here.
        """
        for number, part in enumerate(self.batches.parts()):
            if not wait:
                self.stop()
            if not wait or number == len(self.waiting):
                later = self.targets[self.targets.index(target) :]
                self.waiting.append(self.start(part, later if wait else [target]))
            yield part, *self.show(target, *self.waiting[-1 if not wait else number])
            self.ceiling.keep()
        if not wait:
            self.stop()

    def show(
        self, target: Target, dense: Forward | WholeForward, cut: Forward
    ) -> tuple[dict[str, Tensor], Tensor]:
        """Run both forwards of a batch up to the layer."""
        x = cut.take(f"{target.layer}:x")
        seen = self.parent.show(dense, target)
        if target.other is not None:
            seen["gap"] = seen["other"] - cut.take(f"{target.layer}:other")
        return seen, x

    def start(
        self, part: Part, targets: Sequence[Target]
    ) -> tuple[Forward | WholeForward, Forward]:
        """The forwards of a batch through both networks, that of the cut one not yet under way."""
        dense = self.parent.of(part, targets)  # first: where it fails, no thread is left
        reads: dict[str, tuple[Tap, Take]] = {}
        for t in targets:
            reads[f"{t.layer}:x"] = Tap(t.layer, 0, "input", 0), _as_it_flows
            if t.other is not None:
                reads[f"{t.layer}:other"] = t.other, self.batches.reader(part, t, None)
        images = self.batches.images
        batch = images.part(*part, self.batches.device)
        return dense, Forward(images.forward, self.model, batch, reads)

    def forget(self, target: Target) -> None:
        """Give back what the layer needed."""
        names = [f"{target.layer}:{name}" for name in ("x", "y", "branch", "other")]
        for pair in self.waiting:
            for forward in pair:
                if not isinstance(forward, WholeForward):
                    forward.forget(names)
        self.parent.forget(target)

    def stop(self) -> None:
        """End all forwards."""
        while self.waiting:
            for forward in self.waiting.pop():
                forward.stop()


def _as_it_flows(tensor: Tensor) -> Tensor:
    return tensor
