"""The names of shards that `wds:SHARDS` stands for, counted before they are made."""

from __future__ import annotations

import math
import os
import re

from seprune.errors import InputError, UsageError, first_line
from seprune.runtime.extras import require
from seprune.runtime.paths import expanded

PREFIX = "wds:"
MOST_SHARDS, LONGEST = 100_000, 20  # digits of a number between braces that are looked at
LETTERS = 52  # of a range such as {a..f}, at most


def shard_names(source: str) -> list[str]:
    """Every shard that the source names, in order."""
    spec = source.removeprefix(PREFIX)
    if not spec:  # else the folder where the command is typed
        raise UsageError(
            f"{source}: names no shards",
            why="nothing stands behind the colon",
            fix="write wds:train-{000..009}.tar, or wds:FOLDER",
        )
    folder = expanded(spec)
    if os.path.isdir(folder):  # a list of names may be longer than a path
        found = sorted(map(str, folder.rglob("*.tar")))
        if not found:
            raise InputError(
                f"{folder}: holds no shards",
                why="shards are files that end in .tar",
                fix="name another folder, or shards as in wds:train-{000..009}.tar",
            )
        return found
    schemes = set(re.findall(r"(?:^|::)([a-z][a-z0-9+]*):(?!:)", spec))
    if odd := sorted(schemes - {"http", "https", "file"}):
        raise UsageError(
            f"{source}: {odd[0]}: is not read",
            why="a command is never run for data"
            if odd == ["pipe"]
            else "shards are files, or behind http and https",
            fix="copy the shards to a folder, and --data wds:FOLDER",
        )
    _require_few(source, spec)
    library = require("webdataset", extra="webdataset", what=f"{source} needs a package")
    try:
        return [url.removeprefix("file:") for url in library.shardlists.expand_urls(spec)]
    except ValueError as error:
        raise UsageError(
            f"{source}: not a list of shards",
            why=first_line(error),
            fix="write wds:train-{000..009}.tar",
        ) from error


def _require_few(source: str, spec: str) -> None:
    """Refuse what would be millions of names, before they are made, and what asks for other things.

    A recipe may come from somebody else: variables of the environment are not put into addresses.
    """
    odd = "$" if "$" in spec else "{...{" if re.search(r"\{[^}]*\{", spec) else None
    if odd is not None:
        raise UsageError(
            f"{source}: {odd} is not read in the names of shards",
            why="a name has numbers between braces: {000..009}, or words: {a,b}",
            fix="write wds:train-{000..009}.tar",
        )
    names = [re.findall(r"\{([^}]*)\}", url) for url in spec.split("::")]
    count = sum(math.prod(map(_choices, groups)) for groups in names)
    if count > MOST_SHARDS:
        raise UsageError(
            f"{source}: names {count:,} shards",
            why=f"there can be {MOST_SHARDS:,} at most",
            fix="write wds:train-{000..009}.tar",
        )


def _choices(group: str) -> int:
    """How many names a group between braces stands for, at most."""
    if found := re.match(r"(-?\d+)\.\.(-?\d+)", group):
        first, last = (int(number[:LONGEST]) for number in found.groups())
        return 1 + abs(last - first)
    return max(LETTERS if ".." in group else 1, 1 + group.count(","))
