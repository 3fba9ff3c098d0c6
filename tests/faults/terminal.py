"""The real command line in real processes, quickly: one server that has imported everything forks.

`python terminal.py` reads one JSON request a line and forks a child for each: the child has its own
limits of memory and processor time, and ends as `seprune` would.
"""

from __future__ import annotations

import ctypes
import hashlib
import importlib
import json
import os
import pkgutil
import re
import resource
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
CAPABILITIES_3 = 0x20080522  # the version of Linux's structure
WALL_SECONDS = 120


@dataclass(frozen=True)
class Ended:
    """How a command ended: exit status (negative: the signal that killed it), what it said."""

    status: int
    out: str
    err: str
    peak_mib: float

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


class Terminal:
    """Starts commands: `terminal("inspect", MODEL, ...)` gives how it ended."""

    def __init__(self) -> None:
        environment = {**os.environ, "COLUMNS": "80", "NO_COLOR": "1", "OMP_NUM_THREADS": "1"}
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        command = [sys.executable, str(Path(__file__)), str(ROOT)]
        self.process = subprocess.Popen(command, text=True, bufsize=1, env=environment, **pipes)

    def __call__(self, *words: object, **limits: Any) -> Ended:
        """Run `seprune WORDS`.

        Args:
            limits: `cwd`, `env`, `memory` (MiB more than Python and torch take), `seconds` (of
                processor time), `ordinary` (permissions hold for root too), `before` (Python that
                runs first: injects a fault).
        """
        request = {"words": list(map(str, words)), **limits}
        self.process.stdin.write(json.dumps(request, default=str) + "\n")
        line = self.process.stdout.readline()
        assert line, f"the server died with status {self.process.wait()}"
        return Ended(**json.loads(line))

    def close(self) -> None:
        self.process.kill()
        self.process.wait()


def tree(folder: Path) -> dict[str, tuple[str, int]]:
    """Digest and modification time of every file below `folder`."""
    found = {}
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        found[str(path.relative_to(folder))] = digest, path.stat().st_mtime_ns
    return found


@contextmanager
def untouched(folder: Path) -> Iterator[None]:
    """What is below `folder` stays byte for byte as it is."""
    before = tree(folder)
    yield
    assert tree(folder) == before


def stages(run: Path) -> list[str]:
    """The stages that the journal of a run folder says are finished; `start` is none."""
    journal = run / "journal.jsonl"
    lines = journal.read_text().splitlines() if journal.exists() else []
    return [name for line in lines if (name := json.loads(line)["stage"]) != "start"]


# -- the server ------------------------------------------------------------------------------------


def serve() -> None:
    """Import what commands import, then fork for every request."""
    import torch

    import seprune.cli
    import seprune.recipe
    from seprune.pipeline.subject import open_both

    torch.set_num_threads(1)
    # what is imported late is imported now, for children that may not read the library
    for module in pkgutil.iter_modules(seprune.cli.__path__, "seprune.cli."):
        importlib.import_module(module.name)
    recipe = seprune.recipe.load_recipe("quickstart", ["model.name=seprune/se_resnet8"])
    subject, _ = open_both(recipe)
    seprune.cuttable(subject.model, subject.example())
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    for line in sys.stdin:
        answers.write(json.dumps(_carry_out(json.loads(line))) + "\n")


def _carry_out(request: dict[str, Any]) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        out, err = Path(folder, "out"), Path(folder, "err")
        child = os.fork()
        if not child:
            _become(request, out, err)
        status, used = _wait(child)
        said = [p.read_text(errors="replace") for p in (out, err)]
    return {"status": status, "out": said[0], "err": said[1], "peak_mib": used.ru_maxrss / 1024}


def _wait(child: int) -> tuple[int, Any]:
    end = time.monotonic() + WALL_SECONDS
    while True:
        done, status, used = os.wait4(child, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status), used
        if time.monotonic() > end:
            os.kill(child, 9)
        time.sleep(0.002)


def _become(request: dict[str, Any], out: Path, err: Path) -> None:
    """Be `seprune WORDS` from here on; never returns."""
    status: Any = 1
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job ignores it
    for path, stream in ((out, 1), (err, 2)):
        os.dup2(os.open(path, os.O_CREAT | os.O_WRONLY | os.O_APPEND), stream)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    sys.stdin = open(0, closefd=False)  # noqa: SIM115
    try:
        _limit(request)
        if request.get("before"):
            exec(request["before"], {})
        _main(request)
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else bool(end.code)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def _main(request: dict[str, Any]) -> None:
    from seprune.cli import main

    sys.argv = ["seprune", *request["words"]]
    main()


def _limit(request: dict[str, Any]) -> None:
    os.chdir(request.get("cwd") or "/")
    os.environ.update(request.get("env") or {})
    seconds = request.get("seconds", 20)
    resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds + 5))
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    room = pages * resource.getpagesize() + (request.get("memory", 1024) << 20)
    resource.setrlimit(resource.RLIMIT_AS, (room, room))
    if request.get("ordinary") and os.geteuid() == 0:
        _give_up_rights()


def _give_up_rights() -> None:
    """Stay root, but one whom the permissions of files concern like everybody else."""
    header = (ctypes.c_uint32 * 2)(CAPABILITIES_3, 0)
    nothing = (ctypes.c_uint32 * 6)()
    if ctypes.CDLL(None, use_errno=True).capset(header, nothing):
        raise OSError(ctypes.get_errno(), "capset")


Start = Callable[..., Ended]

if __name__ == "__main__":
    sys.path.insert(0, sys.argv[1])
    serve()
