"""Text from files, shown so that it is only text: in terminals, in pages and in spreadsheets."""

from __future__ import annotations

import ast
import csv
import io
import math
import re
import shlex
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

_FORMULA = re.compile(r"'*[=+\-@\t\r\n]")
_ESCAPE = re.compile(r"\\(?:\\|[tnr]|x[0-9a-f]{2}|u[0-9a-f]{4}|U[0-9a-f]{8})")


def printable(text: str, *, keep: str = "\n") -> str:
    """`text` with everything that a terminal would obey or hide spelled as Python escapes.

    That is control characters (ESC among them), characters that change the direction of writing
    or have no width, and the surrogates that stand for file names which are no UTF-8.

    Args:
        keep: characters that stay as they are.
    """
    if text.isprintable():
        return text
    return "".join(
        c if c.isprintable() or c in keep or unicodedata.category(c) == "Zs" else repr(c)[1:-1]
        for c in text
    )


def shell_word(text: object) -> str:
    """`text`, a path above all, as one word of a command line that a message advises to type.

    Names that somebody else chose may hold spaces, quotes and semicolons.
    """
    return shlex.quote(str(text))


def null_for_nan(value: Any) -> Any:
    """`value` as JSON can hold it: NaN and infinities, also in mappings and lists, are None."""
    if isinstance(value, Mapping):
        return {str(key): null_for_nan(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [null_for_nan(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def csv_text(rows: Iterable[Sequence[object]]) -> str:
    """Rows as CSV that is safe to show and to open.

    A text that a spreadsheet would take for a formula gets an apostrophe before it, and what
    `printable` escapes is escaped. Numbers stay as they are, also those that come as text.
    """
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerows([csv_cell(value) for value in row] for row in rows)
    return stream.getvalue()


def csv_cell(value: object) -> object:
    """One value as `csv_text` writes it."""
    if not isinstance(value, str) or _is_number(value):
        return value
    text = value
    if printable(text, keep="") != text or _ESCAPE.search(text):
        text = printable(text.replace("\\", "\\\\"), keep="")
    return f"'{text}" if _FORMULA.match(text) else text


def from_csv_cell(text: str) -> str:
    """The text that `csv_cell` was given."""
    bare = text[1:] if text[:1] == "'" and _FORMULA.match(text[1:]) else text
    return _ESCAPE.sub(lambda found: ast.literal_eval(f'"{found.group()}"'), bare)


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def within(layer: str, module: str) -> bool:
    """Whether a path is that of a module or of something inside it."""
    return layer == module or layer.startswith(f"{module}.")
