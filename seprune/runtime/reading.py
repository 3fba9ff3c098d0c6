"""The one reader of text and JSON: regular files only, within limits that are checked first."""

from __future__ import annotations

import errno
import json
import os
import re
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from io import BufferedReader
from pathlib import Path
from typing import Any, NoReturn

from seprune.errors import InputError
from seprune.runtime.text import shell_word

TEXT_LIMIT = 64 << 20  # bytes; a report of 100,000 channels takes 20 MB
VALUES_LIMIT = 4_000_000  # of one JSON document
LINES_LIMIT = 4_000_000  # of a text; a table has one for each image
DEPTH_LIMIT = 64  # brackets in brackets
DIGITS_LIMIT = 19  # of an integer: what 64 bits hold
HOLES_LIMIT = 256 << 20  # bytes of a file that may be nothing but holes
WRITTEN, MOST_PARTS = 0.01, 1000  # of a longer one that has to be written; parts looked at

_BRACKETS = re.compile(rb'"(?:[^"\\]|\\.)*+"|[\[{]|[\]}]', re.DOTALL)
_LONG_NUMBER = re.compile(rb"\d{%d}|\d[eE]" % (DIGITS_LIMIT + 1))


@contextmanager
def open_regular(path: Path) -> Iterator[BufferedReader]:
    """`path` opened for reading; a pipe, a device or a socket is refused, and never waited for.

    Raises:
        OSError: as of `open`.
        InputError: not a regular file.
    """
    handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    with os.fdopen(handle, "rb") as stream:
        mode = os.fstat(handle).st_mode
        if not stat.S_ISREG(mode):
            _refuse(path, "not a regular file", why=f"it is {_kind(mode)}")
        if _is_sparse(handle):
            _refuse(path, "a sparse file", why="almost none of its length is allocated on the disk")
        yield stream


def _is_sparse(handle: int) -> bool:
    """Whether a long file is almost entirely sparse: holes, which occupy no disk blocks.

    An archive of a kilobyte can unpack to a sparse file of a terabyte, all of which a reader would
    read or keep in memory. A file system without SEEK_HOLE reports none.
    """
    size = os.fstat(handle).st_size
    if size <= HOLES_LIMIT:
        return False
    allocated = end = 0
    try:
        for _ in range(MOST_PARTS):
            start = os.lseek(handle, end, os.SEEK_DATA)
            end = os.lseek(handle, start, os.SEEK_HOLE)
            allocated += end - start
            if allocated > WRITTEN * size:
                return False
    except OSError as error:
        return error.errno == errno.ENXIO  # nothing but a hole is left
    finally:
        os.lseek(handle, 0, os.SEEK_SET)
    return True


def require_regular(path: Path) -> None:
    """Refuse what a library that opens `path` by its name would wait for.

    Raises:
        OSError: it cannot be opened.
        InputError: not a regular file.
    """
    with open_regular(path):
        pass


def read_bytes(path: Path, *, limit: int = TEXT_LIMIT) -> bytes:
    """The content of a regular file of at most `limit` bytes.

    Raises:
        OSError: as of `open` and `read`.
        InputError: not a regular file, or a longer one.
    """
    with open_regular(path) as stream:
        size = os.fstat(stream.fileno()).st_size
        content = stream.read(limit + 1) if size <= limit else b""
    if size > limit or len(content) > limit:
        _refuse(path, "too large to be read", why=f"more than {limit:,} bytes")
    return content


def read_lines(path: Path, *, limit: int = LINES_LIMIT) -> list[bytes]:
    """`read_bytes` at its newlines; what is behind the last one is the last of at least one.

    Raises:
        OSError: as of `open`.
        InputError: not a regular file, a longer one, or one of more lines.
    """
    content = read_bytes(path)
    _require_few(path, content, limit)
    return content.split(b"\n")


def _require_few(path: Path, content: bytes, limit: int) -> None:
    if (lines := content.count(b"\n")) > limit:
        _refuse(path, "too many lines to be read", why=f"{lines:,} lines, the limit is {limit:,}")


def read_text(
    path: Path, *, limit: int = TEXT_LIMIT, lines: int = LINES_LIMIT, errors: str = "strict"
) -> str:
    """`read_bytes` as UTF-8 text.

    Raises:
        OSError: as of `open`.
        InputError: not a regular file, a longer one or one of more lines, or not UTF-8, unless
            `errors` allows that.
    """
    try:
        content = read_bytes(path, limit=limit)
        _require_few(path, content, lines)
        return content.decode("utf-8", errors)
    except UnicodeDecodeError as error:
        _refuse(
            path, "not UTF-8 text", why=f"byte {error.start:,} is {error.object[error.start]:#x}"
        )


def read_json(path: Path, *, limit: int = TEXT_LIMIT) -> Any:
    """The JSON document in `path`.

    Raises:
        InputError: missing, unreadable, too large or deep, or not JSON; names the line.
    """
    try:
        return parse_json(read_bytes(path, limit=limit))
    except FileNotFoundError as error:
        raise InputError(
            f"{path}: no such file", why="nothing is there", fix="check the path"
        ) from error
    except OSError as error:
        raise InputError(
            f"{path}: cannot be read",
            why=error.strerror or str(error),
            fix=f"ls -l {shell_word(path)}",
        ) from error
    except (ValueError, RecursionError) as error:
        raise InputError(
            f"{path}: not valid JSON",
            why=str(error),
            fix="restore the file or run the stage that writes it again",
        ) from error


def parse_json(text: bytes | str, *, finite: bool = True) -> Any:
    """A JSON document whose size, depth and numbers are within the limits above.

    Args:
        finite: refuse NaN and infinities, which are no JSON; Python's own writer makes them.

    Raises:
        ValueError: not JSON, or beyond a limit; nothing is built before that is known.
    """
    content = text.encode("utf-8", "surrogatepass") if isinstance(text, str) else text
    values = content.count(b",") + content.count(b"[") + content.count(b"{")
    if values > VALUES_LIMIT:
        raise ValueError(f"{values:,} values, the limit is {VALUES_LIMIT:,}")
    depth = 0
    for found in _BRACKETS.finditer(content):
        first = found.group()[:1]
        depth += 1 if first in b"[{" else -1 if first in b"]}" else 0
        if depth > DEPTH_LIMIT:
            raise ValueError(f"brackets in brackets, more than {DEPTH_LIMIT} deep")
    constant = _constant if finite else float
    if _LONG_NUMBER.search(content):  # slower: a call for every number
        return json.loads(content, parse_int=_integer, parse_float=_float, parse_constant=constant)
    return json.loads(content, parse_constant=constant)


def _integer(digits: str) -> int:
    if len(digits.lstrip("-")) > DIGITS_LIMIT:
        raise ValueError(f"an integer of {len(digits.lstrip('-'))} digits")
    return int(digits)


def _float(digits: str) -> float:
    value = float(digits)
    if value in (float("inf"), float("-inf")):
        raise ValueError(f"the number {digits[:40]} is beyond what a float holds")
    return value


def _constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")


def _kind(mode: int) -> str:
    kinds = {
        stat.S_ISFIFO: "a pipe (FIFO)",
        stat.S_ISCHR: "a device",
        stat.S_ISBLK: "a device",
        stat.S_ISDIR: "a folder",
        stat.S_ISSOCK: "a socket",
    }
    return next((name for test, name in kinds.items() if test(mode)), "something else")


def _refuse(path: Path, what: str, *, why: str) -> NoReturn:
    raise InputError(
        f"{path}: {what}",
        why=why,
        fix=f"give another file, or look at it: ls -lL {shell_word(path)}",
        code="unreadable",
    )
