"""Limits of time and memory for foreign code and files that may ask for anything."""

from __future__ import annotations

import resource
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

AGAIN_SECONDS = 1.0  # code that swallows the first exception gets another
WALL = 10  # what waits or shares its core ends after so many times its limit


class Deadline:
    """When the running thread will have used `seconds` of processor time, or waited far longer.

    On a busy machine work takes many times as long as it should, and is none the worse for it.
    """

    def __init__(self, seconds: float) -> None:
        self._processor = time.thread_time() + seconds
        self._wall = time.monotonic() + WALL * seconds

    def left(self) -> float:
        """Seconds that are left for certain; zero or less when it is over."""
        return min(self._processor - time.thread_time(), self._wall - time.monotonic())


@contextmanager
def at_most(seconds: float, fault: Callable[[], Exception]) -> Iterator[None]:
    """Raise `fault()` in the block at its `Deadline`, even in a loop of pure Python.

    Only in the main thread: elsewhere nothing can be interrupted.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    owner = sys._getframe(2)  # whoever opened the block: above are this and contextlib's frame

    def ring(_: int, frame: FrameType | None) -> None:
        if _is_running(owner, frame):
            if (left := deadline.left()) <= 0:
                raise fault()
            signal.setitimer(signal.ITIMER_REAL, max(left, 1e-3), AGAIN_SECONDS)
            return
        signal.setitimer(signal.ITIMER_REAL, 0)  # the block was left without its end

    start, deadline = time.monotonic(), Deadline(seconds)
    handler = signal.signal(signal.SIGALRM, ring)
    left, interval = signal.setitimer(signal.ITIMER_REAL, seconds, AGAIN_SECONDS)
    try:
        try:
            yield
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)  # may itself be interrupted, once
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, handler)
        if left:  # somebody else's alarm goes on
            passed = time.monotonic() - start
            signal.setitimer(signal.ITIMER_REAL, max(left - passed, 1e-3), interval)


def _is_running(owner: FrameType, frame: FrameType | None) -> bool:
    while frame is not None and frame is not owner:
        frame = frame.f_back
    return frame is owner


@contextmanager
def memory_at_most(size: int) -> Iterator[None]:
    """Let the process take at most `size` bytes of address space more; beyond it, MemoryError.

    The limit is one of the whole process, so this is for blocks in which nothing else runs.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[0])
    except (OSError, ValueError):  # no Linux
        yield
        return
    wanted = pages * resource.getpagesize() + size
    for limit in (soft, hard):
        wanted = wanted if limit == resource.RLIM_INFINITY else min(wanted, limit)
    resource.setrlimit(resource.RLIMIT_AS, (wanted, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
