"""Images and their boxes in COCO's JSON, as COCO, Roboflow and labelling tools lay it out."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from PIL import Image

from seprune.data import fingerprint
from seprune.data.decode import range_of_files, read_image, size_of
from seprune.data.deep_pixels import Range, scale_notes
from seprune.data.loaders import in_threads
from seprune.data.source import REPORTED, SPLIT_SEED, Source, set_aside, stratified
from seprune.errors import InputError
from seprune.runtime.progress import silent
from seprune.runtime.typed import Unread, fits_file, skim

LIMIT = 1 << 30  # bytes of an annotation file
T = TypeVar("T")
PARTS = ("train", "val")
SLACK = 1.0  # pixels that a box may reach over its image: tools round


@dataclass(frozen=True)
class Boxed:
    """An image file and its boxes (N, 4), corners in pixels, with labels (N,) from 1."""

    image: Path
    boxes: np.ndarray[Any, Any]
    labels: np.ndarray[Any, Any]


class Boxes:
    """Image files and the boxes in them."""

    def __init__(self, rows: Sequence[Boxed], mode: str, scale: Range | None) -> None:
        self.rows, self.mode, self.scale = list(rows), mode, scale
        first = [int(row.labels[0]) if len(row.labels) else 0 for row in self.rows]
        self.labels = torch.tensor(first, dtype=torch.int64)

    def __call__(self, row: int) -> Image.Image:
        return read_image(self.rows[row].image, self.mode, self.scale)

    def target(self, row: int) -> Mapping[str, np.ndarray[Any, Any]]:
        """`boxes` (N, 4) float32 and `labels` (N,) int64."""
        return {"boxes": self.rows[row].boxes, "labels": self.rows[row].labels}


def find_boxes(root: Path, mode: str) -> Source | None:
    """The images and boxes below a folder; None where there are no annotations of this kind.

    Raises:
        InputError: an annotation that cannot be right: of no image or category, without a box, or
            with one outside of its image; names the file.
    """
    files = _files(root)
    if files is None:
        return None
    names = _names(files)
    parts = [list(_rows(root, path, names)) for path in files]
    notes = []
    if len(parts) == 1:
        labels = torch.zeros(len(parts[0]), dtype=torch.int64)
        rows = torch.arange(len(labels))
        split = stratified(labels, rows, fraction=REPORTED, seed=SPLIT_SEED)
        parts = [[parts[0][i] for i in own.tolist()] for own in split]
        notes.append(set_aside(len(parts[1]), len(labels)))
    images = [row.image for part in parts for row in part]
    sizes = {size_of(row.image) for row in parts[0][:: max(len(parts[0]) // 16, 1)]}
    scale = range_of_files([row.image for row in parts[0]])
    if empty := sum(not len(row.labels) for part in parts for row in part):
        notes.append(f"{empty} images have no box: nothing is to be found in them")
    return Source(
        name=str(root),
        classes=("background", *names.values()),
        train=Boxes(parts[0], mode, scale),
        val=Boxes(parts[1], mode, scale),
        fingerprint=fingerprint.of_files(root, [*files, *images]),
        mode=mode,
        native=sizes.pop() if len(sizes) == 1 else None,
        task="detection",
        notes=(*notes, *scale_notes(scale)),
    )


def _files(root: Path) -> list[Path] | None:
    """The annotation files of both parts, or one for all."""
    found = [_first(_candidates(root, part)) for part in PARTS]
    if found[0] and found[1]:
        return [path for path in found if path]
    alone = _first([*sorted(root.glob("*.json")), *sorted((root / "annotations").glob("*.json"))])
    lonely = found[0] or found[1] or alone
    return [lonely] if lonely else None


def _candidates(root: Path, part: str) -> Iterator[Path]:
    for pattern in (
        f"annotations/instances_{part}*.json", f"annotations/{part}*.json",
        f"{part}*/_annotations.coco.json", f"{part}*/*.json", f"{part}*.json",
    ):  # fmt: skip
        yield from sorted(root.glob(pattern))


def _first(paths: Sequence[Path] | Iterator[Path]) -> Path | None:
    """The first file that holds annotations; others belong to somebody else."""
    for path in paths:
        if _has_keys(path):
            return path
    return None


def _names(files: Sequence[Path]) -> dict[int, str]:
    """The categories of all files by their number, in its order."""
    found: dict[int, str] = {}
    for path in files:
        for own in _skim(_Categories, path).categories:
            name = str(own.id if own.name is None else own.name)
            if found.setdefault(own.id, name) != name:
                raise _wrong(
                    path,
                    f"category {own.id} is {name}",
                    f"in another file it is {found[own.id]}",
                )
    return dict(sorted(found.items()))


@dataclass(frozen=True)
class _Category:
    id: int
    name: str | int | None = None


@dataclass(frozen=True)
class _Image:
    id: int | str
    file_name: str


@dataclass(frozen=True)
class _Annotation:
    id: int | str | None = None
    image_id: int | str | None = None
    category_id: int | str | None = None
    bbox: list[float] | None = None
    iscrowd: int | bool | None = None


@dataclass(frozen=True)
class _Categories:
    categories: list[_Category]


@dataclass(frozen=True)
class _Annotations:
    images: list[_Image]
    annotations: list[_Annotation]


@dataclass(frozen=True)
class _Lists:
    """The lists that make a JSON file one of annotations."""

    images: Unread
    annotations: Unread
    categories: Unread

    def __post_init__(self) -> None:
        for part in (self.images, self.annotations, self.categories):
            if bytes(memoryview(part)[:1]) != b"[":
                raise ValueError("not a list")


def _has_keys(path: Path) -> bool:
    return fits_file(_Lists, path, limit=LIMIT)


def _skim(kind: type[T], path: Path) -> T:
    """The parts of an annotation file that `kind` names; outlines of objects are not built."""
    fix = "correct the annotation, or remove it"
    return skim(kind, path, limit=LIMIT, fix=fix, code="annotation")


def _rows(root: Path, path: Path, names: Mapping[int, str]) -> list[Boxed]:
    content = _skim(_Annotations, path)
    places = {number: position for position, number in enumerate(names, 1)}
    if not content.annotations:
        raise _wrong(path, "no annotations", "there is nothing to learn from")
    images = _images(root, path, content.images)
    sizes = _sizes(list(images.values()))
    boxes: dict[Any, list[list[float]]] = {number: [] for number in images}
    labels: dict[Any, list[int]] = {number: [] for number in images}
    for number, own in enumerate(content.annotations):
        whose = f"annotation {number if own.id is None else own.id}"
        if own.image_id not in images:
            raise _wrong(path, f"{whose} is of no image", "its image_id is not among the images")
        if own.category_id not in places:
            raise _wrong(path, f"{whose} is of no category", "its category_id is not listed")
        image = images[own.image_id]
        corners = _corners(path, whose, own.bbox, image, sizes[image])
        if own.iscrowd:  # one box around many things is no example of one
            continue
        boxes[own.image_id].append(corners)
        labels[own.image_id].append(places[own.category_id])
    return [
        Boxed(image, np.array(boxes[n], np.float32).reshape(-1, 4), np.array(labels[n], np.int64))
        for n, image in images.items()
    ]


def _images(root: Path, path: Path, listed: Sequence[_Image]) -> dict[int | str, Path]:
    """The image files by the ids that annotations refer to."""
    folders = _folders(root, path)
    found: dict[int | str, Path] = {}
    for own in listed:
        if own.id in found:
            raise _wrong(
                path,
                f"image {own.file_name} has the id {own.id} of {found[own.id].name}",
                "annotations refer to an image by its id",
            )
        found[own.id] = _image(path, own.file_name, folders)
    return found


def _corners(
    path: Path, whose: str, box: list[float] | None, image: Path, size: tuple[int, int]
) -> list[float]:
    """[x, y, width, height] as corners within the image."""
    if box is None or len(box) != 4 or box[2] <= 0 or box[3] <= 0:
        raise _wrong(path, f"{whose} of {image.name} is empty: bbox {box}", "a box has x, y, width "
                     "and height, the last two above 0")  # fmt: skip
    height, width = size
    left, top, right, bottom = box[0], box[1], box[0] + box[2], box[1] + box[3]
    if min(left, top) < -SLACK or right > width + SLACK or bottom > height + SLACK:
        raise _wrong(
            path,
            f"{whose} of {image.name} is outside of its image: bbox {box}",
            f"the image has {width} x {height} pixels",
        )
    return [max(left, 0), max(top, 0), min(right, width), min(bottom, height)]


def _folders(root: Path, path: Path) -> list[Path]:
    """Where the images of an annotation file may lie."""
    part = next((p for p in PARTS if p in path.stem or p in path.parent.name), "")
    below = [root / "images", root] if not part else [
        *sorted(p for p in root.glob(f"{part}*") if p.is_dir()),
        *sorted(p for p in (root / "images").glob(f"{part}*") if p.is_dir()),
        root / "images", root,
    ]  # fmt: skip
    return [path.parent, *below]


def _image(path: Path, name: str, folders: Sequence[Path]) -> Path:
    if Path(name).is_absolute() or ".." in Path(name).parts:
        raise _wrong(path, f"image {name} leads out of the folder", "names are below its folder")
    found = next((folder / name for folder in folders if (folder / name).is_file()), None)
    if found is None:
        looked = ", ".join(str(folder) for folder in folders)
        raise InputError(
            f"{path}: image {name} is missing",
            why=f"looked for in {looked}",
            fix="add the image, or take it out of the annotations",
            code="pair",
        )
    return found


def _sizes(images: Sequence[Path]) -> dict[Path, tuple[int, int]]:
    found: dict[Path, tuple[int, int]] = {}

    def look(row: int) -> None:
        found[images[row]] = size_of(images[row])

    in_threads(look, len(images), label="checking images", track=silent)
    return found


def _wrong(path: Path, what: str, why: str) -> InputError:
    return InputError(
        f"{path}: {what}", why=why, fix="correct the annotation, or remove it", code="annotation"
    )
