"""Short tables: what `print` and a notebook show of a structure, statistics, plan or importance."""

from __future__ import annotations

import html
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from seprune.runtime.text import printable

ROWS = 20  # of a longer table the first ones are shown


@dataclass(frozen=True)
class ShortTable:
    """A title, column names, and at most `ROWS` rows of text; `left_out` rows are only counted."""

    title: str
    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    left_out: int = 0

    @classmethod
    def of(cls, title: str, header: Sequence[str], rows: Sequence[Sequence[object]]) -> ShortTable:
        """The table of the first rows; every cell by `str`."""
        shown = tuple(tuple(map(_cell, row)) for row in rows[:ROWS])
        return cls(title, tuple(header), shown, max(0, len(rows) - ROWS))

    @classmethod
    def of_errors(cls, title: str, errors: Mapping[str, tuple[float, float]]) -> ShortTable:
        """Relative squared errors, before and after."""
        rows = [(name, f"{a:.4f}", f"{b:.4f}") for name, (a, b) in errors.items()]
        return cls.of(title, ("relative squared error", "before", "after"), rows)

    def text(self) -> str:
        """Aligned columns under the title."""
        if not self.rows:
            return self.title
        columns = list(zip(self.header, *self.rows))
        widths = [max(map(len, column)) for column in columns]
        lines = [self.title]
        for row in (self.header, *self.rows):
            lines.append("  ".join(cell.ljust(w) for cell, w in zip(row, widths)).rstrip())
        return "\n".join([*lines, *self._rest()])

    def to_html(self) -> str:
        """The same as an HTML table; all text is escaped."""

        def line(cells: Sequence[str], tag: str) -> str:
            return "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in cells)

        body = "".join(f"<tr>{line(row, 'td')}</tr>" for row in self.rows)
        rest = "".join(f"<p>{html.escape(text)}</p>" for text in self._rest())
        head = f"<thead><tr>{line(self.header, 'th')}</tr></thead>" if self.rows else ""
        caption = f"<caption>{html.escape(self.title)}</caption>"
        return f"<table>{caption}{head}<tbody>{body}</tbody></table>{rest}"

    def _rest(self) -> list[str]:
        return [f"... and {self.left_out:,} more"] if self.left_out else []


class Tabular(ABC):
    """What is shown as a short table, in a terminal and in a notebook."""

    @abstractmethod
    def _short_table(self) -> ShortTable:
        """What is shown."""

    def __repr__(self) -> str:
        return self._short_table().text()

    def _repr_html_(self) -> str:
        return self._short_table().to_html()


def _cell(value: object) -> str:
    text = f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)
    text = printable(text, keep="")
    return text if len(text) <= 60 else text[:57] + "..."
