"""`wds:SHARDS`: tar files in the form of WebDataset, every sample of which counts once.

Shards are indexed when they are opened, and images are then read from their place in the file. So
their number is exact and the same in every process; nothing is drawn again, skipped or padded.
"""

from __future__ import annotations

import os
import re
import tarfile
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import IO, Any

from seprune.data.encoded import MOST_CLASSES, Encoded, as_source, encoded, masked, numbered
from seprune.data.folders import EXTENSIONS
from seprune.data.masks import classes_in
from seprune.data.shard_files import local_file
from seprune.data.shard_names import PREFIX, shard_names
from seprune.data.source import REPORTING, Source
from seprune.errors import InputError, first_line
from seprune.runtime.interrupts import safe_point
from seprune.runtime.paths import expanded
from seprune.runtime.reading import open_regular, parse_json, read_text
from seprune.runtime.text import shell_word
from seprune.runtime.timeout import at_most

LABELS = ("cls", "cls.txt", "label", "label.txt", "txt")  # endings of members, the best first
KEYS = ("label", "cls", "class", "class_id", "label_id")  # of a .json
MASKS = ("mask.png", "seg.png", "segmentation.png", "annotation.png", "label.png", "gt.png")
LABEL_LIMIT = 1 << 20  # bytes of a member that is no image
BLOCK = 512  # of a tar
LEAST_SECONDS, LEAST_RATE = 10, 1e6  # for indexing a shard, and bytes a second of it


@dataclass(frozen=True)
class _Place:
    """Where in a shard a member lies."""

    start: int
    size: int


@dataclass
class _Sample:
    """The members of one key by their endings: images, and what may be its label or mask."""

    images: dict[str, _Place] = field(default_factory=dict)
    labels: dict[str, _Place] = field(default_factory=dict)

    def mask(self) -> str | None:
        """The ending of its mask: one of that name, or the PNG beside an image of another kind."""
        named = next((ending for ending in MASKS if ending in self.labels), None)
        return named or ("png" if len(self.images) == 2 and "png" in self.images else None)

    def labelled(self) -> bool:
        """Whether a member says its class."""
        return any(ending in self.labels for ending in (*LABELS, "json"))


@dataclass(frozen=True)
class _Images:
    """Images in shards."""

    paths: tuple[Path, ...]
    keys: tuple[tuple[int, str], ...]
    places: tuple[_Place, ...]
    of: str = ""

    def name(self, row: int) -> str:
        shard, key = self.keys[row]
        return f"{self.paths[shard]}, sample {key}{self.of}"

    def holders(self) -> Sequence[Path]:
        return self.paths

    def read(self, row: int) -> bytes:
        with open_regular(self.paths[self.keys[row][0]]) as stream:
            return _read(stream, self.places[row])


def shards(source: str, mode: str | None, task: str | None) -> Source:
    """The images and classes, or masks, of `wds:SHARDS`.

    SHARDS is a folder of tar files, or names or URLs in WebDataset's form: `a-{000..009}.tar`,
    several with `::` between them. Shards whose name or folder says val, valid or test report;
    without any a fifth of every class does. A sample is an image and its class: a number or a name
    in a .cls or .txt, or in a .json; or an image and its mask. A `classes.txt` beside local shards
    names the classes.

    Raises:
        UsageError: no such scheme; commands (`pipe:`) are never run.
        InputError: no such shards, a broken or an empty one, a sample without an image or a label.
        EnvironmentFault: no connection, or `webdataset` is not installed.
    """
    given = shard_names(source)
    paths = {url: local_file(url) for url in given}
    reporting = [p for u, p in paths.items() if _reports(u, source)]
    both = [[p for p in paths.values() if p not in reporting], reporting]
    parts = [part for part in both if part]
    masks = _holds_masks(parts[0][0], task)
    found = [_indexed(part, masks) for part in parts]
    names = _names(next(iter(paths.values())).parent)
    made: Sequence[Encoded]
    if masks:
        made = pairs = [masked(images, own, len(images.keys)) for images, own in found]
        classes = classes_in(pairs, names)
    else:
        classes = names or _classes([label for _, labels in found for label in labels])
        made = [_part(images, labels, classes) for images, labels in found]
    counts = (f"{len(p.labels):,} images (shards: {len(s)})" for p, s in zip(made, parts))
    return as_source(source, classes, made, mode=mode, notes=[", ".join(counts)])


def _holds_masks(path: Path, task: str | None) -> bool:
    """Whether masks are asked for, or the first sample has one and no class."""
    if task is not None:
        return task == "segmentation"
    with open_regular(path) as stream:
        first = next(iter(_samples(path, stream).values()))
    return first.mask() is not None and not first.labelled()


def _reports(url: str, source: str) -> bool:
    """Whether the name of a shard, or of a folder below the one that was given, says so."""
    root = str(expanded(source.removeprefix(PREFIX)))
    below = url.removeprefix(root) if url.startswith(root + os.sep) else url
    words = re.split(r"[^a-z]+", "/".join(below.split("/")[-2:]).lower())
    return bool(set(words) & set(REPORTING))


# -- reading -------------------------------------------------------------------------------------


def _indexed(paths: Sequence[Path], masks: bool) -> tuple[_Images, Any]:
    """Every sample of some shards, and its label or its mask."""
    keys, places = [], []
    others: list[Any] = []
    for number, path in enumerate(paths):
        with open_regular(path) as stream:
            for key, sample in _samples(path, stream).items():
                own = _mask(path, key, sample) if masks else None
                places.append(_image(path, key, sample))
                keys.append((number, key))
                others.append(own or _label(path, stream, key, sample))
        safe_point()
    images = _Images(tuple(paths), tuple(keys), tuple(places))
    return images, replace(images, places=tuple(others), of=", mask") if masks else others


def _image(path: Path, key: str, sample: _Sample) -> _Place:
    """Where the only image of a sample lies."""
    if not sample.images:
        raise _wrong(path, key, "no image", f"it ends in {', '.join(sample.labels)}")
    if len(sample.images) > 1:
        why = "each sample is one image and its class, or with --task segmentation its mask"
        raise _wrong(path, key, "two images", why)
    return next(iter(sample.images.values()))


def _mask(path: Path, key: str, sample: _Sample) -> _Place:
    """Where the mask of a sample lies; it is no image of it from then on."""
    ending = sample.mask()
    if ending is None:
        there = ", ".join((*sample.images, *sample.labels))
        why = f"it ends in .{', .'.join(MASKS[:2])}, or in .png beside a JPEG; there is {there}"
        raise _wrong(path, key, "no mask", why)
    return sample.labels[ending] if ending in sample.labels else sample.images.pop(ending)


def _samples(path: Path, stream: IO[bytes]) -> dict[str, _Sample]:
    """The samples of a shard by their keys, in order."""
    found: dict[str, _Sample] = {}
    size, end = os.fstat(stream.fileno()).st_size, 0
    if stream.read(2) == b"\x1f\x8b":
        raise _broken(path, "it is compressed, so no sample has a place", f"gunzip {path}")
    stream.seek(0)
    seconds = LEAST_SECONDS + size / LEAST_RATE
    try:
        with (
            at_most(seconds, lambda: TimeoutError(f"no end within {seconds:.0f} s")),
            tarfile.open(fileobj=stream, mode="r:") as archive,
        ):
            for member in archive:
                # a size may be negative, or that of what holes stand for: places would be wrong
                if not 0 <= end <= member.offset or member.size < 0 or member.issparse():
                    raise ValueError(f"the place of {member.name[:80]} in it cannot be")
                end = member.offset_data + -(-member.size // BLOCK) * BLOCK
                if member.isfile():
                    _put(path, found, member.name, _Place(member.offset_data, member.size))
                if end > size:
                    break
    except InputError:
        raise
    except Exception as error:  # headers that are not what tar writes end in nearly anything
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
    kind = sample.images if f".{ending.lower()}" in EXTENSIONS else sample.labels
    if ending.lower() in kind:
        raise _wrong(path, stem, f"two members .{ending.lower()}", "each ending is there once")
    kind[ending.lower()] = place


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
    text = read_text(path, lines=MOST_CLASSES) if path.is_file() else ""
    return tuple(filter(None, map(str.strip, text.splitlines())))


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
