"""One thread, and signals as in a terminal: what the machine adds must not show in a test."""

from __future__ import annotations

import gc
import os
import signal
import sys

import pytest
import torch

os.environ.setdefault("OMP_NUM_THREADS", "1")  # for the processes that tests start,
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)  # each of which would compile seprune again
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:  # a background job ignores Ctrl-C
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files that start processes take longest, and come first: workers end at the same time."""
    long = {item.path for item in items if "warm" in getattr(item, "fixturenames", ())}
    items.sort(key=lambda item: item.path not in long)


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
