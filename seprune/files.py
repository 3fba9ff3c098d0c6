"""Atomic writes and hashes: the only way anything is written."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from seprune.errors import EnvironmentFault, InputError

SUMS = "SHA256SUMS"


def write_with(path: Path, fill: Callable[[Path], None], *, need: int = 0) -> None:
    """Let `fill` write a temporary file beside `path`, then put it in place in one step.

    Args:
        path: final name; its folder is created.
        fill: writes the whole content to the path that it is given.
        need: bytes that must be free before anything is written.

    Raises:
        EnvironmentFault: no space left or no permission; the previous file is untouched.
    """
    temporary: Path | None = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        need_space(path.parent, need)
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".part")
        os.close(handle)
        temporary = Path(name)
        fill(temporary)
        temporary.chmod(0o666 & ~_umask())
        _sync(temporary)
        temporary.replace(path)
        _sync(path.parent)
    except OSError as error:
        raise _environment_fault(path, error) from error
    finally:
        if temporary is not None:
            temporary.unlink(missing_ok=True)


def write_bytes(path: Path, content: bytes) -> None:
    """Write `content` to `path` atomically."""

    def fill(temporary: Path) -> None:
        temporary.write_bytes(content)

    write_with(path, fill, need=len(content))


def write_text(path: Path, content: str) -> None:
    """Write `content` to `path` atomically, as UTF-8."""
    write_bytes(path, content.encode())


def write_json(path: Path, content: Any) -> None:
    """Write `content` to `path` atomically as JSON; NaN and infinities are refused."""
    write_text(path, json.dumps(content, indent=1, allow_nan=False, ensure_ascii=False) + "\n")


def append_line(path: Path, line: str) -> None:
    """Add one line to `path` and wait until the disk has it."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("ab") as stream:
            stream.write(line.encode() + b"\n")
            stream.flush()
            os.fsync(stream.fileno())
    except OSError as error:
        raise _environment_fault(path, error) from error


def read_json(path: Path) -> Any:
    """The JSON document in `path`.

    Raises:
        InputError: missing, unreadable or not JSON; names the line.
    """
    try:
        return json.loads(path.read_bytes())
    except FileNotFoundError as error:
        raise InputError(f"{path}: no such file", fix="check the path") from error
    except OSError as error:
        raise InputError(f"{path}: cannot be read", why=str(error)) from error
    except ValueError as error:
        raise InputError(
            f"{path}: not valid JSON",
            why=str(error),
            fix="restore the file or run the stage that writes it again",
        ) from error


def sha256(path: Path) -> str:
    """The hexadecimal SHA-256 of a file."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def write_sums(folder: Path) -> None:
    """Write `SHA256SUMS` over every other file directly in `folder` (the format of sha256sum)."""
    names = sorted(p.name for p in folder.iterdir() if p.is_file() and _is_content(p))
    write_text(folder / SUMS, "".join(f"{sha256(folder / n)}  {n}\n" for n in names))


def check_sums(folder: Path) -> list[str]:
    """Names of the files in `folder` that are missing or differ from its `SHA256SUMS`."""
    try:
        lines = (folder / SUMS).read_text().splitlines()
    except (OSError, UnicodeDecodeError):
        return [SUMS]
    wrong = []
    for line in lines:
        digest, _, name = line.partition("  ")
        path = folder / name
        if not name or "/" in name or not path.is_file() or sha256(path) != digest:
            wrong.append(name or line)
    return wrong


def need_space(folder: Path, size: int) -> None:
    """Refuse to start a write of `size` bytes that the disk under `folder` has no room for."""
    if size and shutil.disk_usage(folder).free < size:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def _is_content(path: Path) -> bool:
    return path.name != SUMS and not path.name.endswith(".part")


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _environment_fault(path: Path, error: OSError) -> EnvironmentFault:
    fixes = {
        errno.ENOSPC: "free some space and run the same command again",
        errno.EFBIG: "raise the file-size limit (ulimit -f) and run the same command again",
        errno.EACCES: "choose a folder you may write to with --out",
        errno.EROFS: "choose a folder you may write to with --out",
    }
    return EnvironmentFault(
        f"{path}: cannot be written",
        why=os.strerror(error.errno) if error.errno else str(error),
        fix=fixes.get(error.errno or 0, "check the disk and run the same command again"),
    )
