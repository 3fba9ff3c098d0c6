"""Columns of tables of `datasets`: which hold images, labels and masks, and samples of them."""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from seprune.data.encoded import MOST_CLASSES, Encoded, EncodedMasks, encoded, masked, numbered
from seprune.errors import InputError
from seprune.runtime.reading import open_regular

LABELS = ("label", "labels", "fine_label", "target", "class", "cls", "category")
IMAGES = ("image", "img", "images", "picture", "pixel_values")
MASKS = ("mask", "masks", "semantic_segmentation", "segmentation_mask", "segmentation",
         "annotation", "annotations", "label", "labels", "seg")  # fmt: skip


@dataclass(frozen=True)
class _Rows:
    """The images of a table of `datasets`."""

    table: Any
    column: str
    title: str
    of: str = "image"

    def name(self, row: int) -> str:
        return f"{self.title}, row {row}" + ("" if self.of == "image" else f", {self.of}")

    def holders(self) -> Sequence[Path]:
        return [Path(file["filename"]) for file in self.table.cache_files]

    def read(self, row: int) -> bytes:
        found = self.table[row][self.column] or {}
        if found.get("bytes"):
            content: bytes = found["bytes"]
            return content
        try:
            with open_regular(Path(found.get("path") or "")) as stream:
                return stream.read()
        except OSError as error:
            raise InputError(
                f"{self.name(row)}: has no {'image' if self.of == 'image' else 'content'}",
                why=f"its column {self.column} holds neither bytes nor the path of a file",
                fix="take the row out: datasets' filter, then save_to_disk and --data hf:FOLDER",
            ) from error


def _kinds(table: Any) -> tuple[dict[str, str], list[str], list[str]]:
    """The type of every column, those of images, and those that may be labels."""
    kinds = {name: type(kind).__name__ for name, kind in table.features.items()}
    images = [name for name, kind in kinds.items() if kind == "Image"]
    plain = [n for n, k in kinds.items() if k == "ClassLabel" or (k == "Value" and n in LABELS)]
    return kinds, images, plain


def mask_columns(
    source: str, table: Any, task: str | None, notes: list[str]
) -> tuple[str, str] | None:
    """The column of images and that of masks; None where labels are used."""
    kinds, images, plain = _kinds(table)
    masks = [name for name in MASKS if name in images]
    if task is None and plain and masks and len(images) > 1:
        notes.append(f"{masks[0]} may hold masks, which --task segmentation takes")
    if task not in (None, "segmentation") or (task is None and plain) or not images:
        return None
    if not masks and len(images) == 2 and task is not None:
        masks = [name for name in images if name != _best(images, IMAGES)]
    if masks and len(images) > 1:
        return _best([name for name in images if name != masks[0]], IMAGES), masks[0]
    if task is None:
        return None
    raise InputError(
        f"{source}: it has no column of masks",
        why=f"its columns are {_shown(kinds)}",
        fix="name one mask by datasets' rename_column, then save_to_disk and --data hf:FOLDER; or "
        "write images/ and masks/ to a folder",
    )


def _shown(kinds: Mapping[str, str]) -> str:
    return ", ".join(f"{name} ({kind})" for name, kind in kinds.items())


def with_masks(title: str, table: Any, column: str, mask: str) -> EncodedMasks:
    """A split's images and their masks."""
    for name in (column, mask):
        _require_column(title, table, name)
    return masked(_bare(table, column, title), _bare(table, mask, title, of=mask), len(table))


def _require_column(title: str, table: Any, name: str) -> None:
    if name not in table.features:
        raise InputError(
            f"{title}: it has no column {name}",
            why=f"its columns are {', '.join(table.features)}",
            fix="name its columns as those of the other split, or choose another split",
        )


def _bare(table: Any, column: str, title: str, *, of: str = "image") -> _Rows:
    """A column of images that are not decoded."""
    datasets = importlib.import_module("datasets")
    made = table.select_columns([column]).cast_column(column, datasets.Image(decode=False))
    return _Rows(made, column, title, of)


def label_columns(source: str, table: Any, notes: list[str]) -> tuple[str, str]:
    """The column of images and that of labels."""
    kinds, images, plain = _kinds(table)
    shown = _shown(kinds)
    for what, found in (("images", images), ("labels", plain)):
        if not found:
            raise InputError(
                f"{source}: it has no column of {what}",
                why=f"its columns are {shown}",
                fix="name one label by datasets' rename_column, then save_to_disk and "
                "--data hf:FOLDER"
                if what == "labels"
                else "cast one to datasets.Image(), then save_to_disk and --data hf:FOLDER",
            )
    image, label = _best(images, IMAGES), _best(plain, LABELS)
    for own, found in ((image, images), (label, plain)):
        if len(found) > 1:
            notes.append(f"of the columns {', '.join(found)}, {own} is used")
    return image, label


def _best(found: Sequence[str], known: Sequence[str]) -> str:
    return next((name for name in known if name in found), found[0])


def label_classes(source: str, tables: Sequence[Any], label: str) -> tuple[str, ...]:
    """The names of the classes, in the order of their numbers; of texts, sorted.

    Numbers that are written as texts are sorted as numbers.
    """
    named = [getattr(t.features[label], "names", None) for t in tables]
    if len(named) > 1 and named[0] != named[1]:
        raise InputError(
            f"{source}: the two splits have different classes",
            why=f"{_few(named[0])} against {_few(named[1])}",
            fix="cast both to one datasets.ClassLabel, then save_to_disk and --data hf:FOLDER",
        )
    if named[0]:
        return tuple(map(str, named[0]))
    values = [{*t[label][:]} for t in tables]
    every = set().union(*values)
    if every and all(isinstance(v, str) for v in every):
        if len(tables) > 1 and (only := sorted(values[1] - values[0])):
            raise InputError(
                f"{source}: class {only[0]!r} is only in the part that reports",
                why="nothing was trained for it",
                fix="choose other splits",
            )
        numbers = all(v.isdecimal() for v in every)
        return tuple(sorted(every, key=lambda v: (int(v) if numbers else 0, v)))
    plain = [v for v in every if isinstance(v, int) and not isinstance(v, bool)]
    return numbered(plain)  # any other is named with its row


def _few(names: Sequence[str] | None) -> str:
    return "no names" if names is None else ", ".join(map(str, names[:5]))


def with_labels(
    title: str, table: Any, columns: tuple[str, str], classes: Sequence[str]
) -> Encoded:
    """A split's images and the numbers of their classes."""
    column, label = columns
    for name in columns:
        _require_column(title, table, name)
    given = list(table[label][:])
    if given and isinstance(given[0], str):
        numbers = {name: n for n, name in enumerate(classes)}
        given = [numbers.get(v, v) for v in given]
    for row, value in enumerate(given):
        if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < len(classes):
            raise _odd(title, label, row, given)
    return encoded(_bare(table, column, title), given)


def _odd(title: str, label: str, row: int, given: Sequence[Any]) -> InputError:
    secret = set(given) <= {-1, None}
    return InputError(
        f"{title}, row {row}: {label} is {given[row]!r}, which is no class",
        why="the labels of this split are kept secret"
        if secret
        else f"labels are numbers from 0 to {MOST_CLASSES - 1:,}, or names",
        fix="choose another split, such as hf:NAME:validation"
        if secret
        else "mend the column, or take rows out: datasets' filter, then save_to_disk and "
        "--data hf:FOLDER",
        code="annotation",
    )
