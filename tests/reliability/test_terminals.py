"""Odd terminals: closed streams, pipes whose reader goes, other encodings, hostile names."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import seprune
from seprune.runtime.child_process import MAIN, python_command

POSIX = {"LC_ALL": "POSIX", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
GONE = "import os; r, w = os.pipe(); os.dup2(w, {0}); os.close(r); os.close(w)"
CLOSED = "import os, sys; [os.close(n) for n in {0}]; sys.stdout = sys.stderr = None"


@pytest.fixture(scope="module")
def finished(tiny_run) -> Path:
    return tiny_run.home / "whole"


def python(*words: object, **how: object) -> subprocess.CompletedProcess[str]:
    """A real process of its own, not a forked one."""
    env = {**os.environ, **how.pop("env", {})}
    command = python_command(MAIN, *map(str, words))
    return subprocess.run(command, capture_output=True, text=True, env=env, check=False, **how)


@pytest.mark.parametrize("stream", [1, 2])
@pytest.mark.parametrize("words", [("report",), ("inspect", "--json"), ("--help",)])
def test_a_pipe_whose_reader_goes_ends_with_0_or_141(warm, tmp_path, finished, words, stream):
    folder = finished / "pruned" if words[0] == "inspect" else finished
    given = words[:1] if words[0] == "--help" else (words[0], folder, *words[1:])
    done = warm.run(tmp_path / "log", *given, before=GONE.format(stream))
    assert done.status in ((141,) if stream == 1 else (0, 141))
    assert "Traceback" not in done.output
    assert "Broken" not in done.output


def test_a_run_whose_reader_goes_keeps_its_stages_and_goes_on(tiny_run):
    out = tiny_run.home / "unheard"
    done = tiny_run.run(out, before=GONE.format(2))
    assert done.status in (0, 141)
    tiny_run.finished(out)


@pytest.mark.parametrize("numbers", [pytest.param((1,), marks=pytest.mark.slow), (0, 1, 2)])
def test_closed_streams_change_no_result(tiny_run, numbers):
    """The next file that is opened would get the number of the closed one, and our messages."""
    out = tiny_run.home / f"closed{len(numbers)}{numbers[0]}"
    assert tiny_run.run(out, before=CLOSED.format(numbers)).status == 0
    tiny_run.finished(out)


@pytest.mark.parametrize("env", [{"PYTHONIOENCODING": "ascii"}, POSIX], ids=["ascii", "POSIX"])
def test_ascii_terminals(finished, env, tmp_path):
    folder = tmp_path / "größe"
    shutil.copytree(finished, folder)
    done = python("report", folder, env=env)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.isascii()
    assert "#" in done.stdout  # the bars
    found = python("report", folder, "--json", env=env)
    assert json.loads(found.stdout) == json.loads((finished / "report.json").read_text())


def test_names_of_a_foreign_report_are_shown_and_not_obeyed(terminal, finished, tmp_path):
    document = json.loads((finished / "report.json").read_text())
    document["name"], document["warnings"] = "\x1b]0;pwned\x07[/x]", ["[red]\x1b[2Jgone"]
    document["budgets"][0]["groups"][0]["name"] = "=cmd|' /C calc'!A0"
    path = tmp_path / "report.json"
    path.write_text(json.dumps(document))
    ended = terminal("report", path)
    assert ended.status == 0
    assert "\x1b" not in ended.out
    assert r"\x1b]0;pwned[/x]" in ended.out
    assert r"[red]\x1b[2Jgone" in ended.out
    files = ("--csv", tmp_path / "t.csv", "--html", tmp_path / "p.html")
    assert terminal("report", path, *files).status == 0
    assert "'=cmd|" in (tmp_path / "t.csv").read_text()
    assert ",=cmd" not in (tmp_path / "t.csv").read_text()
    assert "\x1b" not in (tmp_path / "p.html").read_text()


def test_children_do_not_import_from_the_working_folder(terminal, tmp_path, canary):
    """`sweep` and `convert` start Pythons beside the user's data."""
    import torch
    from torch import nn

    for name in ("random.py", "statistics.py"):
        (tmp_path / name).write_text(f"open({str(canary)!r}, 'w')\n")
    torch.save(nn.Linear(2, 2), tmp_path / "m.pt")
    ended = terminal("convert", "m.pt", "--allow-pickle", cwd=tmp_path)
    assert ended.status == 0, ended.err
    assert (tmp_path / "m.safetensors").exists()


def test_the_package_folder_is_a_folder_like_any_other():
    """`statistics` and `data` lie there; `statistics` is a module of Python's library too."""
    home = Path(seprune.__file__).parent
    command = [sys.executable, "-m", "seprune", "recipes", "ls"]
    env = {**os.environ, "PYTHONPATH": str(home.parent)}
    done = subprocess.run(command, cwd=home, env=env, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    code = "import statistics; print(statistics.__file__)"
    done = subprocess.run(
        python_command(code), cwd=home, env=env, capture_output=True, text=True, check=False
    )
    assert str(home) not in done.stdout


def test_a_sweep_runs_no_module_of_the_working_folder(tmp_path, canary):
    command = python_command("import random; print(random.__file__)")
    (tmp_path / "random.py").write_text(f"open({str(canary)!r}, 'w')\n")
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0
    assert str(tmp_path) not in done.stdout


ODD_NAMES = """
from torch import nn

ODD = "[/x]\\x1b]0;pwned\\x07=1+1"


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.add_module(ODD, nn.Conv2d(1, 16, 3))
        self.add_module("=1+1", nn.Conv2d(16, 16, 3))
        self.head = nn.Linear(16, 10)

    def forward(self, images):
        features = self._modules["=1+1"](self._modules[ODD](images).relu()).relu()
        return self.head(features.mean((2, 3)))


def make():
    return Net()
"""


def test_names_of_layers_are_shown_and_not_obeyed(terminal, tmp_path):
    (tmp_path / "odd.py").write_text(ODD_NAMES)
    net = (f"{tmp_path}/odd.py:make", "--allow-code", "--input", "1x8x8")
    ended = terminal("rank", *net, "--importance", "l2", "--out", tmp_path / "scores.csv")
    assert ended.status == 0, ended.err
    assert r"[/x]\x1b]0;pwned\x07=1+1" in ended.err
    lines = (tmp_path / "scores.csv").read_text().splitlines()
    assert lines[1].startswith(r"[/x]\x1b]0;pwned\x07=1+1,0,")
    assert lines[17].startswith("'=1+1,0,")
    small = tmp_path / "small"
    made = terminal("prune", *net, "--importance", "l2", "--macs", "0.5", "--out", small)
    assert made.status == 0, made.err
    exported = terminal(
        "export", small, "--allow-code", "--pt2", tmp_path / "m.pt2", "--json", seconds=60
    )
    exported.refused(3, "export", says="torch does not read again what it wrote")
    assert not (tmp_path / "m.pt2").exists()
    assert "\x1b" not in ended.err + made.err + exported.err


LONG = "z" * 300
NET = ("seprune/se_resnet8", "--classes", "3", "--input", "3x12x12")


@pytest.mark.parametrize(
    "words",
    [
        ("inspect", *NET, "--checkpoint", LONG),
        ("evaluate", *NET, "--data", LONG),
        ("run", "quickstart", "--out", LONG),
        *(
            pytest.param(words, marks=pytest.mark.slow)
            for words in (
                ("inspect", LONG),
                ("rank", *NET, "--importance", "l2", "--out", f"{LONG}.csv"),
                ("run", LONG, "--out", "x"),
                ("report", LONG),
                ("verify", LONG),
                ("compare", LONG, LONG),
                ("convert", LONG),
                ("push", LONG, "a/b"),
            )
        ),
    ],
    ids=lambda words: " ".join(w[:9] for w in words),
)
def test_a_name_that_is_too_long_is_refused(terminal, tmp_path, words):
    ended = terminal(*words, "--json", cwd=str(tmp_path))
    assert ended.status in ((2, 3, 4) if "--out" in words else (2, 3)), ended
    assert "disk" not in ended.error["next"], ended
    assert list(tmp_path.iterdir()) == []
