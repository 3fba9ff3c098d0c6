"""What `export` measured of the files that it made, kept beside the report of their network."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from seprune.measure.metric_names import metric_title, metric_value
from seprune.runtime.checksums import ARTEFACTS
from seprune.runtime.files import write_json
from seprune.runtime.typed import read_typed, typed

_FIX = "export again, or remove the file"


@dataclass(frozen=True)
class ArtefactReport:
    """One file, or the network itself.

    Attributes:
        file: its name; None: the network as PyTorch runs it.
        metrics: as fractions; None where there were no labelled images.
        median_ms: by batch size.
        count, data: images that the metrics are of, and where they came from.
        sha256: of the file, or of the network's weights.
    """

    name: str
    file: str | None
    bytes: int
    metrics: dict[str, float] | None = None
    median_ms: dict[str, float | None] = field(default_factory=dict)
    count: int = 0
    data: str | None = None
    sha256: str | None = None

    def __post_init__(self) -> None:
        if odd := [batch for batch in self.median_ms if not re.fullmatch(r"[1-9]\d{0,8}", batch)]:
            raise ValueError(f"median_ms: {odd[0]!r} is no batch size")


def keep_artefacts(
    found: Sequence[Mapping[str, Any]], folder: Path, *, data: str | None = None
) -> None:
    """Write what was measured, beside what is known of the same files and of others.

    Metrics on other images stay, and where there were no images now those of before do. Of a file
    that was replaced nothing stays.

    Args:
        data: where the images came from.

    Raises:
        EnvironmentFault: the folder cannot be written.
    """
    given = [{**a, "data": data if a["count"] else None} for a in found]
    own = [typed(ArtefactReport, a, source=ARTEFACTS, fix=_FIX) for a in given]
    known = read_artefacts(folder)
    made = [row for now in own for row in _rows(now, known)]
    again = {a.file or a.name for a in own}
    kept = [a for a in known if (a.file or a.name) not in again]
    write_json(folder / ARTEFACTS, [vars(a) for a in (*made, *kept)])


def _rows(now: ArtefactReport, known: Sequence[ArtefactReport]) -> list[ArtefactReport]:
    """What is known of a file, with its times of now: a row for each set of images."""
    same = (now.file or now.name, now.sha256)
    rows = [
        replace(a, median_ms=now.median_ms)
        for a in known
        if a.count
        and (a.file or a.name, a.sha256) == same
        and (a.data, a.count) != (now.data, now.count)
    ]
    return [now, *rows] if now.count or not rows else rows


def read_artefacts(folder: Path) -> list[ArtefactReport]:
    """What was measured of the files exported from a folder; nothing where nothing was.

    Raises:
        InputError: the file is damaged.
    """
    path = folder / ARTEFACTS
    return read_typed(list[ArtefactReport], path, fix=_FIX) if path.is_file() else []


def artefact_images(found: Sequence[ArtefactReport]) -> str:
    """Which images the metrics of some files are of; file by file where they differ."""
    said = [f"{a.count:,} images of {a.data}" for a in found]
    measured = {text: a for text, a in zip(said, found) if a.count and a.data}
    if len(measured) < 2:
        return "".join(f"Metrics are of {text}." for text in measured)
    named = (f"{a.name} {text}" for text, a in zip(said, found) if a.count and a.data)
    return f"Metrics are of different images: {', '.join(named)}."


def artefact_table(found: Sequence[ArtefactReport], dash: str) -> list[list[str]]:
    """Head and rows as people read them: size, metrics, latency by batch size."""
    metrics = list(dict.fromkeys(n for a in found for n in a.metrics or {} if n != "top5"))
    batches = sorted({b for a in found for b in a.median_ms}, key=int)
    head = ["file", "bytes", *map(metric_title, metrics), *(f"ms at batch {b}" for b in batches)]
    rows = []
    for a in found:
        times = [a.median_ms.get(b) for b in batches]
        rows.append(
            [
                a.name if a.file is None else f"{a.name}: {a.file}",
                f"{a.bytes:,}",
                *(metric_value(n, (a.metrics or {}).get(n)) for n in metrics),
                *(dash if t is None else f"{t:.3g}" for t in times),
            ]
        )
    return [head, *rows]
