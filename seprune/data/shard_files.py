"""Shards as files of this machine; those behind URLs are downloaded into a cache."""

from __future__ import annotations

import hashlib
import http.client
import os
import re
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

from seprune.errors import EnvironmentFault, InputError, first_line
from seprune.runtime.files import write_with
from seprune.runtime.interrupts import safe_point
from seprune.runtime.paths import cache_folder, expanded

CHUNK = 1 << 20
PATIENCE = 20.0  # seconds without an answer


def local_file(url: str) -> Path:
    """The file of a shard; one behind a URL is downloaded into the cache, whole or not at all."""
    if not url.startswith(("http:", "https:")):
        path = expanded(url)
        if not path.is_file():
            raise InputError(
                f"{path}: no such shard",
                why="there is a folder of this name" if path.is_dir() else "there is no such file",
                fix="check the path, and the numbers between the braces",
            )
        return path
    name = re.sub(r"[^\w.-]", "_", url.rpartition("/")[2].partition("?")[0]) or "shard.tar"
    path = _cache() / f"{hashlib.sha256(url.encode()).hexdigest()[:12]}-{name}"
    if not path.is_file():
        try:
            with urllib.request.urlopen(url, timeout=PATIENCE) as answer:
                promised = int(answer.headers.get("Content-Length") or 0)
                write_with(path, lambda place: _copy(url, answer, place, promised), need=promised)
        except (OSError, http.client.HTTPException) as error:
            raise _not_fetched(url, error) from error
    return path


def _copy(url: str, answer: Any, place: Path, promised: int) -> None:
    with place.open("wb") as target:
        for part in iter(lambda: answer.read(CHUNK), b""):
            target.write(part)
            safe_point()
    if promised and (came := place.stat().st_size) != promised:
        raise InputError(
            f"{url}: the transfer broke off",
            why=f"{came:,} of {promised:,} bytes came; nothing was kept",
            fix="run the same command again",
            code="hub-damaged",
        )


def _not_fetched(url: str, error: Exception) -> InputError | EnvironmentFault:
    if isinstance(error, urllib.error.HTTPError):
        return InputError(
            f"{url}: no such shard, or a private one",
            why=f"the server says {error.code} {error.reason}",
            fix="check the URL, and the numbers between the braces",
            code="hub",
        )
    return EnvironmentFault(
        f"{url}: cannot be downloaded, and is not in the cache",
        why=first_line(error),
        fix=f"where there is a connection: curl -fLO {url}; then here, with a folder of such "
        "files: --data wds:FOLDER",
        code="offline",
    )


def _cache() -> Path:
    """Where downloaded shards lie; webdataset's own variable names another place."""
    if given := os.environ.get("WDS_CACHE"):
        return Path(given)
    return cache_folder("shards")
