"""Many short seprune processes without as many imports of torch: they are forked."""

from __future__ import annotations

import os
import signal
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from child import Child

START_SECONDS, HANG_SECONDS = 900, 1800  # of a machine that others use as well


@dataclass(frozen=True)
class Done:
    """How a process ended: its status (negative: the signal that killed it) and what it wrote."""

    status: int
    output: str


class Warm(Child):
    """Starts processes, waits for them, kills them."""

    def __init__(self) -> None:
        super().__init__("forks.py")
        self.logs: dict[int, Path] = {}

    def prepare(self, code: str) -> None:
        """Run Python once, whose imports every process that starts later has."""
        self({"run": code}, limit=START_SECONDS)

    def start(self, log: Path, *words: object, **first: Any) -> int:
        """Start one that is `seprune WORDS` and writes to `log`; its pid.

        Args:
            first: what happens in it before, by the names of `forks.FIRST`.
        """
        request = {"words": list(map(str, words)), "out": log, "err": log, **first}
        pid = self(request, limit=START_SECONDS)  # the server may still be importing
        self.logs[pid] = log
        return pid

    def wait(self, pid: int, limit: float = HANG_SECONDS) -> Done | None:
        """How it ended, or None if it still runs after `limit` seconds."""
        status = self({"wait": pid, "limit": limit}, limit=limit + 30)
        if status is None:
            return None
        log = self.logs.pop(pid)  # none where it was killed before it began
        return Done(status, log.read_text(errors="replace") if log.exists() else "")

    def run(self, log: Path, *words: object, **first: Any) -> Done:
        """Start one and wait for it; one that does not end is killed and reported."""
        pid = self.start(log, *words, **first)
        done = self.wait(pid)
        if done is None:
            raise AssertionError(f"a hang: {words} wrote {self.kill(pid, 0).output}")
        return done

    def kill(self, pid: int, after: float, signum: int = signal.SIGKILL) -> Done:
        """Let it live for `after` seconds, send the signal unless it has ended; how it ended."""
        done = self.wait(pid, after)
        if done is None:
            os.kill(pid, signum)
            done = self.wait(pid)
        assert done is not None, "a hang: it did not end after the signal"
        return done
