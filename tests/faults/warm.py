"""Many short seprune processes without as many imports of torch.

A warm process imports everything once and forks: each fork is a process of its own that runs
`seprune.cli.main` on its own command line, with its own exit status, and can be killed.
"""

from __future__ import annotations

import json
import os
import resource
import select
import signal
import subprocess
import sys
import time
import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
DIED = 137
"""The exit status of a process that a test made end at one file operation."""


@dataclass(frozen=True)
class Done:
    """How a process ended: its status (negative: the signal that killed it) and what it said."""

    status: int
    said: str
    seconds: float


class Warm:
    """The warm process; `with Warm() as warm`."""

    def __init__(self) -> None:
        env = {**os.environ, "OMP_NUM_THREADS": "1", "NO_COLOR": "1", "COLUMNS": "120"}
        env["PYTHONPATH"] = f"{ROOT}{os.pathsep}{env.get('PYTHONPATH', '')}"
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        command = [sys.executable, str(HERE / "warm.py")]
        self.process = subprocess.Popen(command, env=env, bufsize=1, **pipes)
        self.logs: dict[int, tuple[Path, float]] = {}
        self._answer(120)

    def __enter__(self) -> Warm:
        return self

    def __exit__(self, *error: object) -> None:
        self.process.kill()  # it has nothing to save
        self.process.wait(timeout=30)
        self.process.stdin.close()
        self.process.stdout.close()

    def start(self, log: Path, *argv: object, **how: Any) -> int:
        """Fork one that runs `seprune *argv` and writes to `log`; its pid.

        Args:
            how: `fail`: arguments of `failing.install`; `call`: a function of `failing` to call
                with argv instead; `gate`: a file to wait for; `largest`: bytes of a file, which
                the kernel refuses to let grow any longer.
        """
        self._ask({"argv": [str(a) for a in argv], "log": str(log), **how})
        pid = self._answer(60)
        self.logs[pid] = log, time.monotonic()
        return pid

    def wait(self, pid: int, limit: float = 120) -> Done | None:
        """How it ended, or None if it still runs after `limit` seconds."""
        self._ask({"wait": pid, "limit": limit})
        status = self._answer(limit + 30)
        if status is None:
            return None
        log, start = self.logs.pop(pid)
        return Done(status, log.read_text(errors="replace"), time.monotonic() - start)

    def run(self, log: Path, *argv: object, limit: float = 120, **how: Any) -> Done:
        """Start one and wait for it; one that does not end is killed and told."""
        pid = self.start(log, *argv, **how)
        done = self.wait(pid, limit)
        if done is None:
            os.kill(pid, signal.SIGKILL)
            self.wait(pid)
            raise AssertionError(f"a hang: {argv} did not end within {limit} s: {log.read_text()}")
        return done

    def kill(self, pid: int, after: float, signum: int = signal.SIGKILL) -> Done:
        """Let it live for `after` seconds, send the signal unless it has ended; how it ended."""
        done = self.wait(pid, after)
        if done is None:
            os.kill(pid, signum)
            done = self.wait(pid)
        assert done is not None, "a hang: it did not end after the signal"
        return done

    def _ask(self, request: dict[str, Any]) -> None:
        self.process.stdin.write(json.dumps(request) + "\n")

    def _answer(self, limit: float) -> Any:
        ready, _, _ = select.select([self.process.stdout], [], [], limit)
        line = self.process.stdout.readline() if ready else ""
        assert line, "the warm process does not answer"
        return json.loads(line)


def serve() -> None:
    """Answer requests until stdin ends."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    print("null", file=answers)
    for line in sys.stdin:
        request = json.loads(line)
        if "wait" in request:
            print(json.dumps(_wait(request["wait"], request["limit"])), file=answers)
        else:
            pid = os.fork()
            if pid == 0:
                _be(request)
            print(pid, file=answers)


def _wait(pid: int, limit: float) -> int | None:
    end = time.monotonic() + limit
    while True:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        if time.monotonic() > end:
            return None
        time.sleep(0.002)


def _be(request: dict[str, Any]) -> None:
    """In the fork: become that process, and never return."""
    status = 1
    try:
        _redirect(Path(request["log"]))
        signal.signal(signal.SIGINT, signal.default_int_handler)
        gate = Path(request["gate"]) if "gate" in request else None
        while gate and not gate.exists():
            time.sleep(0.0005)
        import failing

        if "largest" in request:
            resource.setrlimit(resource.RLIMIT_FSIZE, (request["largest"],) * 2)
        if "fail" in request:
            failing.install(**request["fail"])
        if "call" in request:
            getattr(failing, request["call"])(*request["argv"])
        else:
            from seprune.cli import main

            sys.argv = ["seprune", *request["argv"]]
            main()
        status = 0
    except SystemExit as stop:
        status = stop.code if isinstance(stop.code, int) else 1
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def _redirect(log: Path) -> None:
    handle = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    empty = os.open(os.devnull, os.O_RDONLY)
    for source, target in ((empty, 0), (handle, 1), (handle, 2)):
        os.dup2(source, target)
    os.closerange(3, 64)


def _import_everything() -> None:
    import plotly.graph_objects  # noqa: F401
    import safetensors.torch  # noqa: F401
    import torch
    import torchvision  # noqa: F401
    from rich.progress import Progress  # noqa: F401

    import seprune.cli
    import seprune.models
    import seprune.pipeline
    import seprune.report.html
    import seprune.report.terminal
    from seprune.pruning import cuttable

    torch.set_num_threads(1)
    # what libraries import at the first forward; no backward, whose threads would not survive
    cuttable(seprune.models.build("seprune/se_resnet8", classes=2), torch.rand(2, 1, 12, 12))


if __name__ == "__main__":
    sys.path.insert(0, str(HERE))
    _import_everything()
    serve()
