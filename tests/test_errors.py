"""The errors' shape, their exit statuses, and the catalogue that lists them."""

import ast
import re
from pathlib import Path

import pytest

from seprune import errors

ROOT = Path(__file__).parents[1]
KINDS = {
    errors.SepruneError: ("bug", 1),
    errors.UsageError: ("usage", 2),
    errors.InputError: ("input", 3),
    errors.EnvironmentFault: ("environment", 4),
    errors.LockedError: ("locked", 6),
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_has_its_code_its_exit_status_and_three_parts(kind):
    error = kind("plan.json: no groups", why="the file lists none", fix="make it anew")
    assert (error.code, error.exit_status) == KINDS[kind]
    assert str(error) == "plan.json: no groups\nwhy: the file lists none\nnext: make it anew"
    assert isinstance(error, errors.SepruneError)


def test_parts_that_are_not_given_leave_no_empty_lines():
    assert str(errors.InputError("only this")) == "only this"
    assert str(errors.InputError("this", fix="that")) == "this\nnext: that"


def test_a_more_exact_code_replaces_the_kinds():
    assert errors.InputError("x", code="forward").code == "forward"
    assert errors.InputError.code == "input"


@pytest.mark.parametrize(("signum", "status"), [(2, 130), (15, 143)])
def test_a_stopped_run_exits_like_the_signal_that_stopped_it(signum, status):
    error = errors.StoppedError("stopped", signum=signum, fix="seprune run a.yaml")
    assert (error.code, error.exit_status) == ("stopped", status)
    assert str(error) == "stopped\nnext: seprune run a.yaml"


def test_every_error_in_the_source_has_three_parts():
    kinds = {kind.__name__ for kind in KINDS if kind is not errors.SepruneError}
    lacking = [
        f"{path.relative_to(ROOT)}:{node.lineno}"
        for path in (ROOT / "seprune").rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call) and ast.unparse(node.func).rpartition(".")[2] in kinds
        if not {"why", "fix"} <= {k.arg for k in node.keywords}
    ]
    assert lacking == []


def _catalogue() -> dict[str, str]:
    """Code: exit status, from docs/errors.md."""
    text = (ROOT / "docs" / "errors.md").read_text()
    rows = re.findall(r"^\| `([a-z-]+)` \| ([\d, ]+) \| [^|]+ \| [^|]+ \| [^|]+ \|$", text, re.M)
    assert len(rows) == len(dict(rows)), "a code is listed twice"
    return dict(rows)


def test_the_catalogue_lists_every_code_in_the_source_and_no_other():
    sources = "\n".join(p.read_text() for p in (ROOT / "seprune").rglob("*.py"))
    used = set(re.findall(r"\bcode ?= ?\"([a-z][a-z-]*)\"", sources))
    assert sorted(used ^ set(_catalogue())) == []


def test_the_catalogue_agrees_with_the_exit_statuses():
    catalogue = _catalogue()
    for code, status in KINDS.values():
        assert catalogue[code] == str(status)
    assert catalogue["stopped"] == "130, 143"
