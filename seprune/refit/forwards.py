"""Forward passes that wait, so that a whole network is refitted in one pass over the images."""

from __future__ import annotations

import copy
import threading
from collections.abc import Iterable, Mapping
from functools import partial

import torch
from torch import Tensor, nn

from seprune.taps import Tap
from seprune.watch import tapped


class _Stopped(BaseException):
    """Ends a forward that nobody needs any more; no `except Exception` on its way catches it."""


class Forward:
    """One batch on its way through one model, in a thread that runs only inside `take`.

    Args:
        taps: name -> where to look.
        keep: name -> (dimension, positions) to copy, None for all; a tensor without an entry is
            handed out as it flows and is valid until the forward goes on.
    """

    def __init__(
        self,
        model: nn.Module,
        images: Tensor,
        taps: Mapping[str, Tap],
        keep: Mapping[str, tuple[int, Tensor | None]],
    ) -> None:
        self.model, self.images, self.keep = twin(model), images, keep
        self.taps = [(tap, partial(self._see, name)) for name, tap in taps.items()]
        self.seen: dict[str, Tensor] = {}
        self.fault: BaseException | None = None
        self.stopping = self.ended = False
        self.go, self.paused = threading.Semaphore(0), threading.Semaphore(0)
        self.thread = threading.Thread(target=self._run, daemon=True)
        self.thread.start()

    def take(self, name: str) -> Tensor:
        """Run on until the tensor called `name` has been seen.

        Raises:
            ArithmeticError: it never came.
        """
        while name not in self.seen:
            if self.ended:
                raise ArithmeticError(f"the forward ended before it came to {name}")
            self.go.release()
            self.paused.acquire()
            if self.fault is not None:
                raise self.fault
        return self.seen[name]

    def forget(self, names: Iterable[str]) -> None:
        """Give back the memory of what will not be asked for again."""
        for name in names:
            self.seen.pop(name, None)

    def stop(self) -> None:
        """End the thread wherever it is."""
        self.stopping = True
        self.go.release()
        self.thread.join()

    def _run(self) -> None:
        self.go.acquire()
        try:
            if not self.stopping:
                with torch.no_grad(), tapped(self.model, self.taps):
                    self.model(self.images)
        except _Stopped:
            pass
        except BaseException as error:  # raised again in the thread that waits for this one
            self.fault = error
        finally:
            del self.model, self.images
            self.ended = True
            self.paused.release()

    def _see(self, name: str, tensor: Tensor) -> None:
        if name in self.keep:  # the network may overwrite it before it is asked for
            dim, index = self.keep[name]
            index = None if index is None else index.to(tensor.device)
            tensor = tensor.clone() if index is None else tensor.index_select(dim, index)
        self.seen[name] = tensor
        del tensor
        self.paused.release()
        self.go.acquire()
        if self.stopping:
            raise _Stopped


def twin(model: nn.Module) -> nn.Module:
    """Another module tree around the same tensors: hooks of its own, weights in common."""
    memo = {id(t): t for t in (*model.parameters(), *model.buffers())}
    return copy.deepcopy(model, memo)
