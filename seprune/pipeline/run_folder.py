"""The run folder: one holder at a time, and stages that count only when the journal says so."""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, TypedDict

from seprune.errors import InputError, UsageError
from seprune.pipeline.journal import JOURNAL, Record, add, mend, read_journal, stage_key
from seprune.runtime.checksums import SUMS, check_sums, holds, sha256
from seprune.runtime.environment import environment
from seprune.runtime.files import bytes_of, json_text, remove_folders, write_together
from seprune.runtime.interrupts import safe_point, unbroken
from seprune.runtime.lock import hold, now
from seprune.runtime.paths import inside
from seprune.runtime.reading import read_json, read_text
from seprune.runtime.transaction import RECORD, is_staged, settle
from seprune.runtime.typed import fits

RECIPE, ENVIRONMENT = "recipe.yaml", "environment.json"
START = "start"
_STATE, _KEY = "state", "stage"  # of a training, and what it stands on
"""The stage that says which recipe the folder belongs to, and on what it runs."""
MAY_DIFFER = ("device", "threads", "memory", "data.workers", "data.cache")
"""Keys of a recipe that change how a run is carried out, not what comes out of it."""


class StartFacts(TypedDict):
    """The facts of `START`: dotted keys of the recipe and their values as text."""

    recipe: dict[str, str]


@dataclass(frozen=True)
class RunFolder:
    """A run folder; reading one needs no lock, `open_run` gives one to write in."""

    path: Path

    def records(self) -> list[Record]:
        """Every intact line of the journal, oldest first.

        Raises:
            InputError: a newer seprune wrote the folder.
        """
        return read_journal(self.path)[0]

    def committed(self, stage: str, key: str, facts: type[Any] = dict) -> Record | None:
        """The stage's record, if it ran with this key and its files are still what it wrote.

        Args:
            facts: what its numbers have to be; others are not ours, whatever their checksum says.
        """
        for record in reversed(self.records()):
            if (record.stage, record.key) == (stage, key):
                return record if fits(facts, record.facts) and not self.changed(record) else None
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

        Raises:
            StoppedError: a signal came, and a library may have swallowed it on the way here.
        """
        safe_point()
        with unbroken():
            hashes = {self._relative(name): sha256(self.path / name) for name in files}
            record = Record(stage, key, hashes, dict(facts), now())
            add(self.path, record)
        return record

    def changed(self, record: Record) -> list[str]:
        """Files of a record that are missing or no longer what was committed."""
        return [n for n, h in record.files.items() if not holds(self.path, n, h)]

    def _relative(self, name: str | Path) -> str:
        return (self.path / name).relative_to(self.path).as_posix()


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
    with hold(out):
        run = RunFolder(out)
        _settle(run, recipe_text)
        yield run


def kept_threads(folder: Path | None) -> Any:
    """The choice of threads that a run folder's environment.json holds; None where it has none."""
    try:
        return read_json(folder / ENVIRONMENT).get("threads") if folder is not None else None
    except (OSError, InputError, AttributeError):  # absent, or damaged and then written anew
        return None


def verify(folder: Path) -> list[str]:
    """What is wrong with a run or a saved model: damaged lines, missing or changed files.

    Raises:
        InputError: nothing in the folder says what should be in it, or a newer seprune wrote it.
    """
    for unfinished in _written(folder, RECORD):
        settle(unfinished.parent)
    sums = _written(folder, SUMS)
    if not (folder / JOURNAL).is_file() and not sums:
        raise InputError(
            f"{folder}: nothing to verify",
            why=f"it holds neither {JOURNAL} nor {SUMS}",
            fix="name a run folder or a folder that seprune saved a model in",
        )
    records, damaged = read_journal(folder)
    problems = [f"{JOURNAL}: line {number} is damaged" for number in damaged]
    right = cache(lambda name, digest: holds(folder, name, digest))  # stages share files
    for record in {record.stage: record for record in records}.values():
        for name in (n for n, digest in record.files.items() if not right(n, digest)):
            state = "changed" if (folder / name).exists() else "missing"
            problems.append(f"{name}: {state} since stage {record.stage} was committed")
    for path in sums:
        for name in check_sums(path.parent):
            where = (path.parent / name).relative_to(folder).as_posix()
            problems.append(f"{where}: missing or not what {SUMS} says")
    for path in _written(folder, "*.sha256"):  # beside the state of a training
        for name in check_sums(path.parent, path.name):
            where = (path.parent / name).relative_to(folder).as_posix()
            problems.append(f"{where}: missing or not what {path.name} says")
    return problems


def _written(folder: Path, pattern: str) -> list[Path]:
    """Files of this name, but not those that a killed writer has left half done."""
    found = (path for path in folder.rglob(pattern) if not is_staged(path.relative_to(folder)))
    return sorted(found)


def keep_state_of(home: Path, key: str) -> None:
    """Remove the state of a training that stood on something else than `key` names."""
    state = home / _STATE
    content = bytes_of(f"{key}\n".encode())
    digest = hashlib.sha256(f"{key}\n".encode()).hexdigest()
    if not holds(state, _KEY, digest):
        remove_folders(home, _STATE)
    sums = bytes_of(f"{digest}  {_KEY}\n".encode())
    write_together(state, {_KEY: content, f"{_KEY}.sha256": sums})


def _settle(run: RunFolder, recipe_text: str) -> None:
    """Make the folder this recipe's, after a look at what is there already."""
    wanted = _entries(recipe_text)
    records, _ = read_journal(run.path)
    if any(record.stage != START for record in records):
        _refuse_another_recipe(run.path, _recipe_before(run.path, records), wanted)
    mend(run.path)
    facts = environment(run.path, devices="torch" in sys.modules)
    lasting = {name: value for name, value in facts.items() if name != "disk_free"}
    key = stage_key(recipe=recipe_text, environment=lasting)
    if run.committed(START, key) is None:
        texts = {RECIPE: recipe_text, ENVIRONMENT: json_text(facts)}
        write_together(run.path, {n: bytes_of(t.encode()) for n, t in texts.items()})
        run.commit(START, key, files=list(texts), facts={"recipe": wanted})


def _recipe_before(folder: Path, records: Sequence[Record]) -> Mapping[str, str]:
    """Dotted keys and values of the recipe that the folder was started with."""
    for record in reversed(records):
        if record.stage == START and fits(StartFacts, record.facts):
            found: Mapping[str, str] = record.facts["recipe"]
            return found
    try:  # that line of the journal is damaged
        return _entries(read_text(inside(folder, RECIPE)))
    except (OSError, InputError):
        return {}


def _refuse_another_recipe(folder: Path, before: Mapping[str, str], now: Mapping[str, str]) -> None:
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
