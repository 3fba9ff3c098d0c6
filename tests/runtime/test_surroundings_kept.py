"""What the user's code changes of the process is as before afterwards, or nothing is written."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

import pytest
import torch

from seprune.cli.faults import fault_behind
from seprune.errors import InputError
from seprune.models.origin import Origin
from seprune.models.usercode import build
from seprune.runtime.files import append_line, write_text
from seprune.runtime.paths import working_here

CHANGES = """
import os, signal, sys
import torch

torch.set_default_dtype(torch.float64)
torch.set_default_device("meta")
torch.set_grad_enabled(False)

def net():
    os.chdir("/")
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: None)
    sys.stdout = open(os.devnull, "w")
    return torch.nn.Identity()
"""


def state() -> tuple[object, ...]:
    handlers = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    defaults = torch.get_default_dtype(), torch.get_default_device(), torch.is_grad_enabled()
    return os.getcwd(), sys.stdout, sys.stderr, *handlers, *defaults


@pytest.mark.parametrize("end", ["", "raise ValueError"])
def test_a_file_that_sets_up_a_program_of_its_own_changes_nothing(tmp_path, monkeypatch, end):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "own.py").write_text(CHANGES + end)
    before = state()
    try:
        build(Origin("own.py:net", None, None, {}))
    except InputError:
        assert end
    assert state() == before


def test_a_failure_of_the_users_code_is_no_bug_and_one_of_ours_is(tmp_path):
    """Wherever it comes: in a forward of its own in the middle of a training, say."""
    (tmp_path / "own.py").write_text(
        "import json, seprune.runtime.text\n\n"
        "class Net(__import__('torch').nn.Module):\n"
        "    def forward(self, x):\n"
        "        return json.loads('{') if x else seprune.runtime.text.printable(None)\n"
    )
    net = build(Origin(f"{tmp_path}/own.py:Net", None, None, {}))
    with pytest.raises(ValueError, match="Expecting property name") as theirs:
        net(True)
    fault = fault_behind(theirs.value)
    assert fault.what == f"{tmp_path}/own.py:5: the code failed"
    assert fault.why.startswith("JSONDecodeError: Expecting property name")
    with pytest.raises(AttributeError) as ours:
        net(False)
    assert fault_behind(ours.value) is None


def test_relative_paths_are_not_written_elsewhere(tmp_path, monkeypatch):
    home, elsewhere = tmp_path / "home", tmp_path / "elsewhere"
    home.mkdir()
    elsewhere.mkdir()
    monkeypatch.chdir(home)
    with working_here():
        os.chdir(elsewhere)
        for write in (write_text, append_line):
            with pytest.raises(InputError, match=r"small/a: not written") as refused:
                write(Path("small/a"), "text")
            assert f"from {home} to {elsewhere}" in refused.value.why
            assert str(home / "small" / "a") in refused.value.fix
        write_text(tmp_path / "absolute", "text")
        elsewhere.rmdir()
        with pytest.raises(InputError, match="not written"):
            write_text(Path("a"), "text")
        os.chdir(home)
        write_text(Path("a"), "text")
    assert {p.name for p in tmp_path.rglob("*")} == {"absolute", "home", "a"}
    os.chdir(tmp_path)
    write_text(Path("library"), "text")  # outside of a command
