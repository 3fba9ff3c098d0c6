"""SHA-256 of files, and of whatever lies in a folder."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Mapping
from pathlib import Path

from seprune.errors import InputError
from seprune.runtime.paths import fault_in, inside
from seprune.runtime.reading import open_regular, read_text
from seprune.runtime.transaction import settle

SUMS, CARD, PICTURE = "SHA256SUMS", "README.md", "accuracy.png"
REPORT, ARTEFACTS = "report.json", "artefacts.json"  # what was measured, of whatever is beside it
_NOT_CONTENT = (SUMS, CARD, PICTURE, REPORT, ARTEFACTS, "lock", "lock.json")
SUMS_LIMIT = 1 << 20  # bytes


def sha256(path: Path) -> str:
    """The hexadecimal SHA-256 of a regular file."""
    with open_regular(path) as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def check_sums(folder: Path, sums: str = SUMS, *, need: Collection[str] = ()) -> list[str]:
    """Names of the files in `folder` that are missing or differ from its `SHA256SUMS`.

    Args:
        sums: another name of that file.
        need: names that it has to list.
    """
    settle(folder)
    try:
        text = read_text(inside(folder, sums), limit=SUMS_LIMIT)
    except (OSError, InputError):
        return [sums]
    lines = text.split("\n")
    if lines.pop():  # the last line is cut short
        return [sums]
    listed = {line.partition("  ")[2] for line in lines}
    complete = lines and listed.issuperset(need) and len(listed) == len(lines)
    wrong = [] if complete else [sums]
    for line in lines:
        digest, _, name = line.partition("  ")
        if "/" in name or not holds(folder, name, digest):
            wrong.append(name or line)
    return wrong


def holds(folder: Path, name: str, digest: str) -> bool:
    """Whether `name`, as a file in `folder` has it, is a file there with this SHA-256."""
    try:
        return fault_in(folder, name) is None and sha256(folder / name) == digest
    except (OSError, InputError):  # missing, or a file that cannot be read
        return False


def sums_of(folder: Path, known: Mapping[str, str]) -> str:
    """The lines of `SHA256SUMS`: `known` hashes, and those of whatever else is there."""
    there = {p.name: p for p in folder.iterdir() if p.is_file() and is_content(p.name)}
    hashes = {name: known.get(name) or sha256(path) for name, path in there.items()} | dict(known)
    return "".join(f"{hashes[name]}  {name}\n" for name in sorted(hashes))


def is_content(name: str) -> bool:
    """Whether `SHA256SUMS` lists a file of this name."""
    return name not in _NOT_CONTENT and not name.startswith(".")
