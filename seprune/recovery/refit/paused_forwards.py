"""A batch on its way through a network: in a thread that waits at each layer, or at once."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from seprune.errors import EnvironmentFault
from seprune.graph.hooks import tapped
from seprune.graph.tap_points import Tap
from seprune.runtime.interrupts import unbroken
from seprune.runtime.module_copy import share_tensors

Take = Callable[[Tensor], Tensor]
Run = Callable[[nn.Module, Any], Any]


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
        self.run, self.model, self.images = run, share_tensors(model), images
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
