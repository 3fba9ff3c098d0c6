"""A disk that is really full: a small tmpfs where one may be mounted, and a file-size limit.

Status 4, nothing half-written, the previous good files kept, and the same command goes on once
there is room.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from folders import contents, leftovers
from harness import Subject, reported

FULL = "No space left on device"
LARGE = "File too large"
MODEL = "seprune/se_resnet8"
SLOW = pytest.mark.slow


@contextmanager
def disk(folder: Path, size: str) -> Iterator[Path]:
    """A tmpfs of this size at `folder`."""
    folder.mkdir()
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)], capture_output=True
    )
    if done.returncode:
        pytest.skip("mounting a tmpfs is not allowed here; the file-size limit is tested")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def grow(folder: Path, size: str) -> None:
    """Give the disk more room, with what is on it."""
    remount(folder, f"size={size}")


def remount(folder: Path, how: str) -> None:
    """Change the mount, with what is on it."""
    subprocess.run(["mount", "-o", f"remount,{how}", str(folder)], check=True)


def fill(folder: Path, leave: int) -> None:
    """Write ballast until only `leave` bytes are free."""
    (folder / "ballast").unlink(missing_ok=True)
    (folder / "ballast").write_bytes(bytes(max(shutil.disk_usage(folder).free - leave, 0)))


@pytest.mark.fault(27)
@pytest.mark.parametrize(
    "size", ["1300k", *(pytest.param(s, marks=SLOW) for s in ("300k", "2700k"))]
)
def test_a_run_on_a_disk_that_fills_up(tiny_run, tmp_path, size):
    """Too small for the first state, for a later one, for what comes after the training."""
    with disk(tmp_path / "disk", size) as folder:
        done = tiny_run.run(folder / "run")
        reported(done, 4)
        assert FULL in done.output
        assert leftovers(folder) == []
        tiny_run.readable(folder / "run")
        grow(folder, "64m")
        tiny_run.finished(folder / "run")


@pytest.mark.fault(27)
@SLOW
@pytest.mark.parametrize("largest", [700_000, 20_000])
def test_a_run_whose_files_may_not_grow(tiny_run, tmp_path, largest):
    done = tiny_run.run(tmp_path / "run", largest=largest)
    reported(done, 4)
    assert LARGE in done.output
    assert "ulimit -f" in done.output
    assert leftovers(tmp_path) == []
    tiny_run.readable(tmp_path / "run")
    tiny_run.finished(tmp_path / "run")


@pytest.fixture
def checkpoint(tmp_path) -> Path:
    """Weights that somebody saved."""
    from seprune.models import build

    path = tmp_path / "given.pth"
    torch.save(build(MODEL, classes=3, input=(3, 12, 12)).state_dict(), path)
    return path


def commands(subject: Subject, checkpoint: Path, out: Path) -> dict[str, tuple[object, ...]]:
    """Commands that write, each with what it is to write below `out`."""
    model = (MODEL, "--checkpoint", checkpoint, "--classes", 3, "--input", "3x12x12")
    data = ("--data", subject.inputs)
    run = subject.home / "whole"
    return {
        "convert": ("convert", checkpoint, "--allow-pickle", "--out", out / "w.safetensors"),
        "collect": ("collect", *model, *data, "--out", out / "s.safetensors", "--images", 8),
        "prune": ("prune", *model, *data, "--macs", 0.7, "--out", out / "small"),
        "report": ("report", run, "--html", out / "r.html", "--csv", out / "r.csv"),
        "finetune": ("finetune", *model, *data, "--epochs", 1, "--out", out / "tuned"),
    }


@pytest.mark.fault(27)
@pytest.mark.parametrize(
    "name",
    ["convert", "prune", *(pytest.param(n, marks=SLOW) for n in ("collect", "report", "finetune"))],
)
def test_each_command_that_writes_keeps_the_previous_files(
    tiny_run, warm, tmp_path, checkpoint, name
):
    with disk(tmp_path / "disk", "64m") as folder:
        words = commands(tiny_run, checkpoint, folder)[name]
        log, given = tmp_path / "log", checkpoint.read_bytes()
        assert warm.run(log, *words).status == 0
        before = contents(folder)
        assert before
        fill(folder, leave=9_000)
        if name == "finetune":  # it would have nothing left to write
            for state in (folder / "tuned" / "state").iterdir():
                state.unlink()
                before.pop(str(state.relative_to(folder)))
            fill(folder, leave=9_000)
        done = warm.run(log, *words)
        reported(done, 4)
        assert FULL in done.output
        (folder / "ballast").unlink()
        assert contents(folder) == before
        assert checkpoint.read_bytes() == given
        assert warm.run(log, *words).status == 0


@pytest.mark.slow
@pytest.mark.fault(27)
@pytest.mark.parametrize("name", ["convert", "collect", "prune", "report", "finetune"])
def test_each_command_on_a_disk_that_can_only_be_read(tiny_run, warm, tmp_path, checkpoint, name):
    """As a system makes it of one that fails."""
    with disk(tmp_path / "disk", "64m") as folder:
        words = commands(tiny_run, checkpoint, folder)[name]
        log = tmp_path / "log"
        assert warm.run(log, *words).status == 0
        before = contents(folder)
        remount(folder, "ro")
        done = warm.run(log, *words)
        reported(done, 4)
        assert "Read-only file system" in done.output
        assert contents(folder) == before
        remount(folder, "rw")
        assert warm.run(log, *words).status == 0
        assert leftovers(folder) == []


@pytest.mark.fault(27)
@pytest.mark.parametrize("name", ["convert", "collect", "prune", "report"])
def test_each_command_whose_files_may_not_grow(tiny_run, warm, tmp_path, checkpoint, name):
    out = tmp_path / "out"
    words = commands(tiny_run, checkpoint, out)[name]
    done = warm.run(tmp_path / "log", *words, largest=3_000)
    reported(done, 4)
    assert LARGE in done.output
    assert not out.exists() or contents(out) == {}


@pytest.mark.fault(27)
def test_evaluation_needs_no_room(tiny_run, warm, tmp_path, checkpoint):
    model = (MODEL, "--checkpoint", checkpoint, "--classes", 3, "--input", "3x12x12")
    log = tmp_path / "log"
    words = ("evaluate", *model, "--data", tiny_run.inputs, "--json")
    assert warm.run(log, *words, largest=2_000).status == 0


@pytest.mark.fault(27)
@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full here")
def test_output_that_the_disk_does_not_take_is_an_error():
    command = [sys.executable, "-m", "seprune", "recipes", "ls", "--json"]
    with open("/dev/full", "wb") as full:
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True)
    assert done.returncode == 4
    assert done.stderr.splitlines() == [
        "error: the output: cannot be read or written",
        f" why: {FULL}",
        " next: check the disk and the permissions, and run the same command again",
    ]
