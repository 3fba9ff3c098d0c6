"""Forward passes that wait, so that a whole network is refitted in one pass over the images."""

from __future__ import annotations

import copy
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from seprune.errors import EnvironmentFault
from seprune.graph.hooks import tapped
from seprune.graph.tap_points import Tap
from seprune.recovery.refit.sampling import Reader, Sampling
from seprune.recovery.refit.targets import Target
from seprune.runtime.distributed import join, sum_over_processes
from seprune.runtime.inference import device_of
from seprune.runtime.interrupts import unbroken
from seprune.statistics.calibration_inputs import CalibrationInputs

BLOCK = 128  # images per forward, and what processes share
Take = Callable[[Tensor], Tensor]
Run = Callable[[nn.Module, Any], Any]
_TABLES = (dict, OrderedDict)


class _Stopped(BaseException):
    """Ends a forward that nobody needs any more; no `except Exception` on its way catches it."""


class Reads:
    """What a forward has shown, by name."""

    def __init__(self) -> None:
        self.seen: dict[str, Tensor] = {}

    def take(self, name: str) -> Tensor:
        """The tensor called `name`.

        Raises:
            ArithmeticError: it never came.
        """
        if name not in self.seen:
            raise ArithmeticError(f"the forward ended before it came to {name}")
        return self.seen[name]

    def forget(self, names: Iterable[str]) -> None:
        """Give back the memory of what will not be asked for again."""
        for name in names:
            self.seen.pop(name, None)


class Forward(Reads):
    """One batch on its way through one model, in a thread that runs only inside `take`.

    Args:
        reads: name -> (where to look, what to take from there); a tensor that is taken as it flows
            is valid until the forward goes on.
    """

    def __init__(
        self, run: Run, model: nn.Module, images: Any, reads: Mapping[str, tuple[Tap, Take]]
    ) -> None:
        super().__init__()
        self.run, self.model, self.images = run, twin(model), images
        self.taps = [(tap, partial(self._see, name, take)) for name, (tap, take) in reads.items()]
        self.fault: BaseException | None = None
        self.stopping = self.ended = False
        self.go, self.paused = threading.Semaphore(0), threading.Semaphore(0)
        self.thread = threading.Thread(target=self._run, daemon=True)
        try:
            self.thread.start()
        except RuntimeError as error:
            raise EnvironmentFault(
                "no thread can be started for one more forward pass",
                why=f"{error}: this process may have no more threads, or no more address space",
                fix="raise the limits (ulimit -u, ulimit -v), or refit on fewer images: "
                "collect.images=512",
            ) from error

    def take(self, name: str) -> Tensor:
        """Run on until the tensor called `name` has been seen.

        Raises:
            ArithmeticError: it never came.
        """
        while name not in self.seen and not self.ended:
            with unbroken():  # a signal between the two would leave a lock taken for good
                self.go.release()
                self.paused.acquire()
            if self.fault is not None:
                raise self.fault
        return super().take(name)

    def stop(self) -> None:
        """End the thread wherever it is."""
        self.stopping = True
        with unbroken():
            self.go.release()
            self.thread.join()

    def _run(self) -> None:
        self.go.acquire()
        try:
            if not self.stopping:
                with torch.no_grad(), tapped(self.model, self.taps):
                    self.run(self.model, self.images)
        except _Stopped:
            pass
        except BaseException as error:  # raised again in the thread that waits for this one
            self.fault = error
        finally:
            del self.model, self.images
            self.ended = True
            self.paused.release()

    def _see(self, name: str, take: Take, tensor: Tensor) -> None:
        self.seen[name] = take(tensor)
        del tensor
        self.paused.release()
        self.go.acquire()
        if self.stopping:
            raise _Stopped


class WholeForward(Reads):
    """One batch through one model, at once; for reads that are small enough to be kept."""

    def __init__(
        self, run: Run, model: nn.Module, images: Any, reads: Mapping[str, tuple[Tap, Take]]
    ) -> None:
        super().__init__()
        taps = [(tap, partial(self._see, name, take)) for name, (tap, take) in reads.items()]
        with torch.no_grad(), tapped(model, taps):
            run(model, images)

    def stop(self) -> None:
        """Nothing is under way."""

    def _see(self, name: str, take: Take, tensor: Tensor) -> None:
        if name not in self.seen:
            self.seen[name] = take(tensor)


def twin(model: nn.Module) -> nn.Module:
    """Another module tree around the same tensors: hooks of its own, weights in common."""
    memo: dict[int, Any] = {id(t): t for t in (*model.parameters(), *model.buffers())}
    modules = list(model.modules())
    if any(hasattr(type(module), "__deepcopy__") for module in modules):
        return copy.deepcopy(model, memo)
    # what deepcopy does, but for its slow way with the dozen empty hook tables of every module
    memo |= {id(module): object.__new__(type(module)) for module in modules}
    for module in modules:
        own = {key: _copied(value, memo) for key, value in vars(module).items()}
        vars(memo[id(module)]).update(own)
    made: nn.Module = memo[id(model)]
    return made


def _copied(value: Any, memo: dict[int, Any]) -> Any:
    empty = isinstance(value, dict) and not value
    return type(value)() if empty and type(value) in _TABLES else copy.deepcopy(value, memo)


def _as_it_flows(tensor: Tensor) -> Tensor:
    return tensor


Pair = tuple[Forward | WholeForward, Forward]


class Forwards:
    """The forwards of both networks, batch by batch, as far as they have come.

    Of several processes each has its share of the images, the first process the first of them, in
    blocks of `BLOCK`. Fewer blocks than processes are not shared: then each process has them all.

    Args:
        batch: images per forward, at most `BLOCK`.
        at_once: there is memory for what is read of the parent in all layers, so that its forwards
            need not wait.
    """

    def __init__(
        self,
        teacher: nn.Module,
        model: nn.Module,
        images: CalibrationInputs,
        targets: Sequence[Target],
        *,
        batch: int,
        at_once: bool,
    ) -> None:
        self.at_once = at_once
        self.teacher, self.model, self.targets = teacher, model, targets
        self.images, self.batch = images, batch
        self.rank, world = join(device_of(model))
        blocks = -(-len(images) // BLOCK)
        self.shared = 1 < world <= blocks
        self.world = world if self.shared else 1
        self.waiting: list[Pair] = []
        self.parents: list[WholeForward] = []  # of every batch so far, if they run at once

    def __enter__(self) -> Forwards:
        return self

    def __exit__(self, *_: Any) -> None:
        self.stop()

    def parts(self) -> list[tuple[int, int]]:
        """First and last number, plus one, of this process's batches."""
        count = len(self.images)
        blocks = range(0, count, BLOCK)[self.rank % self.world :: self.world]
        return [
            (start, min(start + self.batch, block + BLOCK, count))
            for block in blocks
            for start in range(block, min(block + BLOCK, count), self.batch)
        ]

    def sampling(self, target: Target) -> Sampling:
        """Which positions enter a layer's regression."""
        return Sampling(len(self.images), target.rows)

    @property
    def own(self) -> int:
        """How many images are this process's."""
        return sum(stop - start for start, stop in self.parts())

    def smallest(self, number: int | None) -> int | None:
        """The smallest number that any process gives; every process has to call it."""
        if not self.shared:
            return number
        given = torch.zeros(self.world, dtype=torch.int64, device=device_of(self.model))
        given[self.rank] = 0 if number is None else number + 1
        known = [n - 1 for n in sum_over_processes(given).tolist() if n]
        return min(known, default=None)

    def halve(self) -> bool:
        """Take smaller batches from now on; False if they cannot be smaller."""
        self.stop()
        self.parents.clear()
        self.batch, before = max(1, self.batch // 2), self.batch
        return self.batch < before

    def at(
        self, target: Target, *, wait: bool
    ) -> Iterator[tuple[tuple[int, int], dict[str, Tensor], Tensor]]:
        """For every batch the numbers of its images, what the parent shows, the layer's input.

        Without `wait` all forwards start anew and end when they have been here.
        """
        for number, part in enumerate(self.parts()):
            if not wait:
                self.stop()
            if not wait or number == len(self.waiting):
                later = self.targets[self.targets.index(target) :]
                self.waiting.append(self.start(number, part, later if wait else [target]))
            yield part, *self.show(target, *self.waiting[-1 if not wait else number])
        if not wait:
            self.stop()

    def show(
        self, target: Target, dense: Forward | WholeForward, cut: Forward
    ) -> tuple[dict[str, Tensor], Tensor]:
        """Run both forwards of a batch up to the layer."""
        name = target.layer
        x = cut.take(f"{name}:x")
        wanted = {"y": True, "branch": target.branch, "other": target.other}
        seen = {part: dense.take(f"{name}:{part}") for part, tap in wanted.items() if tap}
        if target.other is not None:
            seen["gap"] = seen["other"] - cut.take(f"{name}:other")
        return seen, x

    def start(self, number: int, part: tuple[int, int], targets: Sequence[Target]) -> Pair:
        """The forwards of a batch through both networks, that of the cut one not yet under way."""
        dense = self.parent(number, part, targets)  # first: where it fails, no thread is left
        reads: dict[str, tuple[Tap, Take]] = {}
        for t in targets:
            reads[f"{t.layer}:x"] = Tap(t.layer, 0, "input", 0), _as_it_flows
            if t.other is not None:
                reads[f"{t.layer}:other"] = t.other, replace(self.reader(part, t), keep=None)
        return dense, Forward(self.images.forward, self.model, self.batch_of(part), reads)

    def parent(
        self, number: int, part: tuple[int, int], targets: Sequence[Target]
    ) -> Forward | WholeForward:
        """A batch's forward through the parent: done, or not yet under way."""
        run, model = self.images.forward, self.teacher
        if not self.at_once:
            return Forward(run, model, self.batch_of(part), self.reads_of_parent(part, targets))
        if number == len(self.parents):
            reads = self.reads_of_parent(part, self.targets)
            self.parents.append(WholeForward(run, model, self.batch_of(part), reads))
        return self.parents[number]

    def reads_of_parent(
        self, part: tuple[int, int], targets: Sequence[Target]
    ) -> dict[str, tuple[Tap, Take]]:
        """What is taken from a batch's forward through the parent."""
        reads: dict[str, tuple[Tap, Take]] = {}
        for t in targets:
            taps = {"y": Tap(t.layer, 0, "output", 0), "branch": t.branch, "other": t.other}
            read = self.reader(part, t)
            reads |= {f"{t.layer}:{name}": (tap, read) for name, tap in taps.items() if tap}
        return reads

    def reader(self, part: tuple[int, int], target: Target) -> Reader:
        """Takes a layer's rows out of a batch."""
        start, stop = part
        return Reader(self.sampling(target), start, stop - start, target.dim, target.keep)

    def batch_of(self, part: tuple[int, int]) -> Any:
        """The images of a batch, on the device."""
        return self.images.part(*part, device_of(self.model))

    def forget(self, target: Target) -> None:
        """Give back what the layer needed."""
        names = [f"{target.layer}:{name}" for name in ("x", "y", "branch", "other")]
        pairs = (forward for pair in self.waiting for forward in pair)
        for forward in (*pairs, *self.parents):
            forward.forget(names)

    def stop(self) -> None:
        """End all forwards."""
        while self.waiting:
            for forward in self.waiting.pop():
                forward.stop()
