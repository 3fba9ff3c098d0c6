"""Images in folders: train/CLASS/IMAGE and val/CLASS/IMAGE, or CLASS/IMAGE alone."""

from __future__ import annotations

import difflib
import os
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image

from seprune.data import fingerprint
from seprune.data.decode import FORMATS, range_of_files, read_image
from seprune.data.deep_pixels import Range, scale_notes
from seprune.data.source import (
    REPORTED,
    REPORTING,
    SPLIT_SEED,
    TRAINING,
    set_aside,
    stratified,
)
from seprune.errors import InputError
from seprune.runtime.text import shell_word

EXTENSIONS = {ending for endings in FORMATS.values() for ending in endings}


class Files:
    """Image files with the number of their class; `scale` is that of images of many bits."""

    def __init__(
        self, paths: list[Path], labels: list[int], mode: str, *, scale: Range | None = None
    ):
        self.paths, self.mode, self.scale = paths, mode, scale
        self.labels = torch.tensor(labels, dtype=torch.int64)

    def __call__(self, row: int) -> Image.Image:
        return read_image(self.paths[row], self.mode, self.scale)

    def without(self, rows: set[int]) -> Files:
        kept = [i for i in range(len(self.paths)) if i not in rows]
        paths, labels = [self.paths[i] for i in kept], self.labels[kept].tolist()
        return Files(paths, labels, self.mode, scale=self.scale)


@dataclass(frozen=True)
class Folder:
    """The images of a folder.

    `digest` is their fingerprint; `notes` say what was left out and how deep images are scaled.
    """

    classes: tuple[str, ...]
    train: Files
    val: Files
    digest: str
    notes: tuple[str, ...] = ()


def find_images(root: Path, mode: str) -> Folder:
    """The training and the reporting images under `root`, and their classes.

    Raises:
        InputError: missing folders, an empty class, classes that differ between the parts.
    """
    parts = _parts(root)
    left_out: Counter[str] = Counter()
    train, *reporting = (_scan(part, left_out) for part in parts)
    classes = tuple(sorted(train))
    if not reporting:
        return _split(root, train, mode, left_out)
    val = reporting[0]
    _require_same_classes(root, set(train), set(val))
    splits: list[tuple[list[Path], list[int]]] = []
    for found in (train, val):
        paths = [path for name in classes for path in found[name]]
        labels = [i for i, name in enumerate(classes) for _ in found[name]]
        splits.append((paths, labels))
    scale = range_of_files(splits[0][0])
    files = [Files(*split, mode, scale=scale) for split in splits]
    digest = fingerprint.of_files(root, [*splits[0][0], *splits[1][0]])
    notes = (*_left_out(left_out), *scale_notes(scale))
    if parts[1].name != "val":
        notes = (f"{parts[1]} reports, since there is no val/", *notes)
    return Folder(classes, files[0], files[1], digest, notes)


def _split(root: Path, found: dict[str, list[Path]], mode: str, left_out: Counter[str]) -> Folder:
    """Folders of classes alone: a fifth of every class reports, the same images for everybody."""
    paths = [path for name in sorted(found) for path in found[name]]
    labels = torch.tensor([i for i, n in enumerate(sorted(found)) for _ in found[n]])
    rows = stratified(labels, torch.arange(len(paths)), fraction=REPORTED, seed=SPLIT_SEED)
    scale = range_of_files(paths)
    train, val = (
        Files([paths[r] for r in part.tolist()], labels[part].tolist(), mode, scale=scale)
        for part in rows
    )
    note = set_aside(len(val.paths), len(paths), of="every class")
    notes = (note, *_left_out(left_out), *scale_notes(scale))
    return Folder(tuple(sorted(found)), train, val, fingerprint.of_files(root, paths), notes)


def _left_out(endings: Counter[str]) -> tuple[str, ...]:
    """How many files are no images, by the endings of their names."""
    if not endings:
        return ()
    ordered = sorted(endings.items(), key=lambda item: (-item[1], item[0]))
    named = ", ".join(f"{n} {e or 'without an ending'}" for e, n in ordered[:5])
    more = f", and {len(endings) - 5} other endings" if len(endings) > 5 else ""
    total = sum(endings.values())
    return (f"{total} files in the class folders are left out by their endings: {named}{more}",)


def _parts(root: Path) -> list[Path]:
    """The folders that train and report; one alone, which is split, where there is no other."""
    _require_folder(root)
    names = sorted(p.name for p in root.iterdir()) if root.is_dir() else []
    folders = [n for n in names if (root / n).is_dir() and not n.startswith(".")]
    given = [next((n for n in known if n in folders), None) for known in (TRAINING, REPORTING)]
    train, val = given
    if train and val:
        return [root / train, root / val]
    if train and folders == [train]:
        return [root / train]
    if not train and not val and any(_holds_images(root / n) for n in folders):
        return [root]
    wanted = [f"{known[0]}/" for known, n in zip((TRAINING, REPORTING), given) if n is None]
    near = difflib.get_close_matches("val", set(folders) - {train}, 1, cutoff=0.4)
    raise InputError(
        f"{root}: not a data folder: it has no {' and no '.join(wanted)}",
        why=f"found: {', '.join(names[:8]) or ('nothing' if root.is_dir() else 'a file')}",
        fix=f"mv {shell_word(root / near[0])} {shell_word(root / 'val')}"
        if near and train
        else "arrange the images as train/CLASS/IMAGE and val/CLASS/IMAGE",
    )


def _holds_images(folder: Path) -> bool:
    """Whether there is an image directly in it, as in a folder of a class."""
    with os.scandir(folder) as entries:
        return any(os.path.splitext(entry.name)[1].lower() in EXTENSIONS for entry in entries)


def _require_folder(root: Path) -> None:
    if not root.exists():
        near = difflib.get_close_matches(str(root), ["digits"], 1)
        if not near and root.parent.is_dir():
            names = [p.name for p in root.parent.iterdir() if p.is_dir()]
            near = [str(root.parent / n) for n in difflib.get_close_matches(root.name, names, 1)]
        raise InputError(
            f"{root}: no such data folder",
            why="data is `digits`, a folder, torchvision/NAME:FOLDER, hf:NAME or wds:SHARDS",
            fix=f"did you mean {near[0]}?" if near else "check the path",
        )


def _scan(part: Path, left_out: Counter[str]) -> dict[str, list[Path]]:
    try:
        classes = sorted(p for p in part.iterdir() if p.is_dir() and not p.name.startswith("."))
        found = {folder.name: sorted(_images_under(folder, left_out)) for folder in classes}
    except OSError as error:
        raise InputError(
            f"{error.filename or part}: cannot be read",
            why=error.strerror or str(error),
            fix="check that you may read the folder",
        ) from error
    if not found:
        raise InputError(
            f"{part}: no class folders",
            why="the class of an image is the name of its folder",
            fix=f"put the images into {part}/CLASS/",
        )
    empty = [name for name, images in found.items() if not images]
    if empty:
        raise InputError(
            f"{part / empty[0]}: the class folder holds no images"
            + (f" ({len(empty) - 1} more like it)" if len(empty) > 1 else ""),
            why=f"images end in {', '.join(sorted(EXTENSIONS))}",
            fix="add images of this class, or delete the folder in train/ and val/",
        )
    return found


def _images_under(folder: Path, left_out: Counter[str]) -> Iterable[Path]:
    """Every image once, however links lead to it: of links in circles there would be no end."""
    waiting, seen = [folder], set[tuple[int, int]]()
    while waiting:
        place = waiting.pop()
        found = place.stat()
        if (found.st_dev, found.st_ino) in seen:
            continue
        seen.add((found.st_dev, found.st_ino))
        with os.scandir(place) as entries:
            for entry in sorted(entries, key=lambda e: (e.is_symlink(), e.name), reverse=True):
                if entry.is_dir():
                    waiting.append(Path(entry.path))  # links come last off the stack
                elif entry.name[0] == ".":
                    continue
                elif (ending := os.path.splitext(entry.name)[1].lower()) in EXTENSIONS:
                    yield _regular(entry)
                else:
                    left_out[ending] += 1


def _regular(entry: os.DirEntry[str]) -> Path:
    """The path of an image; a dangling link is named when it is read."""
    if not entry.is_file() and os.path.exists(entry.path):
        raise InputError(
            f"{entry.path}: not a regular file",
            why="it is a pipe, a device or a socket with the name of an image",
            fix=f"rm {shell_word(entry.path)}",
            code="unreadable",
        )
    return Path(entry.path)


def _require_same_classes(root: Path, train: set[str], val: set[str]) -> None:
    if train == val:
        return
    sides = (("only in train", train - val), ("only in val", val - train))
    raise InputError(
        f"{root}: train/ and val/ hold different class folders",
        why="; ".join(f"{where}: {', '.join(sorted(n)[:5])}" for where, n in sides if n),
        fix="give both parts the same class folders",
    )
