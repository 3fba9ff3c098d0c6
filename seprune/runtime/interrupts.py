"""SIGINT and SIGTERM end a run with its state saved, and never in the middle of a write."""

from __future__ import annotations

import os
import shlex
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType

from seprune.errors import PeerError, StoppedError


@dataclass
class _State:
    """Signals belong to the process, so there is one of these."""

    owner: int = 0  # pid of the process whose run it is; 0: nobody listens
    resume: str = ""
    signum: int = 0
    blocked: int = 0


_STATE = _State()
_SIGNALS = (signal.SIGINT, signal.SIGTERM)


@contextmanager
def interrupts(resume: str = "") -> Iterator[None]:
    """Turn SIGINT and SIGTERM into StoppedError, in the main thread, outside of `unbroken`.

    A second signal stops at once, `unbroken` or not; a third kills the process.

    Args:
        resume: the command that goes on from here; default: the one that was typed.

    Raises:
        StoppedError: a signal came; its exit status is 130 or 143.
    """
    if _STATE.owner == os.getpid() or threading.current_thread() is not threading.main_thread():
        yield
        return
    resume = resume or shlex.join(["seprune", *sys.argv[1:]])
    _STATE.__init__(owner=os.getpid(), resume=resume)  # type: ignore[misc]
    # A signal that was ignored on purpose (nohup, a background job) stays ignored.
    before = {s: signal.getsignal(s) for s in _SIGNALS if signal.getsignal(s) != signal.SIG_IGN}
    for signum in before:
        signal.signal(signum, _on_signal)
    try:
        yield
    except Exception as error:
        if _STATE.signum and not isinstance(
            error, PeerError
        ):  # a library caught the stop and made an error of its own of it
            raise _stopped() from error
        raise
    finally:
        _STATE.owner = _STATE.signum = 0
        for signum, handler in before.items():
            signal.signal(signum, handler)


@contextmanager
def unbroken() -> Iterator[None]:
    """Put a first signal off until the block has ended: around writes that belong together."""
    _STATE.blocked += 1
    try:
        yield
    finally:
        _STATE.blocked -= 1
    safe_point()


def safe_point() -> None:
    """Raise StoppedError if a signal waits; long loops call it where stopping loses nothing."""
    # Not twice on the same way out; but one that a destructor swallowed comes again.
    if _STATE.signum and not _STATE.blocked and not isinstance(sys.exc_info()[1], StoppedError):
        raise _stopped()


def _on_signal(signum: int, frame: FrameType | None) -> None:
    if os.getpid() != _STATE.owner:  # a forked worker: behave as if nothing were installed
        signal.signal(signum, signal.default_int_handler if signum == 2 else signal.SIG_DFL)
        os.kill(os.getpid(), signum)
        return
    again = bool(_STATE.signum)
    _STATE.signum = signum
    if again:
        for other in _SIGNALS:
            signal.signal(other, signal.SIG_DFL)
        raise _stopped()
    safe_point()


def _stopped() -> StoppedError:
    name = signal.Signals(_STATE.signum).name
    return StoppedError(
        f"stopped by {name}; every finished stage is saved",
        signum=_STATE.signum,
        why="somebody or something asked for it: Ctrl-C, kill, a scheduler",
        fix=f"go on with: {_STATE.resume}",
    )
