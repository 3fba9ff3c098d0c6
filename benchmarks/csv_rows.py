"""Results as CSV: one row a measurement, rewritten whole, read again by whoever goes on."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from seprune.runtime.files import write_text

Rows = list[dict[str, Any]]


def read(path: Path) -> Rows:
    """The rows of a results file, none where there is no such file."""
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def write(path: Path, rows: Rows, columns: Sequence[str]) -> None:
    """All rows anew."""
    text = io.StringIO()
    table = csv.DictWriter(text, columns, lineterminator="\n")
    table.writeheader()
    table.writerows(rows)
    write_text(path, text.getvalue())
