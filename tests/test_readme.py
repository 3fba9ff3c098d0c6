"""The README says what the results say, and its commands are real."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def _script():
    spec = importlib.util.spec_from_file_location("readme", ROOT / "benchmarks" / "readme.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("marker", list(_script().TABLES))
def test_every_table_is_what_the_kept_json_renders_to(marker):
    script = _script()
    text = (ROOT / script.TABLES[marker][0]).read_text()
    assert f"<!-- {marker}: made by benchmarks/readme.py -->" in text
    assert script.rendered(text, marker) == text


@pytest.mark.parametrize("figure", list(_script().FIGURES))
def test_every_figure_is_what_the_kept_json_draws(figure):
    assert (ROOT / figure).read_text() == _script().drawn(figure)


def test_every_command_in_the_readme_exists():
    from seprune.cli import app

    known = {c.name or c.callback.__name__ for c in app.registered_commands} | {"recipes"}
    text = (ROOT / "README.md").read_text()
    used = set(re.findall(r"^seprune (\w+)", text, re.MULTILINE))
    used |= set(re.findall(r"`seprune (\w+)", text))
    assert used
    assert used <= known


def test_every_name_of_the_python_example_exists():
    import seprune

    text = (ROOT / "README.md").read_text()
    used = set(re.findall(r"seprune\.([A-Za-z_]+)\(", text))
    assert used <= set(seprune.__all__)
