"""`wds:SHARDS`: tar files in the form of WebDataset, every sample of which counts once.

Shards are indexed when they are opened, and images are then read from their place in the file. So
their number is exact and the same in every process; nothing is drawn again, skipped or padded.
"""

from __future__ import annotations

import hashlib
import http.client
import os
import re
import tarfile
import urllib.error
import urllib.request
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from seprune.data.encoded import Encoded, as_source, encoded, numbered
from seprune.data.folders import EXTENSIONS
from seprune.data.source import REPORTING, Source
from seprune.errors import EnvironmentFault, InputError, UsageError, first_line
from seprune.runtime.extras import require
from seprune.runtime.files import write_with
from seprune.runtime.interrupts import safe_point
from seprune.runtime.reading import open_regular, parse_json, read_text
from seprune.runtime.text import shell_word

PREFIX = "wds:"
LABELS = ("cls", "cls.txt", "label", "label.txt", "txt")  # endings of members, the best first
KEYS = ("label", "cls", "class", "class_id", "label_id")  # of a .json
LABEL_LIMIT = 1 << 20  # bytes of a member that is no image
CHUNK = 1 << 20
BLOCK = 512  # of a tar
PATIENCE = 20.0  # seconds without an answer


@dataclass(frozen=True)
class _Place:
    """Where in a shard a member lies."""

    start: int
    size: int


@dataclass
class _Sample:
    """The members of one key: its image, and what may be its label by their endings."""

    image: _Place | None = None
    labels: dict[str, _Place] = field(default_factory=dict)


@dataclass(frozen=True)
class _Images:
    """Images in shards."""

    paths: tuple[Path, ...]
    keys: tuple[tuple[int, str], ...]
    places: tuple[_Place, ...]

    def name(self, row: int) -> str:
        shard, key = self.keys[row]
        return f"{self.paths[shard]}, sample {key}"

    def read(self, row: int) -> bytes:
        with open_regular(self.paths[self.keys[row][0]]) as stream:
            return _read(stream, self.places[row])


def shards(source: str, mode: str | None) -> Source:
    """The images and classes of `wds:SHARDS`.

    SHARDS is a folder of tar files, or names or URLs in WebDataset's form: `a-{000..009}.tar`,
    several with `::` between them. Shards whose name or folder says val, valid or test report;
    without any a fifth of every class does. A sample is an image and its class: a number or a name
    in a .cls or .txt, or in a .json. A `classes.txt` beside local shards names the classes.

    Raises:
        UsageError: no such scheme; commands (`pipe:`) are never run.
        InputError: no such shards, a broken or an empty one, a sample without an image or a label.
        EnvironmentFault: no connection, or `webdataset` is not installed.
    """
    given = _expanded(source)
    paths = {url: _local(url) for url in given}
    reporting = [p for u, p in paths.items() if _reports(u, source)]
    parts = [[p for p in paths.values() if p not in reporting], reporting]
    found = [_indexed(part) for part in parts if part]
    names = _names(next(iter(paths.values())).parent)
    classes = names or _classes([label for _, labels in found for label in labels])
    made = [_part(images, labels, classes) for images, labels in found]
    counts = ", ".join(
        f"{len(p.labels):,} images (shards: {len(s)})" for p, s in zip(made, filter(None, parts))
    )
    return as_source(source, classes, made, mode=mode, notes=[counts])


def _expanded(source: str) -> list[str]:
    """Every shard that the source names, in order."""
    spec = source.removeprefix(PREFIX)
    folder = Path(spec).expanduser()
    if folder.is_dir():
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
    library = require("webdataset", extra="webdataset", what=f"{source} needs a package")
    try:
        return [url.removeprefix("file:") for url in library.shardlists.expand_urls(spec)]
    except ValueError as error:
        raise UsageError(
            f"{source}: not a list of shards",
            why=first_line(error),
            fix="write wds:train-{000..009}.tar",
        ) from error


def _reports(url: str, source: str) -> bool:
    """Whether the name of a shard, or of a folder below the one that was given, says so."""
    root = str(Path(source.removeprefix(PREFIX)).expanduser())
    below = url.removeprefix(root) if url.startswith(root + os.sep) else url
    words = re.split(r"[^a-z]+", "/".join(below.split("/")[-2:]).lower())
    return bool(set(words) & set(REPORTING))


# -- reading -------------------------------------------------------------------------------------


def _indexed(paths: Sequence[Path]) -> tuple[_Images, list[Any]]:
    """Every sample of some shards, and its label."""
    keys, places, labels = [], [], []
    for number, path in enumerate(paths):
        with open_regular(path) as stream:
            samples = _samples(path, stream)
            for key, sample in samples.items():
                if sample.image is None:
                    raise _wrong(path, key, "no image", f"it ends in {', '.join(sample.labels)}")
                keys.append((number, key))
                places.append(sample.image)
                labels.append(_label(path, stream, key, sample))
        safe_point()
    return _Images(tuple(paths), tuple(keys), tuple(places)), labels


def _samples(path: Path, stream: IO[bytes]) -> dict[str, _Sample]:
    """The samples of a shard by their keys, in order."""
    found: dict[str, _Sample] = {}
    size, end = os.fstat(stream.fileno()).st_size, 0
    if stream.read(2) == b"\x1f\x8b":
        raise _broken(path, "it is compressed, so no sample has a place", f"gunzip {path}")
    stream.seek(0)
    try:
        with tarfile.open(fileobj=stream, mode="r:") as archive:
            for member in archive:
                end = member.offset_data + -(-member.size // BLOCK) * BLOCK
                if member.isfile():
                    _put(path, found, member.name, _Place(member.offset_data, member.size))
    except tarfile.TarError as error:
        if size:
            raise _broken(path, first_line(error)) from error
    if not found:
        raise InputError(
            f"{path}: a shard without samples",
            why="it holds no files" if size else "it has 0 bytes",
            fix=f"write it again, or leave it out: rm {shell_word(path)}",
        )
    if size < end + BLOCK:  # blocks of zeros end a tar
        raise _broken(path, "it has no end, so samples may be missing")
    return found


def _put(path: Path, found: dict[str, _Sample], name: str, place: _Place) -> None:
    """A member to its sample: they have the name in common up to its first dot."""
    folder, slash, last = name.rpartition("/")
    stem, _, ending = last.partition(".")
    if not stem:
        return
    sample = found.setdefault(folder + slash + stem, _Sample())
    if f".{ending.lower()}" not in EXTENSIONS:
        sample.labels[ending.lower()] = place
    elif sample.image is None:
        sample.image = place
    else:
        raise _wrong(path, stem, "two images", "each sample is one image and its class")


def _label(path: Path, stream: IO[bytes], key: str, sample: _Sample) -> int | str:
    """The class of a sample: a number, or a name."""
    ending = next((e for e in (*LABELS, "json") if e in sample.labels), None)
    if ending is None:
        there = ", ".join(sample.labels) or "nothing"
        raise _wrong(path, key, "no label", f"beside its image there is {there}")
    place = sample.labels[ending]
    if place.size > LABEL_LIMIT:
        raise _wrong(path, key, "no label", f"its .{ending} has {place.size:,} bytes")
    text = _read(stream, place).decode(errors="replace").strip()
    if ending.startswith("cls") and not re.fullmatch(r"-?\d{1,9}", text):
        raise _wrong(path, key, "no label", f"its .{ending} is {text[:40]!r}, which is no number")
    if ending != "json":
        return int(text) if re.fullmatch(r"-?\d{1,9}", text) else text
    try:
        known = parse_json(text)
    except (InputError, ValueError) as error:
        raise _wrong(
            path, key, "no label", f"its .json cannot be read: {first_line(error)}"
        ) from error
    value = next((known[k] for k in KEYS if k in known), None) if isinstance(known, dict) else None
    if isinstance(value, bool) or not isinstance(value, (int, str)):
        raise _wrong(path, key, "no label", f"its .json has none of {', '.join(KEYS)}")
    return value


def _read(stream: IO[bytes], place: _Place) -> bytes:
    stream.seek(place.start)
    return stream.read(place.size)


def _classes(labels: Sequence[Any]) -> tuple[str, ...]:
    """The classes in the order of their numbers; of names, sorted."""
    if all(isinstance(label, int) for label in labels):
        return numbered(labels)
    return tuple(sorted({str(label) for label in labels}))


def _names(folder: Path) -> tuple[str, ...]:
    path = folder / "classes.txt"
    return (
        tuple(filter(None, map(str.strip, read_text(path).splitlines()))) if path.is_file() else ()
    )


def _part(images: _Images, labels: Sequence[Any], classes: Sequence[str]) -> Encoded:
    numbers = {name: n for n, name in enumerate(classes)}
    made = []
    for (shard, key), label in zip(images.keys, labels):
        number = label if isinstance(label, int) else numbers.get(label, -1)
        if not 0 <= number < len(classes):
            raise _wrong(images.paths[shard], key, f"class {label!r}",
                         f"there are {len(classes)} classes, the first is 0")  # fmt: skip
        made.append(number)
    return encoded(images, made)


def _wrong(path: Path, key: str, what: str, why: str) -> InputError:
    return InputError(
        f"{path}, sample {key}: {what}",
        why=why,
        fix="mend the sample, or write the shards without it",
        code="annotation",
    )


def _broken(path: Path, why: str, fix: str = "") -> InputError:
    return InputError(
        f"{path}: a broken shard",
        why=why,
        fix=fix or f"copy or download it again, after: rm {shell_word(path)}",
        code="damaged",
    )


# -- from elsewhere ------------------------------------------------------------------------------


def _local(url: str) -> Path:
    """The file of a shard; one behind a URL is downloaded into the cache, whole or not at all."""
    if not url.startswith(("http:", "https:")):
        path = Path(url).expanduser()
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
    base = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return Path(base) / "seprune" / "shards"
