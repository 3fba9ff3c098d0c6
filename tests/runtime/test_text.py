"""Text from files is shown as text: no escape sequence, no formula."""

import csv
import io
import os
import shlex

import pytest

from seprune.errors import InputError
from seprune.runtime.reading import read_text
from seprune.runtime.text import csv_cell, csv_text, from_csv_cell, null_for_nan, printable


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


ESCAPED = {
    "\x1b]0;t\x07": "\\x1b]0;t\\x07",
    "a\u202eb\\x": "a\\u202eb\\\\x",
    "\\x41": "\\\\x41",
    "\\\\": "\\\\\\\\",
    "a\nb": "a\\nb",
    "\udcff": "\\udcff",
    "C:\\data": "C:\\data",
}
FORMULAS = ["=1+1", "@SUM(A1)", "+cmd|' /C calc'!A0", "-2+3", "'=1", "''=1"]


@pytest.mark.parametrize("text", [*FORMULAS, "plain", "'quoted'", "", "-0.5", "+1e3", "a=b"])
def test_csv_cells_come_back_and_none_is_a_formula(text):
    ((cell,),) = csv.reader(io.StringIO(csv_text([[text]]) or "\n"), strict=True) or [[""]]
    assert from_csv_cell(cell) == text
    assert not cell.lstrip("'").startswith(("=", "@")) or cell.startswith("'")
    assert (cell != text) == (text in FORMULAS)


@pytest.mark.parametrize("text", [*ESCAPED, "\t=1", "\r=1", "=\x1b"])
def test_csv_cells_hold_no_control_character_and_come_back(text):
    ((cell,),) = csv.reader(io.StringIO(csv_text([[text]])), strict=True)
    assert cell == ESCAPED.get(text, cell)
    assert printable(cell, keep="") == cell
    assert from_csv_cell(cell) == text


@pytest.mark.parametrize("name", ["a b", "it's; touch x", "$(x) `y`", "\n|"])
def test_advice_with_a_foreign_name_is_one_word_of_a_command(tmp_path, name):
    path = tmp_path / name
    os.mkfifo(path)
    with pytest.raises(InputError) as caught:
        read_text(path)
    advice = caught.value.fix.partition("look at it: ")[2]
    assert shlex.split(advice) == ["ls", "-lL", str(path)]


def test_numbers_stay_numbers():
    assert [csv_cell(v) for v in (-0.5, "-0.5", 3, None, True, "-inf")] == [
        -0.5, "-0.5", 3, None, True, "-inf"
    ]  # fmt: skip
    assert csv_text([["a", "b"], [1, None], [-0.25, "=x,y"]]) == 'a,b\n1,\n-0.25,"\'=x,y"\n'


def test_nan_and_infinities_become_null_wherever_they_stand():
    value = {"a": float("nan"), 2: [1.5, (float("inf"), None)], "b": {"c": -float("inf"), "d": 0}}
    assert null_for_nan(value) == {"a": None, "2": [1.5, [None, None]], "b": {"c": None, "d": 0}}
    assert null_for_nan(0.25) == 0.25
