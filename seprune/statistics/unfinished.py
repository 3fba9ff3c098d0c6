"""The state of a collection that was interrupted: written now and then, taken up again."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor

from seprune.errors import InputError
from seprune.runtime.transaction import clear
from seprune.runtime.typed import Natural, require_like, typed
from seprune.statistics.accumulate import State
from seprune.statistics.result import require_same
from seprune.statistics.stored import read_tensors, write_tensors

_WHAT = "an unfinished collection"
KINDS = ("gates", "u", "w")


class Observing(Protocol):
    """What is saved of an observer."""

    gates: State
    u: State
    w: State
    samples: int
    batches: int


@dataclass(frozen=True)
class _UnfinishedFacts:
    """What the file says beside its tensors."""

    of: dict[str, str]
    samples: Natural
    batches: Natural


@dataclass(frozen=True)
class Unfinished:
    """One file per process; `facts` say what is collected, and all of them must agree.

    `path` is None where nothing is kept.
    """

    path: Path | None
    every: int
    facts: Mapping[str, str]

    def maybe_save(self, observer: Observing) -> None:
        """Write the state if it is time to."""
        if self.path is None or observer.batches % self.every:
            return
        facts: dict[str, Any] = {"what": _WHAT, "of": dict(self.facts)}
        facts |= {"samples": observer.samples, "batches": observer.batches}
        tensors = {f"{kind}/{k}": v for kind in KINDS for k, v in _state(observer, kind)}
        write_tensors(self.path, tensors, facts)

    def restore(self, observer: Observing) -> None:
        """Go on where the last state was written, if there is one.

        Raises:
            InputError: it is damaged, or of another model, data set, preprocessing or setting.
        """
        if self.path is None or not self.path.exists():
            return
        tensors, facts = read_tensors(self.path, what=_WHAT)
        if facts.get("what") != _WHAT:
            raise InputError(
                f"{self.path}: not {_WHAT}",
                why=f"it holds {facts.get('what')!r}",
                fix="choose another folder",
            )
        fix = f"delete {self.path} to start again, or choose another folder"
        read = typed(_UnfinishedFacts, facts, source=str(self.path), fix=fix, code="damaged")
        require_same(
            read.of,
            self.facts,
            what=f"{self.path}: these unfinished statistics",
            fix=fix,
        )
        own = {f"{kind}/{key}": value for kind in KINDS for key, value in _state(observer, kind)}
        require_like(tensors, own, source=str(self.path), fix=fix)
        for name, value in own.items():
            value.copy_(tensors[name])
        observer.samples, observer.batches = read.samples, read.batches

    def done(self) -> None:
        """The statistics are complete: no state is of use any more, nor one of fewer processes."""
        if self.path is None:
            return
        folder = self.path.parent
        for path in folder.glob("collecting-*of*.safetensors"):
            path.unlink(missing_ok=True)
        with suppress(FileNotFoundError):  # never made, or gone with another process
            clear(folder)


def _state(observer: Observing, kind: str) -> list[tuple[str, Tensor]]:
    state: State = getattr(observer, kind)
    return list(state.items())
