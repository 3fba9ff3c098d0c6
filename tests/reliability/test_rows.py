"""The fault matrix of docs/reliability.md and the tests that inject its rows."""

from __future__ import annotations

import re
from pathlib import Path

from child import ROOT
from corpus import FAULTS
from test_hostile_recipes import RECIPES

HERE = Path(__file__).parent


def rows() -> list[int]:
    """Numbers of the matrix, in its order."""
    text = (ROOT / "docs" / "reliability.md").read_text()
    return [int(n) for n in re.findall(r"^\| (\d+) \| [^|]+ \| [^|]+ \| [^|]* \|$", text, re.M)]


def marked() -> set[int]:
    """Rows that some test carries: spelt out in a source, or in the tables that become tests."""
    sources = "\n".join(p.read_text() for p in (ROOT / "tests").rglob("test_*.py"))
    spelt = {int(n) for n in re.findall(r"mark\.fault\((\d+)\)", sources)}
    return spelt | {fault.row for fault in FAULTS.values()} | {row[0] for row in RECIPES.values()}


def test_the_matrix_has_every_row_once_and_in_order():
    assert rows() == list(range(1, 37))


def test_every_row_has_a_test_and_every_test_a_row():
    assert sorted(marked() ^ set(rows())) == []
