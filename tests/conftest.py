"""One thread, and signals as in a terminal: what the machine adds must not show in a test."""

from __future__ import annotations

import gc
import os
import signal
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from xdist.scheduler import LoadFileScheduling

os.environ.setdefault("OMP_NUM_THREADS", "1")  # for the processes that tests start,
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)  # each of which would compile seprune again
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:  # a background job ignores Ctrl-C
    signal.signal(signal.SIGINT, signal.default_int_handler)


TOGETHER = ("reliability", "export")
"""Folders whose files share what is costly to start: processes to fork, the exporter to ONNX."""


class _Scheduling(LoadFileScheduling):
    """A file stays on one worker, and so do the files of a folder of `TOGETHER`."""

    def _split_scope(self, nodeid: str) -> str:
        file = super()._split_scope(nodeid)
        folder = Path(file).parent.name
        return folder if folder in TOGETHER else file


def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> _Scheduling:
    return _Scheduling(config, log)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What one worker does alone takes longest, and comes first: workers end at the same time."""
    order = {name: place for place, name in enumerate(TOGETHER)}
    items.sort(key=lambda item: order.get(item.path.parent.name, len(TOGETHER)))


def pytest_collection_finish():
    """What collection made lives to the end: the garbage collector need not walk through it."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True, scope="session")
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def seprune(monkeypatch, capsys):
    """Run the command line in this process: (exit status, stdout, stderr)."""
    from seprune import cli

    def call(*words: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["seprune", *map(str, words)])
        status: object = 0
        try:
            cli.main()
        except SystemExit as stop:
            status = stop.code
        printed = capsys.readouterr()
        return int(str(status or 0)), printed.out, printed.err

    return call
