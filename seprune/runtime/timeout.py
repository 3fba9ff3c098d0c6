"""A time limit for code of strangers that may do anything, or nothing for ever."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

AGAIN_SECONDS = 1.0  # code that swallows the first exception gets another


@contextmanager
def at_most(seconds: float, fault: Callable[[], Exception]) -> Iterator[None]:
    """Raise `fault()` in the block when it has taken `seconds`, even in a loop of pure Python.

    Only in the main thread: elsewhere nothing can be interrupted.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def ring(*_: Any) -> None:
        raise fault()

    start = time.monotonic()
    handler = signal.signal(signal.SIGALRM, ring)
    left, interval = signal.setitimer(signal.ITIMER_REAL, seconds, AGAIN_SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, handler)
        if left:  # somebody else's alarm goes on
            passed = time.monotonic() - start
            signal.setitimer(signal.ITIMER_REAL, max(left - passed, 1e-3), interval)
