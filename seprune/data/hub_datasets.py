"""`hf:NAME[:SPLIT]`: data sets of a Hub, or of a folder, by the library `datasets`."""

from __future__ import annotations

import difflib
import errno
import importlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from seprune.data.encoded import MOST_CLASSES, Encoded, as_source, encoded, numbered
from seprune.data.source import REPORTING, TRAINING, Source
from seprune.errors import EnvironmentFault, InputError, SepruneError, first_line
from seprune.models import hub
from seprune.runtime.extras import require
from seprune.runtime.reading import open_regular

PREFIX = "hf:"
LABELS = ("label", "labels", "fine_label", "target", "class", "cls", "category")
IMAGES = ("image", "img", "images", "picture", "pixel_values")


@dataclass(frozen=True)
class _Rows:
    """The images of a table of `datasets`."""

    table: Any
    column: str
    title: str

    def name(self, row: int) -> str:
        return f"{self.title}, row {row}"

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
                f"{self.name(row)}: has no image",
                why=f"its column {self.column} holds neither bytes nor the path of a file",
                fix="take the row out: datasets' filter, then save_to_disk and --data hf:FOLDER",
            ) from error


def hub_dataset(source: str, mode: str | None) -> Source:
    """The images and classes of `hf:NAME[:SPLIT]`.

    NAME is ORG/NAME of a Hub, or a folder that `datasets` reads or wrote. SPLIT may be CONFIG/SPLIT
    and two with a comma between them. A name like val or test reports, any other trains; a split
    that has no counterpart is split by a seed.

    Raises:
        InputError: no such data set or split, no column of images or of labels, odd labels.
        EnvironmentFault: no connection, or `datasets` is not installed.
    """
    name, _, split = source.removeprefix(PREFIX).partition(":")
    config, _, wanted = split.rpartition("/")
    splits = _load(source, name, config or None)
    train, report = _chosen(source, list(splits), [w for w in _parts(wanted) if w])
    chosen = {part: _split(source, splits, part) for part in (train, report) if part}
    tables = list(chosen.values())
    notes = [] if report is None else [f"{train} trains, {report} reports"]
    column, label = _columns(source, tables[0], notes)
    classes = _classes(source, tables, label)
    parts = [_part(f"{source} {part}", t, (column, label), classes) for part, t in chosen.items()]
    return as_source(source, classes, parts, mode=mode, notes=notes)


def _load(source: str, name: str, config: str | None) -> Mapping[str, Any]:
    """Every split of a data set."""
    datasets = require("datasets", extra="datasets", what=f"{source} needs a package")
    folder = Path(name).expanduser()
    if not name or not folder.is_dir():
        _require_name(source, name)
        if not hub.answers(name, "README.md", kind="dataset"):
            datasets.config.HF_HUB_OFFLINE = True  # it looks into its cache, and tries no longer
    try:
        if any((folder / f).is_file() for f in ("dataset_dict.json", "state.json")):
            found = datasets.load_from_disk(str(folder))
        else:
            found = datasets.load_dataset(str(folder) if folder.is_dir() else name, config)
    except Exception as error:  # of the library, its readers, or of a Hub
        raise _fault(source, name, error) from error
    return found if isinstance(found, Mapping) else {"train": found}


def _require_name(source: str, name: str) -> None:
    if re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", name):
        return
    raise InputError(
        f"{source}: no such folder, and not the name of a data set",
        why="it is ORG/NAME of a Hub, or a folder that `datasets` reads or wrote",
        fix="check the path, or write hf:ORG/NAME",
    )


def _fault(source: str, name: str, error: Exception) -> SepruneError:
    """What the library says, in our words."""
    message, kinds = first_line(error), {kind.__name__ for kind in type(error).__mro__}
    whole = str(error)
    full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
    if full or "Not enough disk space" in whole:
        return EnvironmentFault(
            f"{source}: no space in the cache of `datasets`",
            why=message,
            fix="free some space, or let HF_HOME name a folder on another disk",
        )
    for words, what, fix in (
        (("gated", "ask for access"), "its owner has to let you in",
         "accept the terms on its page, then: hf auth login"),
        (("Config name is missing", "BuilderConfig"), "it has several configurations",
         f"write hf:{name}:CONFIG/SPLIT"),
        (("scripts are no longer supported", "trust_remote_code"), "it is a program, not data",
         "choose a data set in Parquet, or write its images to train/CLASS/IMAGE"),
    ):  # fmt: skip
        if any(word in whole for word in words):
            return InputError(f"{source}: {what}", why=_short(whole), fix=fix)
    missing = {"DatasetNotFoundError", "RepositoryNotFoundError"} & kinds
    if missing and not {"ConnectionError", "OfflineModeIsEnabled"} & _causes(error):
        return InputError(
            f"{source}: no such data set, or a private one",
            why=message,
            fix="check the name; for a private one: hf auth login",
        )
    if {"ConnectionError", "OfflineModeIsEnabled"} & _causes(error) or "reach" in whole:
        return EnvironmentFault(
            f"{source}: cannot be downloaded, and is not in the cache",
            why=message,
            fix=f"where there is a connection: hf download {name} --repo-type dataset --local-dir "
            "FOLDER; then here, with what it wrote: --data hf:FOLDER",
            code="offline",
        )
    return InputError(
        f"{source}: `datasets` cannot read it",
        why=_short(f"{type(error).__name__}: {whole}"),
        fix="choose another data set, or write its images to train/CLASS/IMAGE",
    )


def _causes(error: BaseException | None) -> set[str]:
    """The names of an error's classes and of those that led to it."""
    found = set[str]()
    while error is not None:
        found |= {kind.__name__ for kind in type(error).__mro__}
        error = error.__cause__ or error.__context__
    return found


def _short(text: str) -> str:
    return " ".join(text.split())[:300]


def _parts(wanted: str) -> list[str]:
    """Splits between commas."""
    return [part.strip() for part in wanted.split(",")]


def _chosen(source: str, there: Sequence[str], wanted: Sequence[str]) -> tuple[str, str | None]:
    """What trains and what reports."""
    known = [part.partition("[")[0] for part in wanted]
    for part in known:
        if part not in there:
            near = difflib.get_close_matches(part, there, 1, cutoff=0.4) or list(there)
            raise InputError(
                f"{source}: there is no split {part}",
                why=f"there are {', '.join(there)}",
                fix=f"--data {source.rpartition(part)[0]}{near[0]}",
            )
    if len(wanted) > 2:
        raise InputError(
            f"{source}: more than two splits",
            why="one trains and one reports",
            fix="name two of them, with a comma between them",
        )
    if len(wanted) == 2:
        return wanted[0], wanted[1]
    rest = [name for name in there if name not in known]
    train = next((n for n in TRAINING if n in rest), None)
    report = next((n for n in REPORTING if n in rest), None)
    if wanted and known[0] in REPORTING:
        return (train, wanted[0]) if train else (wanted[0], None)
    if wanted:
        return wanted[0], report
    if train is None:
        train = next((n for n in there if n != report), None) or there[0]
    return train, report if report != train else None


def _split(source: str, splits: Mapping[str, Any], part: str) -> Any:
    """The table of a split, or the part of it that is written as in `train[:10%]`."""
    name, bracket, rest = part.partition("[")
    table = splits[name]
    if bracket:
        arrow = importlib.import_module("datasets.arrow_reader").ReadInstruction
        try:
            [span] = arrow.from_spec(f"{name}[{rest}").to_absolute({name: len(table)})
        except (ValueError, AssertionError, TypeError) as error:
            raise InputError(
                f"{source}: {part} is no part of a split",
                why=first_line(error),
                fix=f"write {name}[:1000] or {name}[10%:20%]",
            ) from error
        end = len(table) if span.to is None else min(span.to, len(table))
        rows = range(span.from_ or 0, end)
        table = table.select(rows) if rows else ()
    if not len(table):
        raise InputError(
            f"{source}: {part} holds no rows",
            why="there is nothing to look at",
            fix="choose another split",
        )
    return table


def _columns(source: str, table: Any, notes: list[str]) -> tuple[str, str]:
    """The column of images and that of labels."""
    features = table.features
    kinds = {name: type(kind).__name__ for name, kind in features.items()}
    images = [name for name, kind in kinds.items() if kind == "Image"]
    shown = ", ".join(f"{name} ({kind})" for name, kind in kinds.items())
    plain = [n for n, k in kinds.items() if k == "ClassLabel" or (k == "Value" and n in LABELS)]
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


def _classes(source: str, tables: Sequence[Any], label: str) -> tuple[str, ...]:
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


def _part(title: str, table: Any, columns: tuple[str, str], classes: Sequence[str]) -> Encoded:
    """A split's images and the numbers of their classes."""
    datasets, (column, label) = importlib.import_module("datasets"), columns
    if column not in table.features or label not in table.features:
        raise InputError(
            f"{title}: it has no column {label if column in table.features else column}",
            why=f"its columns are {', '.join(table.features)}",
            fix="name its columns as those of the other split, or choose another split",
        )
    given = list(table[label][:])
    if given and isinstance(given[0], str):
        numbers = {name: n for n, name in enumerate(classes)}
        given = [numbers.get(v, v) for v in given]
    for row, value in enumerate(given):
        if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < len(classes):
            raise _odd(title, label, row, given)
    bare = table.select_columns([column]).cast_column(column, datasets.Image(decode=False))
    return encoded(_Rows(bare, column, title), given)


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
