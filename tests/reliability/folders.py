"""What is in a folder, before and after."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below `folder`."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def tree(folder: Path) -> dict[str, tuple[str, int]]:
    """Digest and modification time of every file below `folder`."""
    return {
        name: (hashlib.sha256(content).hexdigest(), (folder / name).stat().st_mtime_ns)
        for name, content in contents(folder).items()
    }


@contextmanager
def untouched(folder: Path) -> Iterator[None]:
    """What is below `folder` stays byte for byte as it is."""
    before = tree(folder)
    yield
    assert tree(folder) == before


def leftovers(folder: Path) -> list[str]:
    """Temporary files below `folder`."""
    return [str(p.relative_to(folder)) for p in folder.rglob("*.part")]


def stages(run: Path) -> list[str]:
    """The stages that the journal of a run folder says are finished; `start` is none."""
    journal = run / "journal.jsonl"
    lines = journal.read_text().splitlines() if journal.exists() else []
    return [name for line in lines if (name := json.loads(line)["stage"]) != "start"]
