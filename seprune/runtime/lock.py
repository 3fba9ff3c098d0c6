"""The lock of a folder: one process at a time, and the lock dies with its process."""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from filelock import FileLock, Timeout

from seprune.errors import EnvironmentFault, InputError, LockedError, UsageError
from seprune.runtime.files import tidy, write_json
from seprune.runtime.paths import inside
from seprune.runtime.text import shell_word
from seprune.runtime.typed import ProcessId, read_typed

HOLDER = "lock.json"
"""Beside `lock`, which filelock may empty: who holds the folder."""


@dataclass(frozen=True)
class Holder:
    """Who holds a folder, and since when."""

    pid: ProcessId
    host: str
    since: str


@contextmanager
def hold(out: Path) -> Iterator[None]:
    """Be the only process that works in `out`, and remove what one that was killed left there.

    Raises:
        LockedError: another process holds it.
        UsageError: it is not a folder.
        InputError: its lock or a folder in it is a link.
        EnvironmentFault: it cannot be written.
    """
    if out.exists() and not out.is_dir():
        raise UsageError(
            f"{out}: not a folder",
            why="a run writes several files",
            fix="choose another folder with --out",
        )
    lock = FileLock(_own_lock(out))  # the operating system's: it dies with its process
    try:
        out.mkdir(parents=True, exist_ok=True)
        lock.acquire(timeout=0)
    except Timeout:
        raise _locked(out) from None
    except OSError as error:
        why = os.strerror(error.errno) if error.errno else str(error)
        fix = "choose a folder you may write to with --out"
        raise EnvironmentFault(f"{out}: cannot be written", why=why, fix=fix) from error
    try:
        write_json(out / HOLDER, vars(Holder(os.getpid(), platform.node(), now())))
        tidy(out)
        yield
    finally:
        with suppress(OSError):  # it only tells who held the lock
            (out / HOLDER).unlink(missing_ok=True)
        lock.release()


@contextmanager
def waiting_for(folder: Path) -> Iterator[None]:
    """Hold `folder` for as long as the block lasts, after whoever holds it now.

    Raises:
        InputError: its lock is a link.
        EnvironmentFault: it cannot be written.
    """
    lock = FileLock(_own_lock(folder), poll_interval=0.2)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    except OSError as error:
        why = os.strerror(error.errno) if error.errno else str(error)
        fix = "choose a folder you may write to with --out"
        raise EnvironmentFault(f"{folder}: cannot be written", why=why, fix=fix) from error
    try:
        yield
    finally:
        lock.release()


def _own_lock(folder: Path) -> Path:
    """The path of a folder's lock.

    Raises:
        InputError: it is a link, or a file that has another name: whoever opens it empties it.
    """
    path = inside(folder, "lock")
    if path.is_file() and path.stat().st_nlink > 1:
        raise InputError(
            f"{path}: the file of another folder, too",
            why="it is a hard link, and locks of two folders are not one",
            fix=f"rm {shell_word(path)}",
            code="path",
        )
    return path


def _locked(out: Path) -> LockedError:
    """Who holds the folder. The holder writes its name right after it took the lock: wait."""
    who = "a process"
    for _ in range(50):
        try:
            holder = read_typed(Holder, inside(out, HOLDER), fix="")
            if holder.host != platform.node() or _alive(holder.pid):
                who = f"process {holder.pid} on {holder.host} since {holder.since}"
                break
        except InputError:  # not there yet
            pass
        time.sleep(0.1)
    return LockedError(
        f"{out}: another run works here",
        why=f"it is held by {who}",
        fix="wait until it ends, or choose another --out; a lock never outlives its process",
    )


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # it lives, and is someone else's
        return True
    return True


def now() -> str:
    """The time to the second, in UTC."""
    return datetime.now(UTC).isoformat(timespec="seconds")
