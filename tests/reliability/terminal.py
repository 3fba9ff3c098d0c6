"""The real command line as a user meets it: one command after the other, each with its limits."""

from __future__ import annotations

import json
import re
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from warm import Warm


@dataclass(frozen=True)
class Ended:
    """How a command ended: exit status (negative: the signal that killed it), what it wrote."""

    status: int
    out: str
    err: str

    @property
    def error(self) -> dict[str, str]:
        """The error of a command that was given --json."""
        return json.loads(self.out)["error"]

    def refused(self, status: int, code: str, *, says: str = "") -> dict[str, str]:
        """Demand an error in three parts, at width 80 and without colour, and nothing else."""
        assert self.status == status, (self.status, self.out[-800:], self.err[-2000:])
        for word in ("Traceback", "\x1b", "weights_only"):
            assert word not in self.err
        assert re.search(r"^error: \S", self.err, re.MULTILINE), self.err
        for part in ("why", "next"):
            assert re.search(rf"^ {part}: \S", self.err, re.MULTILINE), self.err
        error = self.error
        assert error["code"] == code
        assert all(error[part] for part in ("what", "why", "next"))
        for line in "\n".join([error["what"], error["why"], error["next"]]).splitlines():
            assert line in self.err
        assert says in f"{error['what']}\n{error['why']}\n{error['next']}", error
        return error


@dataclass(frozen=True)
class Terminal:
    """Runs commands: `terminal("inspect", MODEL, ...)` gives how it ended."""

    warm: Warm

    def __call__(self, *words: object, **first: Any) -> Ended:
        """Run `seprune WORDS`, after what `forks.FIRST` has under the names in `first`."""
        first = {"cwd": "/", "seconds": 20, "memory": 1024, **first}
        with tempfile.TemporaryDirectory() as folder:
            out, err = Path(folder, "out"), Path(folder, "err")
            done = self.warm.run(out, *words, err=err, **first)
            return Ended(done.status, done.output, err.read_text(errors="replace"))
