"""Single commands killed at every rename and fsync: old or new, never neither."""

from __future__ import annotations

import random

import pytest
from commands import Killed, commands

NAMES = (
    *("save", "refit", "reconstruct", "dry run", "finetune", "collect", "rows", "rank"),
    *("sensitivity", "evaluate", "export", "int8", "torch.export", "convert", "report", "page"),
    *("compare", "run", "sweep", "recipe", "latency tables", "given table", "table"),
)
TENFOLD = ("export", "int8", "torch.export", "convert")  # that take ten times as long
ELSEWHERE = ("sensitivity", "evaluate", "run", "sweep")
HANDFUL = [("save", 0.7), ("rank", 0.5), ("report", 1.0), ("finetune", 0.6)]


@pytest.fixture
def killed(warm, tiny_run, tmp_path):
    def start(name: str) -> Killed:
        return Killed.of(warm, tmp_path / "work", commands(tiny_run, tmp_path / "given")[name])

    return start


@pytest.mark.fault(28)
@pytest.mark.parametrize(("name", "where"), HANDFUL)
def test_a_kill_while_files_are_put_in_place(killed, name, where):
    command = killed(name)
    assert command.operations >= 2
    command.kill_at(max(1, round(where * command.operations)))


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.fault(28)
@pytest.mark.parametrize("name", [n for n in NAMES if n not in ELSEWHERE])
def test_a_kill_at_every_rename_and_fsync(killed, name):
    """The first two of the others only print; those of runs are in test_operations.py."""
    command = killed(name)
    for number in range(1, command.operations + 1):
        command.kill_at(number)


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.fault(28)
@pytest.mark.parametrize("name", NAMES)
def test_kills_at_random_instants(killed, name):
    """benchmarks/faults.py commands does it a thousand times."""
    command, instants = killed(name), random.Random(name)
    for _ in range(5):
        command.kill_after(instants.uniform(0, 1))
        command.finished(command.out)


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.fault(27)
@pytest.mark.parametrize("how", ["ENOSPC", "EDQUOT", "EIO", "EROFS"])
@pytest.mark.parametrize("name", [n for n in NAMES if n not in ELSEWHERE])
def test_a_disk_that_fails_at_some_operation(killed, name, how):
    """A dozen operations of each command, evenly spread, over the results of an earlier one."""
    command = killed(name)
    count, tries = command.file_operations(), 3 if name in TENFOLD else 12
    numbers = sorted({1 + n * count // tries for n in range(tries) if n * count // tries < count})
    noticed = [command.fail_at(number, how) for number in numbers]
    assert any(noticed) or not count


IN_REFIT = """
import itertools, os, signal
from seprune.recovery.refit.least_squares import NormalEquations
whole, calls = NormalEquations.add, itertools.count(1)
def add(*given):
    if next(calls) == {number}:
        os.kill(os.getpid(), signal.SIGKILL)
    return whole(*given)
NormalEquations.add = add
"""


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.fault(28)
@pytest.mark.parametrize("name", ["refit", "run"])
def test_ten_refits_killed_at_work_and_run_again_are_the_one_that_was_not(killed, name):
    """At sums of rows from the first layer's to one of the last ones'."""
    command = killed(name)
    for number in range(1, 30, 3):
        command.kill_before(IN_REFIT.format(number=number))


@pytest.mark.fault(28)
@pytest.mark.parametrize(
    "words",
    [
        ("convert", "model.pkl", "--allow-pickle"),
        ("recipes", "cp", "quickstart", "model.safetensors"),
    ],
)
def test_a_command_that_finds_its_work_done_removes_what_it_left(
    seprune, tmp_path, monkeypatch, words
):
    """Killed between the rename of the file and the removal of the folder that it came from."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model.pkl").write_bytes(b"x")
    (tmp_path / "model.safetensors").write_bytes(b"made before")
    (tmp_path / ".abc.seprune.part").mkdir()
    status, _, said = seprune(*words)
    assert status == 2
    assert "model.safetensors: exists already" in said
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model.pkl", "model.safetensors"]


def test_the_commands_are_those_that_are_tried(tiny_run, tmp_path):
    assert set(commands(tiny_run, tmp_path)) == set(NAMES)
