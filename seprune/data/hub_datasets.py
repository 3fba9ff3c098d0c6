"""`hf:NAME[:SPLIT]`: data sets of a Hub, or of a folder, by the library `datasets`."""

from __future__ import annotations

import difflib
import errno
import importlib
import re
from collections.abc import Mapping, Sequence
from typing import Any

from seprune.data.encoded import as_source
from seprune.data.hub_columns import (
    label_classes,
    label_columns,
    mask_columns,
    with_labels,
    with_masks,
)
from seprune.data.masks import classes_in
from seprune.data.source import REPORTING, TRAINING, Source
from seprune.errors import EnvironmentFault, InputError, SepruneError, first_line
from seprune.models import hub
from seprune.models.cache import NO_SPACE, cache_fault
from seprune.runtime.extras import require
from seprune.runtime.paths import expanded

PREFIX = "hf:"


def hub_dataset(source: str, mode: str | None, task: str | None) -> Source:
    """The images and classes, or masks, of `hf:NAME[:SPLIT]`.

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
    if (pair := mask_columns(source, tables[0], task, notes)) is not None:
        pairs = [with_masks(f"{source} {part}", t, *pair) for part, t in chosen.items()]
        return as_source(source, classes_in(pairs), pairs, mode=mode, notes=notes)
    columns = label_columns(source, tables[0], notes)
    classes = label_classes(source, tables, columns[1])
    parts = [with_labels(f"{source} {part}", t, columns, classes) for part, t in chosen.items()]
    return as_source(source, classes, parts, mode=mode, notes=notes)


def _load(source: str, name: str, config: str | None) -> Mapping[str, Any]:
    """Every split of a data set."""
    datasets = require("datasets", extra="datasets", what=f"{source} needs a package")
    folder = expanded(name)
    if not name or not folder.is_dir():
        _require_name(source, name)
        if not hub.answers(name, "README.md", kind="dataset"):
            datasets.config.HF_HUB_OFFLINE = True  # it looks into its cache, and tries no longer
    try:
        if any((folder / f).is_file() for f in ("dataset_dict.json", "state.json")):
            found = datasets.load_from_disk(str(folder))
        else:
            where = str(folder.resolve()) if folder.is_dir() else name
            found = datasets.load_dataset(where, config)
    except Exception as error:  # of the library, its readers, or of a Hub
        raise _fault(source, name, error) from error
    return found if isinstance(found, Mapping) else {"train": found}


def _require_name(source: str, name: str) -> None:
    if re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", name):  # a word alone may be a reader of `datasets`
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
    disk = next((e for e in _chain(error) if getattr(e, "errno", 0) in NO_SPACE), error)
    if "Not enough disk space" in whole:
        disk = OSError(errno.ENOSPC, message)
    if (refused := cache_fault(source, "HF_HOME", disk)) is not None:
        return refused
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
    vague = error.__cause__ if "DatasetGenerationError" in kinds else None
    first = vague or error
    return InputError(
        f"{source}: `datasets` cannot read it",
        why=_short(f"{type(first).__name__}: {first}"),
        fix="choose another data set, or write its images to train/CLASS/IMAGE",
    )


def _chain(error: BaseException) -> list[BaseException]:
    """An error and those that led to it, the first of all last."""
    found = [error]
    while (cause := found[-1].__cause__ or found[-1].__context__) is not None:
        found.append(cause)
    return found


def _causes(error: BaseException) -> set[str]:
    """The names of an error's classes and of those that led to it."""
    return {kind.__name__ for one in _chain(error) for kind in type(one).__mro__}


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
