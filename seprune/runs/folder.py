"""The run folder: one holder at a time, and stages that count only when the journal says so."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from seprune.errors import EnvironmentFault, InputError, LockedError, UsageError
from seprune.files import SUMS, append_line, check_sums, sha256, write_json, write_text
from seprune.runs.environment import environment
from seprune.runs.interrupts import unbroken

FORMAT = 1
"""Of the journal. A larger number in a folder means that a newer seprune wrote it."""
JOURNAL, RECIPE, ENVIRONMENT = "journal.jsonl", "recipe.yaml", "environment.json"
HOLDER = "lock.json"
"""Beside `lock`, which filelock may empty: who holds the folder."""
MAY_DIFFER = ("device", "data.workers", "data.cache")
"""Keys of a recipe that change how a run is carried out, not what comes out of it."""


@dataclass(frozen=True)
class Record:
    """One committed stage: a line of the journal."""

    stage: str
    key: str  # hash of all that the stage depends on
    files: Mapping[str, str]  # name relative to the run folder: sha256
    facts: Mapping[str, Any]
    time: str


@dataclass(frozen=True)
class RunFolder:
    """A run folder; reading one needs no lock, `open_run` gives one to write in."""

    path: Path

    def records(self) -> list[Record]:
        """Every intact line of the journal, oldest first.

        Raises:
            InputError: a newer seprune wrote the folder.
        """
        return _read_journal(self.path / JOURNAL)[0]

    def committed(self, stage: str, key: str) -> Record | None:
        """The stage's record, if it ran with this key and its files are still what it wrote."""
        for record in reversed(self.records()):
            if (record.stage, record.key) == (stage, key):
                return None if self.changed(record) else record
        return None

    def commit(
        self, stage: str, key: str, *, files: Sequence[str | Path], facts: Mapping[str, Any]
    ) -> Record:
        """Say that a stage is finished: its files are hashed and one line goes to the journal.

        Args:
            stage: a name such as `prune/0.5`.
            key: `stage_key` of all that the stage depends on.
            files: what the stage wrote, relative to the folder.
            facts: numbers for the report; JSON, finite.
        """
        with unbroken():
            hashes = {self._relative(name): sha256(self.path / name) for name in files}
            record = Record(stage, key, hashes, dict(facts), _now())
            append_line(self.path / JOURNAL, _line(record))
        return record

    def changed(self, record: Record) -> list[str]:
        """Files of a record that are missing or no longer what was committed."""
        return [n for n, h in record.files.items() if not _holds(self.path / n, h)]

    def _relative(self, name: str | Path) -> str:
        return (self.path / name).relative_to(self.path).as_posix()


def stage_key(**depends: Any) -> str:
    """The hash of all that a stage depends on: settings, hashes of files, keys of other stages."""
    text = json.dumps(depends, sort_keys=True, allow_nan=False, default=str)
    return hashlib.sha256(text.encode()).hexdigest()


@contextmanager
def open_run(out: Path, recipe_text: str) -> Iterator[RunFolder]:
    """Hold a run folder, new or started before, for as long as the block lasts.

    Args:
        out: the folder; created if need be.
        recipe_text: the resolved recipe, one key per line (`dump_recipe`).

    Raises:
        LockedError: another process holds it.
        UsageError: it belongs to another recipe, or is not a folder.
        InputError: a newer seprune wrote it.
        EnvironmentFault: it cannot be written.
    """
    if out.exists() and not out.is_dir():
        raise UsageError(
            f"{out}: not a folder",
            why="a run writes several files",
            fix="choose another folder with --out",
        )
    lock = FileLock(out / "lock")  # the operating system's: it dies with its process
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
        now = {"pid": os.getpid(), "host": platform.node(), "since": _now()}
        write_json(out / HOLDER, now)
        run = RunFolder(out)
        _settle(run, recipe_text)
        yield run
    finally:
        (out / HOLDER).unlink(missing_ok=True)
        lock.release()


def verify(folder: Path) -> list[str]:
    """What is wrong with a run or a saved model: damaged lines, missing or changed files.

    Raises:
        InputError: nothing in the folder says what should be in it, or a newer seprune wrote it.
    """
    sums = sorted(folder.rglob(SUMS))
    if not (folder / JOURNAL).is_file() and not sums:
        raise InputError(
            f"{folder}: nothing to verify",
            why=f"it holds neither {JOURNAL} nor {SUMS}",
            fix="name a run folder or a folder that seprune saved a model in",
        )
    records, damaged = _read_journal(folder / JOURNAL)
    problems = [f"{JOURNAL}: line {number} is damaged" for number in damaged]
    for record in {record.stage: record for record in records}.values():
        for name in RunFolder(folder).changed(record):
            state = "changed" if (folder / name).exists() else "missing"
            problems.append(f"{name}: {state} since stage {record.stage} was committed")
    for path in sums:
        for name in check_sums(path.parent):
            where = (path.parent / name).relative_to(folder).as_posix()
            problems.append(f"{where}: missing or not what {SUMS} says")
    return problems


def _settle(run: RunFolder, recipe_text: str) -> None:
    """Make the folder this recipe's, after a look at what is there already."""
    records, damaged = _read_journal(run.path / JOURNAL)
    if records:
        _refuse_another_recipe(run.path, recipe_text)
    if damaged or not _ends_whole(run.path / JOURNAL):
        # A line cut short by a power loss would swallow the next one.
        write_text(run.path / JOURNAL, "".join(_line(r) + "\n" for r in records))
    write_text(run.path / RECIPE, recipe_text)
    facts = environment(run.path, devices="torch" in sys.modules)
    write_json(run.path / ENVIRONMENT, facts)


def _refuse_another_recipe(folder: Path, recipe_text: str) -> None:
    try:
        before = _entries((folder / RECIPE).read_text())
    except (OSError, UnicodeDecodeError):
        before = {}
    now = _entries(recipe_text)
    keys = [k for k in {**before, **now} if before.get(k) != now.get(k) and k not in MAY_DIFFER]
    if keys:
        shown = [f"{k} (was {before.get(k, 'absent')}, now {now.get(k, 'absent')})" for k in keys]
        raise UsageError(
            f"{folder}: started with another recipe",
            why=f"it differs in {', '.join(shown[:8])}{' ...' if shown[8:] else ''}",
            fix="choose another --out, or go on with the same recipe",
            code="run-recipe",
        )


def _entries(recipe_text: str) -> dict[str, str]:
    """Dotted keys and their values as text: the dumped recipe has one key per line."""
    entries: dict[str, str] = {}
    path: list[str] = []
    for line in recipe_text.splitlines():
        name, _, value = line.strip().partition(":")
        path = [*path[: (len(line) - len(line.lstrip())) // 2], name]
        if value.strip():
            entries[".".join(path)] = value.strip()
    return entries


def _locked(out: Path) -> LockedError:
    """Who holds the folder. The holder writes its name right after it took the lock: wait."""
    holder: dict[str, Any] = {}
    for _ in range(50):
        try:
            holder = json.loads((out / HOLDER).read_bytes())
            if holder["host"] != platform.node() or _alive(holder["pid"]):
                break
        except (OSError, ValueError, KeyError, TypeError):
            holder = {}
        time.sleep(0.1)
    who = "process {pid} on {host} since {since}".format_map(holder) if holder else "a process"
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


def _line(record: Record) -> str:
    body = {"format": FORMAT, **asdict(record)}
    return json.dumps({**body, "sum": _checksum(body)}, allow_nan=False, ensure_ascii=False)


def _checksum(body: Mapping[str, Any]) -> str:
    text = json.dumps(body, sort_keys=True, allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def _read_journal(path: Path) -> tuple[list[Record], list[int]]:
    """The intact records, and the numbers of damaged lines; an unfinished last line is neither."""
    records: list[Record] = []
    damaged: list[int] = []
    try:
        *lines, _ = path.read_bytes().split(b"\n")
    except FileNotFoundError:
        return records, damaged
    for number, line in enumerate(lines, start=1):
        record = _record(line, path)
        if record:
            records.append(record)
        else:
            damaged.append(number)
    return records, damaged


def _record(line: bytes, path: Path) -> Record | None:
    try:
        body = json.loads(line)
        if body.pop("sum") != _checksum(body):
            return None
        written = body.pop("format")
        if written <= FORMAT:
            return Record(**body)
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return None
    raise InputError(
        f"{path.parent}: written by a newer seprune",
        why=f"its journal has format {written}, this version reads up to {FORMAT}",
        fix="pip install --upgrade seprune, or choose another --out",
        code="newer",
    )


def _ends_whole(path: Path) -> bool:
    return not path.exists() or path.read_bytes()[-1:] in (b"", b"\n")


def _holds(path: Path, digest: str) -> bool:
    return path.is_file() and sha256(path) == digest


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
