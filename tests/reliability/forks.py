"""A server that has imported everything and forks: processes of seprune without their imports.

`python forks.py` answers requests, one JSON line each:

{"words": [...], "out": FILE, "err": FILE}: the pid of a new process that is `seprune WORDS`, with
    its own exit status and signals. Further keys are those of `FIRST`.
{"run": CODE}: Python in the server itself, so that each later process finds done what it does.
{"wait": PID, "limit": SECONDS}: its exit status (negative: the signal that killed it), or null if
    it still runs.
"""

from __future__ import annotations

import ctypes
import gc
import importlib
import json
import os
import pkgutil
import resource
import signal
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import failing

import seprune.cli

CAPABILITIES_3 = 0x20080522  # the version of Linux's structure


def import_everything() -> None:
    """What is imported late is imported now, also for processes that may not read the library."""
    import plotly.graph_objects  # noqa: F401
    import torchvision  # noqa: F401

    from seprune.pipeline.inputs import open_both
    from seprune.recipe import load_recipe

    for module in pkgutil.walk_packages(seprune.__path__, "seprune."):
        if module.name != "seprune.__main__":
            importlib.import_module(module.name)
    # what libraries import at the first forward; no backward, whose threads would not survive
    recipe = load_recipe("quickstart", ["model.name=seprune/se_resnet8"])
    subject, _ = open_both(recipe)
    seprune.analyse(subject.model, subject.example())
    gc.freeze()  # a collection in a fork would copy what it only looks at


def serve() -> None:
    """Answer requests until stdin ends."""
    for line in sys.stdin:
        request = json.loads(line)
        if "wait" in request:
            answer = wait(request["wait"], request["limit"])
        elif "run" in request:
            answer = exec(request["run"], {})
        else:
            answer = os.fork() or become(request)
        print(json.dumps(answer), flush=True)


def wait(pid: int, limit: float) -> int | None:
    """The exit status of a process that ends within `limit` seconds."""
    end = time.monotonic() + limit
    while True:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        if time.monotonic() > end:
            return None
        time.sleep(0.002)


# -- in the new process ----------------------------------------------------------------------------


def become(request: dict[str, Any]) -> NoReturn:
    """Be `seprune WORDS` from here on."""
    status: Any = 1
    try:
        signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job ignores it
        redirect(os.devnull, request["out"], request["err"])
        sys.argv = ["seprune", *request["words"]]
        for name in FIRST:
            if name in request:
                FIRST[name](request[name])
        seprune.cli.main()
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else bool(end.code)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def redirect(*paths: str) -> None:
    """Let stdin, stdout and stderr be these files, and close all else that the server had open."""
    for stream, path in enumerate(paths):
        os.dup2(os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND), stream)
    os.closerange(3, 64)
    sys.stdin = open(0, closefd=False)  # noqa: SIM115


def wait_for(path: str) -> None:
    while not Path(path).exists():
        time.sleep(0.0005)


def limit_memory(mib: int) -> None:
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    room = pages * resource.getpagesize() + (mib << 20)
    resource.setrlimit(resource.RLIMIT_AS, (room, room))


def give_up_rights(_: bool) -> None:
    """Stay root, but one whom the permissions of files concern like everybody else."""
    header = (ctypes.c_uint32 * 2)(CAPABILITIES_3, 0)
    nothing = (ctypes.c_uint32 * 6)()
    if ctypes.CDLL(None, use_errno=True).capset(header, nothing):
        raise OSError(ctypes.get_errno(), "capset")


FIRST: dict[str, Callable[[Any], object]] = {
    "gate": wait_for,  # a file
    "cwd": os.chdir,
    "env": os.environ.update,
    "seconds": lambda n: resource.setrlimit(resource.RLIMIT_CPU, (n, n + 5)),
    "memory": limit_memory,  # MiB more than Python and torch take
    "largest": lambda n: resource.setrlimit(resource.RLIMIT_FSIZE, (n, n)),  # bytes of a file
    "ordinary": give_up_rights,  # permissions hold for root too
    "fail": lambda how: failing.install(**how),
    "before": lambda code: exec(code, {}),  # Python, to inject any other fault
}
"""What may happen in a process before it is the command, in this order."""

if __name__ == "__main__":
    import_everything()
    serve()
