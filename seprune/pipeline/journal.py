"""The journal of a run folder: one checksummed line for every stage that is finished."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from seprune.errors import InputError
from seprune.runtime.files import append_line, write_text
from seprune.runtime.paths import fault_in
from seprune.runtime.reading import parse_json, read_bytes, read_lines
from seprune.runtime.typed import typed

FORMAT = 1
"""Of the journal. A larger number in a folder means that a newer seprune wrote it."""
JOURNAL = "journal.jsonl"
MOST_LINES, MOST_FILES = 10_000, 1_000  # a run has some dozen stages, each of a few files


@dataclass(frozen=True)
class Record:
    """One committed stage: a line of the journal."""

    stage: str
    key: str  # hash of all that the stage depends on
    files: Mapping[str, str]  # name relative to the run folder: sha256
    facts: Mapping[str, Any]
    time: str


def stage_key(**depends: Any) -> str:
    """The hash of all that a stage depends on: settings, hashes of files, keys of other stages."""
    text = json.dumps(depends, sort_keys=True, allow_nan=False, default=str)
    return hashlib.sha256(text.encode()).hexdigest()


def add(folder: Path, record: Record) -> None:
    """Write one more line and wait until the disk has it."""
    append_line(folder / JOURNAL, _line(record))


def mend(folder: Path) -> None:
    """Drop lines that are damaged or cut short, which would swallow the next one.

    Raises:
        InputError: a newer seprune wrote the folder.
    """
    records, damaged = read_journal(folder)
    if damaged or not _ends_with_a_newline(folder / JOURNAL):
        write_text(folder / JOURNAL, "".join(_line(r) + "\n" for r in records))


def _line(record: Record) -> str:
    body = {"format": FORMAT, **asdict(record)}
    return json.dumps({**body, "sum": _checksum(body)}, allow_nan=False, ensure_ascii=False)


def _checksum(body: Mapping[str, Any]) -> str:
    text = json.dumps(body, sort_keys=True, allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def read_journal(folder: Path) -> tuple[list[Record], list[int]]:
    """The intact records, and the numbers of damaged lines; a last line cut short is neither.

    A line with the name of a file outside of the folder counts as damaged.

    Raises:
        InputError: a newer seprune wrote the folder, or its journal is no regular file or too long.
    """
    path = folder / JOURNAL
    records: list[Record] = []
    damaged: list[int] = []
    try:
        *lines, last = read_lines(path, limit=MOST_LINES)
    except FileNotFoundError:
        return records, damaged
    for number, line in enumerate(lines, start=1):
        record = _record(line, path)
        if record:
            records.append(record)
        else:
            damaged.append(number)
    if last and (record := _record(last, path)):
        records.append(record)
    return records, damaged


def _record(line: bytes, path: Path) -> Record | None:
    try:
        body = parse_json(line)
        if body.pop("sum") != _checksum(body):
            return None
        written = body.pop("format")
        if written <= FORMAT:
            made = typed(Record, body, source=str(path), fix="")
            if len(made.files) > MOST_FILES:
                return None
            return None if any(fault_in(path.parent, name) for name in made.files) else made
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError, InputError):
        return None
    raise InputError(
        f"{path.parent}: written by a newer seprune",
        why=f"its journal has format {written}, this version reads up to {FORMAT}",
        fix="pip install --upgrade seprune, or choose another --out",
        code="newer",
    )


def _ends_with_a_newline(path: Path) -> bool:
    return not path.exists() or read_bytes(path)[-1:] in (b"", b"\n")
