"""Killed, interrupted or terminated at any instant, and started at once: nothing is lost."""

from __future__ import annotations

import random
import shutil
import signal
import sys
from pathlib import Path

import pytest
from folders import leftovers
from harness import Subject, crowd, kill, patient, reported, stopped, tiny

QUICKSTART = ("quickstart", "report.latency=false", "device=cpu")


@pytest.fixture(scope="module")
def quickstart(warm, tmp_path_factory) -> Subject:
    return Subject.unbroken(warm, tmp_path_factory.mktemp("quickstart"), QUICKSTART)


def stop_often(subject: Subject, out: Path, rounds: int, *signums: int) -> None:
    """So many signals at random instants of one run after the other, and on to the end."""
    instants, came, span, before = random.Random(rounds), 0, 3.0, 0
    while came < rounds:
        if kill(subject, out, instants.uniform(0.1, span), signums[came % len(signums)]):
            shutil.rmtree(out)
            span, before = 3.0, 0
        else:
            came += 1
            span, before = patient(span, before, out)
    subject.finished(out)


@pytest.mark.fault(28)
@pytest.mark.fault(29)
@pytest.mark.parametrize(
    ("signum", "number"),
    [
        (signal.SIGKILL, 70),
        pytest.param(signal.SIGTERM, 310, marks=pytest.mark.slow),
        pytest.param(signal.SIGINT, 70, marks=pytest.mark.slow),
        pytest.param(signal.SIGKILL, 310, marks=pytest.mark.slow),
        pytest.param(signal.SIGTERM, 70, marks=pytest.mark.slow),
        pytest.param(signal.SIGINT, 310, marks=pytest.mark.slow),
    ],
)
def test_a_signal_at_a_file_operation_of_a_small_run(tiny_run, signum, number):
    """In the training, and where the pruned network is saved."""
    out = tiny_run.home / f"{signum.name}-{number}"
    done = tiny_run.run(out, fail={"root": str(out), "at": number, "how": signum.name})
    if signum == signal.SIGKILL:
        assert done.status == -signum
    else:
        stopped(done, signum)
        assert leftovers(out) == []
    tiny_run.readable(out)
    tiny_run.finished(out)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.fault(28)
def test_kill_9_thirty_times_over_a_whole_quickstart(quickstart):
    """The promise of row 28 at its full size; benchmarks/faults.py does it 300 times."""
    stop_often(quickstart, quickstart.home / "killed", 30, signal.SIGKILL)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.fault(29)
def test_sigterm_and_sigint_twenty_times_over_a_whole_quickstart(quickstart):
    stop_often(quickstart, quickstart.home / "stopped", 20, signal.SIGTERM, signal.SIGINT)


@pytest.mark.fault(30)
def test_of_eight_at_once_one_works_and_seven_name_it(warm, tmp_path, tiny_run):
    """A longer run, so that the one that works is at it while the others come."""
    argv = tiny(tiny_run.inputs, "train.epochs=500")
    subject = Subject(warm, tmp_path, argv)
    for _ in range(2):
        assert crowd(subject, tmp_path / "run") == (7, False)


@pytest.mark.fault(30)
def test_two_fine_tunings_of_one_folder(warm, tmp_path, tiny_run):
    """They would write the same states; the second one leaves those of the first alone."""
    argv = ("finetune", tiny_run.home / "whole" / "pruned", "--data", tiny_run.inputs)
    words = (*argv, "--epochs", 500, "--out", tmp_path / "tuned")
    one = warm.start(tmp_path / "one", *words)
    while not (tmp_path / "tuned" / "state").exists():
        assert warm.wait(one, 0.01) is None
    two = warm.run(tmp_path / "two", *words)
    reported(two, 6)
    assert f"held by process {one} on" in two.output
    stopped(warm.kill(one, 0, signal.SIGTERM), signal.SIGTERM)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.fault(30)
def test_eight_at_once_twenty_times_over_a_whole_quickstart(quickstart):
    out, done = quickstart.home / "crowd", 0
    while done < 20:
        named, through = crowd(quickstart, out)
        if through:
            quickstart.finished(out)
            shutil.rmtree(out)
        else:
            assert named == 7
            done += 1
    quickstart.finished(out)


@pytest.mark.fault(30)
def test_the_lock_of_a_killed_run_is_no_lock(tiny_run):
    """`lock` and `lock.json` of the one that was killed are there, and nobody minds."""
    out = tiny_run.home / "stale"
    pid = tiny_run.start(out, fail={"root": str(out), "at": 60, "how": "exit"})
    assert tiny_run.warm.wait(pid).status == 137
    assert (out / "lock.json").exists()
    tiny_run.finished(out)
    assert not (out / "lock.json").exists()


if sys.platform == "win32":
    pytest.skip("signals as POSIX has them", allow_module_level=True)
