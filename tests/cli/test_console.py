"""One way to the terminal, in which data are never obeyed."""

import ast
import io
import json
from pathlib import Path

import pytest
from rich.table import Table
from rich.text import Text

import seprune
from seprune.cli import console
from seprune.errors import SepruneError

PACKAGE = Path(seprune.__file__).parent
PRINTING = {"print", "sys.stdout.write", "sys.stderr.write", "traceback.print_exc"}

NASTY = "[/x] [red]b[/red] :smile: \x1b]0;pwned\x07\x9b2J \u202e"
SHOWN = r"[/x] [red]b[/red] :smile: \x1b]0;pwned\x07\x9b2J \u202e"


def output(shown: object, encoding: str = "utf-8") -> str:
    made = console.PlainConsole()
    raw = io.BytesIO()
    made.file = io.TextIOWrapper(raw, encoding=encoding, write_through=True)
    made.width = 200
    made.print(shown)
    return raw.getvalue().decode(encoding)


def table(cell: object) -> Table:
    made = Table(title="t " + NASTY)
    made.add_column("head " + NASTY)
    made.add_row(cell)
    return made


@pytest.mark.parametrize("cell", [NASTY, Text(NASTY)], ids=["string", "Text"])
def test_cells_titles_and_heads_are_text(cell):
    shown = output(table(cell))
    bell = r"\x07"  # rich's Text leaves it out
    assert shown.replace(bell, "").count(SHOWN.replace(bell, "")) == 3
    assert not set(shown) & set("\x1b\x07\x9b\u202e")


def test_a_printed_line_is_text():
    assert output(NASTY) == SHOWN + "\n"
    assert output("two\nlines") == "two\nlines\n"


def test_an_ascii_terminal_gets_ascii():
    shown = output(Text("█▏▄ 3 × 4 · – …"), "ascii")
    assert shown == "#:: 3 x 4 . - ~\n"


def test_every_character_of_ours_that_is_not_ascii_has_one_that_is():
    ours = {
        letter
        for path in (*PACKAGE.glob("report/*.py"), *PACKAGE.glob("cli/*.py"))
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
        for letter in node.value
        if not letter.isascii()
    }
    assert ours
    assert "".join(sorted(ours)).translate(console._ASCII).isascii()


def test_only_the_console_prints():
    """Else names from files would reach the terminal as they are."""
    printing = [
        f"{path.name}:{node.lineno}"
        for path in PACKAGE.rglob("*.py")
        if path.name != "console.py"
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call)
        and ast.unparse(node.func) in PRINTING
        and ast.unparse(node) != "print(f'seprune {__version__}')"
    ]
    assert printing == []


def test_lines_and_json_are_escaped_and_json_says_the_same(capsys):
    console.tell(NASTY)
    assert capsys.readouterr().err == SHOWN + "\n"
    document = {"name": NASTY, "path": "\udcff/größe", "x": float("nan"), "del": "\x7f"}
    console.give(document)
    output = capsys.readouterr().out
    assert not set(output) & set("\x1b\x07\x9b\u202e\udcff\x7f")
    assert "größe" in output
    assert json.loads(output) == {**document, "x": None}


def test_a_message_is_no_longer_than_people_read(capsys):
    console.fail(SepruneError("x" * 10**6 + ": no such file", why="why", fix="fix"))
    shown = capsys.readouterr().err
    assert len(shown) < 9000
    assert "(1,000,014 characters)" in shown
    assert shown.endswith("xxx: no such file\n why: why\n next: fix\n")
