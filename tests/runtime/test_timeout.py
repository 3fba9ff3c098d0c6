"""A time limit ends its block, and nothing after it."""

from __future__ import annotations

import signal
import time

import pytest

from seprune.errors import InputError
from seprune.runtime.timeout import at_most


def late() -> InputError:
    return InputError("late")


def spin(seconds: float) -> None:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        pass


def swallow(times: int) -> int:
    """Run into the limit; the exception is caught so many times before it is let through."""
    swallowed = 0
    with at_most(0.05, late):
        while True:
            try:
                spin(0.01)
            except InputError:
                swallowed += 1
                if swallowed == times:
                    return swallowed


def test_time_in_which_others_have_the_core_is_not_counted(monkeypatch):
    """On a busy machine work is not stopped before its time."""
    with at_most(0.1, late):
        time.sleep(0.3)
    with pytest.raises(InputError, match="late"), at_most(0.1, late):
        spin(5)
    monkeypatch.setattr("seprune.runtime.timeout.WALL", 1)
    with pytest.raises(InputError, match="late"), at_most(0.1, late):
        time.sleep(5)


def test_code_that_swallows_the_exception_gets_another(monkeypatch):
    monkeypatch.setattr("seprune.runtime.timeout.AGAIN_SECONDS", 0.05)
    assert swallow(3) == 3
    assert signal.getitimer(signal.ITIMER_REAL)[1] == 0  # no further one is on its way
    with pytest.raises(InputError, match="late"), at_most(0.05, late):
        spin(5)


def test_an_alarm_whose_block_was_left_without_its_end_is_silent(monkeypatch):
    """As when the exception comes while contextlib is on its way to the end of the block."""
    monkeypatch.setattr("seprune.runtime.timeout.AGAIN_SECONDS", 0.02)
    before = signal.getsignal(signal.SIGALRM)

    def lost() -> object:
        block = at_most(0.05, late)
        block.__enter__()
        return block

    try:
        kept = lost()
        spin(0.2)  # the alarm would be raised here
        assert signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)
        del kept
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def test_an_alarm_of_somebody_else_goes_on():
    rung = []
    before = signal.signal(signal.SIGALRM, lambda *_: rung.append(time.monotonic()))
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.1)
        with at_most(5, late):
            spin(0.02)
        spin(0.2)
        assert len(rung) == 1
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
