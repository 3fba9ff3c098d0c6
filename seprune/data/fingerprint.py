"""What identifies the files of a data set, at a cost that a million of them bear."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Sequence
from pathlib import Path

from seprune.errors import InputError
from seprune.runtime.reading import open_regular

SAMPLED = 512  # files that are read
SAMPLED_BYTES = 1 << 16  # of each, from its start


def of_files(root: Path, paths: Sequence[Path]) -> str:
    """Two hashes, `NAMES-CONTENT`, of files below `root`.

    The first is of the names and sizes. The second is of the times of modification and of the
    content of `SAMPLED` files, evenly spread in the order that is given: pixels that change under
    an equal name and size show in the time of their file, and in the content where many change.
    1.2 million files cost a `stat` each, and at most 32 MB are read.
    """
    names, content = hashlib.sha256(), hashlib.sha256()
    step = max(len(paths) // SAMPLED, 1)
    for number, path in enumerate(paths):
        size, changed = _state(path)
        names.update(os.fsencode(path.relative_to(root)) + f"\0{size}\n".encode())
        content.update(f"{changed}\n".encode())
        if number % step == 0:
            content.update(_start(path))
    return f"{names.hexdigest()[:32]}-{content.hexdigest()[:32]}"


def of_samples(
    facts: str, count: int, read: Callable[[int], bytes], holders: Sequence[Path]
) -> str:
    """The same two hashes of samples that are no files: of `facts`, and of the content of some.

    Args:
        facts: what is known of all of them: how many, their names, their labels.
        read: the content of one.
        holders: files that they lie in, whose sizes and times belong to the content.
    """
    content = hashlib.sha256(repr(list(map(_state, holders))).encode())
    for row in range(0, count, max(count // SAMPLED, 1)):
        content.update(hashlib.sha256(read(row)[:SAMPLED_BYTES]).digest())
    names = hashlib.sha256(facts.encode())
    return f"{names.hexdigest()[:32]}-{content.hexdigest()[:32]}"


def difference(before: str, now: str) -> str:
    """What tells two fingerprints apart, in words."""
    if before.partition("-")[0] != now.partition("-")[0]:
        return "other files, or files of other sizes"
    return "the same names and sizes, but files changed since"


def _state(path: Path) -> tuple[int, int]:
    try:
        found = path.stat()
    except OSError:  # a dangling link, named when the image is read
        return 0, 0
    return found.st_size, found.st_mtime_ns


def _start(path: Path) -> bytes:
    try:
        with open_regular(path) as stream:
            return hashlib.sha256(stream.read(SAMPLED_BYTES)).digest()
    except (OSError, InputError):  # named when the image is read
        return b""
