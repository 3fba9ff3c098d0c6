"""Images named in a CSV, with columns of labels or of numbers beside them."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from seprune.data import fingerprint
from seprune.data.decode import range_of_files, size_of
from seprune.data.deep_pixels import Range, scale_notes
from seprune.data.folders import Files
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

NAMES = ("image", "images", "file", "filename", "file_name", "path", "image_path", "image_id")
SPLITS = ("split", "part", "set")
MOST = 3e38  # what float32 holds
PARTS = ("train", "val")


class TableImages(Files):
    """Image files with numbers (N, K), float32."""

    def __init__(self, rows: Sequence[TableRow], mode: str, *, scale: Range | None = None) -> None:
        super().__init__([row.image for row in rows], [0] * len(rows), mode, scale=scale)
        self.targets = torch.tensor([row.numbers for row in rows], dtype=torch.float32)

    def without(self, rows: set[int]) -> TableImages:
        """All but some, which are damaged."""
        kept = [
            TableRow(path, tuple(numbers), "")
            for i, (path, numbers) in enumerate(zip(self.paths, self.targets.tolist(), strict=True))
            if i not in rows
        ]
        return TableImages(kept, self.mode, scale=self.scale)


@dataclass(frozen=True)
class TableRow:
    """An image file, its numbers, and the part it is of; none where the table does not say."""

    image: Path
    numbers: tuple[float, ...]
    part: str


@dataclass(frozen=True)
class Table:
    """What a CSV holds."""

    path: Path
    columns: tuple[str, ...]
    rows: tuple[TableRow, ...]


def find_columns(root: Path, mode: str, task: str | None) -> Source | None:
    """The images and numbers of train.csv and val.csv (or valid, test), or of the only table.

    Columns of zeros and ones, two at least, are labels; others are numbers to be predicted. A
    column called split may say train or val; without it a fifth reports.

    Raises:
        InputError: a missing image, a cell that is no number, an empty table; names the line.
    """
    report = next((n for n in REPORTING if (root / f"{n}.csv").is_file()), REPORTING[0])
    paths = [root / f"{part}.csv" for part in (PARTS[0], report)]
    if not all(path.is_file() for path in paths):
        paths = sorted(root.glob("*.csv"))
        if len(paths) != 1 or all((root / part).is_dir() for part in PARTS):
            return None
    tables = [_read(path) for path in paths]
    if len({table.columns for table in tables}) > 1:
        raise _wrong(
            f"{paths[1]}: other columns than {paths[0].name}",
            f"{', '.join(tables[1].columns)} against {', '.join(tables[0].columns)}",
        )
    train, val = (list(t.rows) for t in tables) if len(tables) == 2 else _split(tables[0])
    drawn = len(tables) == 1 and not any(row.part for row in tables[0].rows)
    values = [number for row in (*train, *val) for number in row.numbers]
    binary = set(values) <= {0.0, 1.0} and len(tables[0].columns) > 1
    sizes = {size_of(row.image) for row in train[:: max(len(train) // 16, 1)]}
    scale = range_of_files([row.image for row in train])
    return Source(
        name=str(root),
        classes=tables[0].columns,
        train=TableImages(train, mode, scale=scale),
        val=TableImages(val, mode, scale=scale),
        fingerprint=fingerprint.of_files(root, [*paths, *(r.image for r in (*train, *val))]),
        mode=mode,
        native=sizes.pop() if len(sizes) == 1 else None,
        notes=(*([set_aside(len(val), len(tables[0].rows))] if drawn else ()), *scale_notes(scale)),
        task="multi_label" if binary and task != "regression" else "regression",
    )


def _read(path: Path) -> Table:
    try:
        lines = list(csv.reader(io.StringIO(read_text(path, errors="replace"))))
    except csv.Error as error:
        raise _wrong(f"{path}: not a CSV", str(error)) from error
    header = [cell.strip() for cell in lines[0]] if lines else []
    if len(lines) < 2 or len(header) < 2:
        raise _wrong(f"{path}: no rows below a line of column names",
                     "it needs a column of image names, and one of numbers")  # fmt: skip
    lower = [name.lower() for name in header]
    image = next((lower.index(name) for name in NAMES if name in lower), 0)
    part = next((lower.index(name) for name in SPLITS if name in lower), None)
    numbers = [i for i in range(len(header)) if i not in (image, part)]
    rows = []
    for number, cells in enumerate(lines[1:], 2):
        if not any(cell.strip() for cell in cells):
            continue
        where = f"{path}, line {number}"
        if len(cells) != len(header):
            raise _wrong(f"{where}: {len(cells)} cells", f"there are {len(header)} columns")
        found = _image(path, cells[image].strip(), where)
        values = tuple(_number(cells[i], header[i], where) for i in numbers)
        rows.append(TableRow(found, values, "" if part is None else cells[part].strip().lower()))
    return Table(path, tuple(header[i] for i in numbers), tuple(rows))


def _image(path: Path, name: str, where: str) -> Path:
    if not name or Path(name).is_absolute() or ".." in Path(name).parts:
        raise _wrong(f"{where}: image {name!r}", "images are named below the folder of the table")
    for folder in (path.parent, path.parent / "images", path.parent / path.stem):
        if (folder / name).is_file():
            return folder / name
    raise InputError(
        f"{where}: image {name} is missing",
        why=f"it is neither in {path.parent} nor in images/ below it",
        fix="add the image, or remove the line",
        code="pair",
    )


def _number(cell: str, column: str, where: str) -> float:
    try:
        value = float(cell)
    except ValueError:
        value = math.nan
    if not abs(value) <= MOST:
        shown = repr(cell.strip()) if cell.strip() else "empty"
        raise _wrong(f"{where}: {column} is {shown}", "every cell beside the image is a number")
    return value


def _split(table: Table) -> tuple[list[TableRow], list[TableRow]]:
    if any(row.part for row in table.rows):
        names = {"train": "train", "training": "train"}
        parts: dict[str, list[TableRow]] = {"train": [], "val": []}
        for row in table.rows:
            parts[names.get(row.part, "val")].append(row)
        if not all(parts.values()):
            empty = next(name for name, rows in parts.items() if not rows)
            raise _wrong(f"{table.path}: no row of the part {empty}", "the column says which part")
        return parts["train"], parts["val"]
    rows = torch.arange(len(table.rows))
    train, val = stratified(torch.zeros_like(rows), rows, fraction=REPORTED, seed=SPLIT_SEED)
    return [table.rows[i] for i in train.tolist()], [table.rows[i] for i in val.tolist()]


def _wrong(what: str, why: str) -> InputError:
    return InputError(what, why=why, fix="correct the table", code="annotation")
