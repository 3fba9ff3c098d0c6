"""Images and their masks: images/ beside masks/, in train/ and val/ or not, and Pascal VOC."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from seprune.data import fingerprint
from seprune.data.decode import (
    FORMATS,
    range_of_files,
    read_image,
    read_indices,
    size_of,
)
from seprune.data.deep_pixels import Range, scale_notes
from seprune.data.masks import classes_in
from seprune.data.source import (
    REPORTED,
    REPORTING,
    SPLIT_SEED,
    Source,
    set_aside,
    stratified,
)
from seprune.errors import InputError
from seprune.runtime.reading import read_text

EXTENSIONS = {ending for endings in FORMATS.values() for ending in endings}
MOST_CLASSES, LIST_LIMIT = 100_000, 16 << 20  # lines of classes.txt, bytes of a list of images
MASKS = ("masks", "mask", "annotations", "labels")  # folders beside images/
PARTS = ("train", "val")


@dataclass(frozen=True)
class Pair:
    """An image file and the file with the class of each of its pixels."""

    image: Path
    mask: Path


class Masked:
    """Image files and their masks."""

    def __init__(self, pairs: Sequence[Pair], mode: str, scale: Range | None) -> None:
        self.pairs, self.mode, self.scale = list(pairs), mode, scale
        self.labels = torch.zeros(len(self.pairs), dtype=torch.int64)

    def __call__(self, row: int) -> Image.Image:
        return read_image(self.pairs[row].image, self.mode, self.scale)

    def target(self, row: int) -> np.ndarray[Any, Any]:
        """Class numbers (H, W)."""
        return read_indices(self.pairs[row].mask)

    def size(self, row: int) -> tuple[int, int]:
        """(H, W) of the image."""
        return size_of(self.pairs[row].image)

    def mask_name(self, row: int) -> str:
        """The file of the mask."""
        return str(self.pairs[row].mask)


def find_masks(root: Path, mode: str) -> Source | None:
    """The images and masks below a folder; None where it has no such layout.

    Raises:
        InputError: an image without a mask or the other way round, masks of another size than
            their image, without a class, or with one beyond `classes.txt`; names the file.
    """
    parts = _voc(root) or _beside(root)
    if parts is None:
        return None
    train, val = parts if len(parts) == 2 else _split(parts[0])
    notes = [] if len(parts) == 2 else [set_aside(len(val), len(parts[0]))]
    names = _names(root)
    if not names:
        notes.append(f"classes are as far as the masks go; names stand in {root}/classes.txt")
    scale = range_of_files([pair.image for pair in train])
    splits = [Masked(pairs, mode, scale) for pairs in (train, val)]
    files = [path for pair in (*train, *val) for path in (pair.image, pair.mask)]
    sizes = {size_of(pair.image) for pair in train[:: max(len(train) // 16, 1)]}
    return Source(
        name=str(root),
        classes=classes_in(splits, names),
        train=splits[0],
        val=splits[1],
        fingerprint=fingerprint.of_files(root, files),
        mode=mode,
        native=sizes.pop() if len(sizes) == 1 else None,
        task="segmentation",
        notes=(*notes, *scale_notes(scale)),
    )


def _beside(root: Path) -> list[list[Pair]] | None:
    """images/ and masks/ below the folder, below train/ and val/, or parted further down."""
    report = next((n for n in REPORTING if (root / n).is_dir()), REPORTING[0])
    parts = (PARTS[0], report)
    if all(_mask_folder(root / part) for part in parts):
        return [_pairs(root / part / "images", _of(root / part)) for part in parts]
    lonely = next((part for part in parts if _mask_folder(root / part)), None)
    if lonely is not None:
        other = parts[1 - parts.index(lonely)]
        raise InputError(
            f"{root / lonely}: images and masks, but there are none in {root / other}",
            why="one part trains and the other one reports",
            fix=f"mkdir -p {root / other}/images {root / other}/masks, or move images/ and masks/ "
            f"up to {root}: they are then split by a seed",
            code="pair",
        )
    folder = _mask_folder(root)
    if folder is None:
        return None
    if all((root / "images" / part).is_dir() for part in PARTS):
        return [_pairs(root / "images" / part, folder / part) for part in PARTS]
    return [_pairs(root / "images", folder)]


def _of(root: Path) -> Path:
    folder = _mask_folder(root)
    assert folder is not None
    return folder


def _mask_folder(root: Path) -> Path | None:
    """The folder of masks beside images/: called masks, or by another name with PNGs inside."""
    if not (root / "images").is_dir():
        return None
    for name in MASKS:
        folder = root / name
        if folder.is_dir() and (name in MASKS[:2] or any(folder.rglob("*.png"))):
            return folder
    return None


def _voc(root: Path) -> list[list[Pair]] | None:
    """Pascal VOC: JPEGImages/, SegmentationClass/ and the lists in ImageSets/Segmentation/."""
    images, masks = root / "JPEGImages", root / "SegmentationClass"
    if not (images.is_dir() and masks.is_dir()):
        return None
    lists = [root / "ImageSets" / "Segmentation" / f"{part}.txt" for part in PARTS]
    if not all(path.is_file() for path in lists):
        known = {path.stem for path in masks.iterdir()}
        return [
            _match([p for p in _files(images) if p.stem in known], _files(masks), images, masks)
        ]
    everything = {path.stem: path for path in _files(images)}
    found = []
    for path in lists:
        wanted = read_text(path, limit=LIST_LIMIT).split()
        missing = [name for name in wanted if name not in everything]
        if missing:
            raise InputError(
                f"{path}: image {missing[0]} is not in {images}",
                why="the list names it",
                fix="add the image, or take its name off the list",
                code="pair",
            )
        chosen = [everything[name] for name in wanted]
        names = set(wanted)
        own = [p for p in _files(masks) if p.stem in names]
        found.append(_match(chosen, own, images, masks))
    return found


def _pairs(images: Path, masks: Path) -> list[Pair]:
    return _match(_files(images), _files(masks) if masks.is_dir() else [], images, masks)


def _files(folder: Path) -> list[Path]:
    if not folder.is_dir():
        return []
    found = (p for p in folder.rglob("*") if not p.name.startswith("."))
    return sorted(p for p in found if p.suffix.lower() in EXTENSIONS)


def _match(images: Sequence[Path], masks: Sequence[Path], home: Path, folder: Path) -> list[Pair]:
    """Each image of `home` with the mask of its name in `folder`.

    Raises:
        InputError: there are none, one without its partner, or two of one name.
    """
    nested = any(len({_stem(p) for p in files}) < len(files) for files in (images, masks))
    own, by_name = _named(images, home, nested), _named(masks, folder, nested)
    alone = next((path for name, path in own.items() if name not in by_name), None)
    spare = next((path for name, path in by_name.items() if name not in own), None)
    if not images or alone is not None or spare is not None:
        wrong = alone or spare or folder
        kind = "no images" if not images else "no mask" if alone else "no image"
        raise InputError(
            f"{wrong}: there is {kind} of this name" if images else f"{wrong}: {kind} beside it",
            why=f"an image and its mask in {folder} have the same name but for the ending",
            fix="add the partner, or remove the file",
            code="pair",
        )
    return [Pair(path, by_name[name]) for name, path in own.items()]


def _named(files: Sequence[Path], home: Path, nested: bool) -> dict[str, Path]:
    """Files by their names without endings; with the folders above where names alone repeat."""
    found: dict[str, Path] = {}
    for path in files:
        above = f"{path.parent.relative_to(home).as_posix()}/" if nested else ""
        other = found.setdefault(f"{above}{_stem(path)}", path)
        if other is not path:
            raise InputError(
                f"{path}: has the name of {other.name} beside it",
                why="an image and its mask have the same name but for the ending",
                fix="rename or remove one of them",
                code="pair",
            )
    return found


def _stem(path: Path) -> str:
    return path.stem.removesuffix("_mask")


def _split(pairs: list[Pair]) -> tuple[list[Pair], list[Pair]]:
    """A fifth reports, the same for everybody."""
    labels = torch.zeros(len(pairs), dtype=torch.int64)
    rows = torch.arange(len(pairs))
    train, val = stratified(labels, rows, fraction=REPORTED, seed=SPLIT_SEED)
    return [pairs[i] for i in train.tolist()], [pairs[i] for i in val.tolist()]


def _names(root: Path) -> tuple[str, ...]:
    path = root / "classes.txt"
    if not path.is_file():
        return ()
    text = read_text(path, lines=MOST_CLASSES)
    return tuple(line.strip() for line in text.splitlines() if line.strip())
