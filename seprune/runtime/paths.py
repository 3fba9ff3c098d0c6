"""Names that come from a file: relative, below their folder, through no link; places for files."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from seprune.errors import EnvironmentFault, InputError, UsageError
from seprune.runtime.text import shell_word

_START: list[Path] = []  # the working folder of the command line; nobody's in a library
LONGEST = 4096  # characters of a name; what Linux allows for a path


def fault_in(folder: Path, name: object) -> str | None:
    """Why `name`, read from a file in `folder`, may not be used; None where it may.

    A name has to be relative, without `.`, `..` and empty parts, and no part of it below `folder`
    may be a symbolic link: neither reading nor writing it can leave the folder then. `folder`
    itself is the user's own choice and may be a link. A Hub's cache keeps each file as a link into
    the `blobs` beside its snapshots; that link stays in the repository and is followed.
    """
    if not isinstance(name, str) or not name or len(name) > LONGEST:
        return "it is not a file name"
    parts = name.split("/")
    if "\0" in name or "\\" in name:
        return "it holds a character that no file name here has"
    if any(part in ("", ".", "..") for part in parts):
        return "it is absolute, or has empty, '.' or '..' parts"
    place = folder
    for part in parts:
        place = place / part
        try:
            if place.is_symlink() and not _is_blob(folder, place):
                return f"{place} is a link"
        except OSError as error:  # a part that is too long, a folder that may not be looked into
            return error.strerror or str(error)
    return None


def _is_blob(folder: Path, link: Path) -> bool:
    """Whether a link in a snapshot of a Hub's cache leads to a blob of the same repository."""
    if folder.absolute().parent.name != "snapshots":
        return False
    blobs, blob = folder.absolute().parents[1] / "blobs", link.resolve()
    return not blobs.is_symlink() and blob.parent == blobs.resolve() and not blob.is_dir()


def inside(folder: Path, name: object) -> Path:
    """`folder / name`, where `name` comes from a file or from a folder somebody else filled.

    Raises:
        InputError: the name leaves the folder, or a part of it is a link.
    """
    fault = fault_in(folder, name)
    if fault is None:
        return folder / str(name)
    raise InputError(
        f"{folder}: refused to use the name {str(name)[:80]!r} in it",
        why=fault,
        fix=f"remove the entry or the link, or use another folder: ls -lR {shell_word(folder)}",
        code="path",
    )


def expanded(text: Path | str) -> Path:
    """A path in which `~` means what it means to a shell; it stays where there is no such user."""
    return Path(os.path.expanduser(text))


def cache_folder(name: str) -> Path:
    """Where seprune keeps what it can make again, in the user's cache folder.

    Raises:
        EnvironmentFault: there is none, as for a user that the machine does not know.
    """
    base = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    if base.startswith("~"):
        raise EnvironmentFault(
            "there is no folder for a cache",
            why="this user has no home folder, and XDG_CACHE_HOME is not set",
            fix="export XDG_CACHE_HOME=FOLDER",
        )
    return Path(base) / "seprune" / name


def refuse_special(path: Path) -> None:
    """What is no file would be gone once a file was renamed to its place.

    Raises:
        UsageError: a device, a pipe or a socket, or any name in the folder of devices.
    """
    devices = Path("/dev")
    among = devices.is_mount() and path.parent.stat().st_dev == devices.stat().st_dev
    if among or (path.exists() and not path.is_file() and not path.is_dir()):
        raise UsageError(
            f"{path}: not a place for a file",
            why="a device, a pipe or a socket would be replaced by it",
            fix="name a file, or a new one",
        )


@contextmanager
def working_here() -> Iterator[None]:
    """Take relative paths of the block from the working folder that it starts in.

    Raises:
        EnvironmentFault: that folder is gone; torch's libraries end without one.
    """
    try:
        _START[:] = [Path.cwd()]
    except OSError as error:
        raise EnvironmentFault(
            "the working folder is gone",
            why=error.strerror or str(error),
            fix="cd to a folder that is there, and run the same command again",
        ) from error
    try:
        yield
    finally:
        _START.clear()


def refuse_elsewhere(path: Path) -> None:
    """A relative path names another place once the working folder is another one.

    Raises:
        InputError: code that was called has changed it, so that `path` would be written there.
    """
    if not _START or path.is_absolute():
        return
    try:
        now = str(Path.cwd())
    except OSError:
        now = "one that is gone"
    if now != str(_START[0]):
        raise InputError(
            f"{path}: not written",
            why=f"code that was called changed the working folder from {_START[0]} to {now}",
            fix=f"take os.chdir out of that code, or give the path as {_START[0] / path}",
        )
