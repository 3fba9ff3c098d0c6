"""Files of one folder that are put in place together, whenever the process dies.

They are written into a temporary folder beside their places, which the writer keeps locked. For
several files a record then names each of them. From the moment that the record has its name the
new files count: whoever looks at the folder next (`settle`) completes the renames that are
missing. Before that moment the old ones count, and the temporary folder, which nobody has locked
any more, is removed (`clear`).
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TypeVar

from seprune.errors import EnvironmentFault, InputError
from seprune.runtime.paths import inside
from seprune.runtime.text import shell_word
from seprune.runtime.typed import read_typed

T = TypeVar("T")
TRIES = 20  # to read a folder that is written all the time
UNFINISHED = ".seprune.part"
"""How names of temporary folders end; nobody else's do."""
RECORD = ".seprune.commit"


def is_staged(path: Path) -> bool:
    """Whether a relative path lies in a temporary folder."""
    return any(part.endswith(UNFINISHED) for part in path.parts)


class Staging:
    """A temporary folder in `folder`, locked for as long as its writer lives."""

    def __init__(self, folder: Path) -> None:
        self.committed = False
        while True:
            self.path = Path(tempfile.mkdtemp(UNFINISHED, ".", folder))
            try:
                self._handle = os.open(self.path, os.O_RDONLY)
            except FileNotFoundError:  # somebody took it for a left-over before it was locked
                continue
            except OSError:
                self.path.rmdir()
                raise
            with suppress(OSError):  # a file system without locks: nobody removes it then
                fcntl.flock(self._handle, fcntl.LOCK_EX)
            if self.path.exists():  # else it was taken for a left-over likewise
                return
            os.close(self._handle)

    def close(self) -> None:
        """Give the lock back, and remove what was not put in place."""
        for _ in range(2):  # a disk that failed once; what stays, `clear` removes later
            if not self.committed and self.path.exists():
                shutil.rmtree(self.path, ignore_errors=True)
        with suppress(OSError):  # gone, or not empty: then the record still needs it
            self.path.rmdir()
        with suppress(OSError):
            os.close(self._handle)


def put_in_place(staging: Staging, names: Collection[str], *, fresh: bool = False) -> None:
    """Move files from the temporary folder to the folder around it: all of them, or none.

    Args:
        fresh: a single file, which replaces none.

    Raises:
        FileExistsError: there is one where a fresh one was to be.
        OSError: the disk failed; what was committed and not moved will be by `settle`.
    """
    folder = staging.path.parent
    if len(names) == 1:
        for name in names:
            (_link if fresh else os.replace)(staging.path / name, folder / name)
        sync(folder)
        return
    sync(staging.path)
    with _alone(folder):
        _settle(folder)
        record = staging.path / RECORD
        record.write_text(json.dumps({n: f"{staging.path.name}/{n}" for n in names}))
        sync(record)
        record.replace(folder / RECORD)
        staging.committed = True
        try:
            sync(folder)
            _settle(folder)
        except (OSError, InputError):  # committed: worth a second attempt before `settle` has to
            sync(folder)
            _settle(folder)


def _link(source: Path, target: Path) -> None:
    """Give a file a second name that nothing has; its first one goes with the temporary folder."""
    try:
        os.link(source, target)
    except FileExistsError:
        raise
    except OSError:  # a file system without links: then others may come in between
        if os.path.lexists(target):
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(target)) from None
        os.replace(source, target)


def settle(folder: Path) -> None:
    """Complete what a writer of `folder` that was killed had committed; no more than a look else.

    Raises:
        EnvironmentFault: the folder cannot be written.
        InputError: a record that seprune did not write.
    """
    if not os.path.lexists(folder / RECORD):
        return
    try:
        with _alone(folder):
            _settle(folder)
    except OSError as error:
        raise EnvironmentFault(
            f"{folder}: an interrupted save cannot be completed",
            why=error.strerror or str(error),
            fix=f"give the command again where {folder} may be written",
        ) from error


def clear(folder: Path) -> None:
    """`settle`, and remove what writers that were killed left in `folder`.

    Raises:
        OSError: the folder cannot be read or written.
    """
    if not os.path.lexists(folder / RECORD) and not any(_left(folder)):
        return
    with _alone(folder):
        _settle(folder)
        for path in _left(folder):
            with suppress(FileNotFoundError):
                _remove_unlocked(path)


def undisturbed(folder: Path, last: str, read: Callable[[], T]) -> T:
    """What `read` makes of files that nobody replaced meanwhile: it is called again if one did.

    Args:
        last: a file that every writer of the others replaces together with them.
    """

    def state() -> tuple[int, ...]:
        with suppress(OSError):
            found = (folder / last).stat()
            return found.st_ino, found.st_mtime_ns, found.st_ctime_ns
        return ()

    for _ in range(TRIES):
        settle(folder)
        before = state()
        try:
            found = read()
        except InputError:
            if state() == before and not os.path.lexists(folder / RECORD):
                raise
        else:
            if state() == before and not os.path.lexists(folder / RECORD):
                return found
    return read()


def sync(path: Path) -> None:
    """Wait until the disk has a file or the names of a folder, which not every system can sync."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP) or not path.is_dir():
            raise
    finally:
        os.close(handle)


def _settle(folder: Path) -> None:
    """Carry out the record of `folder`, if there is one."""
    path = folder / RECORD
    if not os.path.lexists(path):
        return
    fix = f"remove it: rm {shell_word(path)}"
    names = read_typed(dict[str, str], inside(folder, RECORD), fix=fix, code="damaged")
    if not all(map(_possible, names, names.values())):
        raise InputError(
            f"{path}: not a record that seprune wrote",
            why="it does not name temporary files and their places",
            fix=fix,
            code="damaged",
        )
    for name, temporary in names.items():
        source = inside(folder, temporary)
        if source.is_file():  # else it was moved before
            source.replace(folder / name)
    sync(folder)
    path.unlink(missing_ok=True)
    sync(folder)
    for temporary in names.values():
        with suppress(OSError):
            (folder / temporary).parent.rmdir()


def _possible(name: str, temporary: str) -> bool:
    """Whether a record may say this: a name, and the same name in a temporary folder beside it."""
    if "/" in name:
        return False
    folder, _, same = temporary.partition("/")
    return same == name and folder.startswith(".") and folder.endswith(UNFINISHED)


def _left(folder: Path) -> Iterator[Path]:
    with os.scandir(folder) as entries:
        names = [e.name for e in entries if e.name.endswith(UNFINISHED) and e.name[0] == "."]
    yield from (folder / name for name in names)


def _remove_unlocked(path: Path) -> None:
    try:
        handle = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    except PermissionError:  # somebody else's, who may still be writing
        return
    except OSError:  # a link, or something else that no writer made
        path.unlink(missing_ok=True)
        return
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
    except OSError:  # its writer lives
        return
    finally:
        os.close(handle)


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """One process at a time puts files of `folder` in place."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        with suppress(OSError):  # a file system without locks
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)
