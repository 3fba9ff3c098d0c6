"""Saved folders on a Hub."""

from __future__ import annotations

from pathlib import Path

from seprune.errors import InputError
from seprune.models.hub import HubRepo, fetch, fetch_config
from seprune.runtime.files import SUMS, SUMS_LIMIT
from seprune.runtime.reading import read_text


def pushed(name: str) -> Path:
    """`pushed_folder`, of a repository that seprune pushed.

    Raises:
        InputError: it did not.
    """
    folder = pushed_folder(name)
    if folder is None:
        raise InputError(
            f"{name}: not pushed by seprune",
            why="its config.json has no 'seprune' entry",
            fix="seprune inspect MODEL takes networks of timm from a Hub, too",
            code="hub",
        )
    return folder


def pushed_folder(name: str) -> Path | None:
    """The folder of `hf-hub:ORG/NAME` in the cache, complete; None where seprune did not push it.

    Raises:
        InputError: no such repository, or one that lacks files.
        EnvironmentFault: no connection, and not in the cache.
    """
    repo = HubRepo.of(name)
    if not isinstance(fetch_config(repo).get("seprune"), dict):
        return None
    sums = fetch(repo, SUMS)
    names = [line.partition("  ")[2] for line in read_text(sums, limit=SUMS_LIMIT).splitlines()]
    for name in names:
        if "/" not in name:  # any other is refused where the folder is read
            fetch(repo, name)
    return sums.parent
