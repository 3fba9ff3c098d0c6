"""Text from files is shown as text: no escape sequence, no formula."""

import csv
import io

import pytest

from seprune.runtime.text import csv_cell, csv_text, from_csv_cell, printable


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("layer1.0.conv1", "layer1.0.conv1"),
        ("größe 図 é", "größe 図 é"),
        ("no\u00a0break", "no\u00a0break"),
        ("\x1b]0;title\x07", "\\x1b]0;title\\x07"),
        ("\x9b31m \x7f \r", "\\x9b31m \\x7f \\r"),
        ("txt\u202egnp", "txt\\u202egnp"),
        ("zero\u200bwidth", "zero\\u200bwidth"),
        (b"\xff.png".decode("utf-8", "surrogateescape"), "\\udcff.png"),
        ("two\nlines", "two\nlines"),
    ],
)
def test_what_a_terminal_would_obey_or_hide_is_escaped(text, shown):
    assert printable(text) == shown
    assert printable(text, keep="") == shown.replace("\n", "\\n")


FORMULAS = ["=1+1", "@SUM(A1)", "+cmd|' /C calc'!A0", "-2+3", "\t=1", "'=1", "''=1", "\n=1"]


@pytest.mark.parametrize("text", [*FORMULAS, "plain", "'quoted'", "", "-0.5", "+1e3", "a=b"])
def test_csv_cells_come_back_and_none_is_a_formula(text):
    ((cell,),) = csv.reader(io.StringIO(csv_text([[text]]) or "\n"), strict=True) or [[""]]
    assert from_csv_cell(cell) == text
    assert not cell.lstrip("'").startswith(("=", "@")) or cell.startswith("'")
    assert (cell != text) == (text in FORMULAS)


def test_numbers_stay_numbers():
    assert [csv_cell(v) for v in (-0.5, "-0.5", 3, None, True, "-inf")] == [
        -0.5, "-0.5", 3, None, True, "-inf"
    ]  # fmt: skip
    assert csv_text([["a", "b"], [1, None], [-0.25, "=x,y"]]) == 'a,b\n1,\n-0.25,"\'=x,y"\n'
