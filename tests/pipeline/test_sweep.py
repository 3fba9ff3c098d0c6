"""Sweeps: what makes a cell, what cells share, and real processes that are killed half way."""

from __future__ import annotations

import csv
import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from seprune import cli
from seprune.errors import InputError, UsageError
from seprune.pipeline import run_stages, sweep
from seprune.pipeline.run import run
from seprune.pipeline.run_folder import verify
from seprune.pipeline.stage_cache import StageCache
from seprune.report.measurement import read

SMALL = (
    "model.name=seprune/se_resnet8",
    "train=null",
    "collect.images=32",
    "plan.min_channels=2",
    "prune.recover=none",
    "finetune.epochs=0",
    "finetune.recalibrate=0",
    "report.latency=false",
    "report.html=false",
    "device=cpu",
)


@pytest.mark.parametrize(
    ("text", "values"),
    [
        ("0.7,0.5", ["0.7", "0.5"]),
        ("[0.7, 0.5], 0.3", ["[0.7, 0.5]", "0.3"]),
        ("{weight: 1, temperature: 2},null", ["{weight: 1, temperature: 2}", "null"]),
        ("'a,b',c", ["'a,b'", "c"]),
        ("one", ["one"]),
        ("", [""]),
    ],
)
def test_commas_separate_values_except_in_brackets_and_quotes(text, values):
    assert sweep.split_values(text) == values


def test_cells_are_all_combinations_the_last_key_fastest():
    cells = sweep.cells("quickstart", ["plan.macs=0.7,[0.5,0.3]", "device=cpu", "seed=0,1"])
    assert [c.name for c in cells] == [
        "macs=0.7,seed=0",
        "macs=0.7,seed=1",
        "macs=0.5-0.3,seed=0",
        "macs=0.5-0.3,seed=1",
    ]
    assert cells[2].recipe.plan.macs == (0.5, 0.3)
    assert [c.recipe.seed for c in cells] == [0, 1, 0, 1]
    assert cells[3].recipe.name == "quickstart macs=0.5-0.3,seed=1"
    assert {c.recipe.device for c in cells} == {"cpu"}


def test_names_of_cells_tell_keys_apart_and_hold_no_odd_letters():
    keys = ["train.lr=0.1,0.2", "finetune.lr=0.1,0.2"]
    assert sweep.cells("quickstart", keys)[1].name == "train.lr=0.1,finetune.lr=0.2"
    odd = sweep.cells("quickstart", ["model.checkpoint='a b/c:d*.pth',null"])
    assert [c.name for c in odd] == ["checkpoint=a-b-c-d-.pth", "checkpoint=null"]
    long = sweep.cells("quickstart", [f"model.checkpoint={'x' * 300},{'x' * 299}y"])
    assert len({c.name for c in long}) == 2
    assert max(len(c.name) for c in long) < 200


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["seed=0"], "no key has several values"),
        (["seed=0,0"], "a value is given twice: seed=0"),
        (["seed=0,1", "seed=2"], "a key is given twice: seed"),
        (["seed=0,,1"], "an empty value"),
        (["plan.macs=0.5,1.5"], r"plan.macs: must be a fraction kept.*got 1.5"),
        (["plan.mcas=0.5,0.6"], "did you mean plan.macs"),
    ],
)
def test_what_makes_no_sweep_is_refused(overrides, message):
    with pytest.raises(UsageError, match=message) as caught:
        sweep.cells("quickstart", overrides)
    assert caught.value.fix


def test_workers_share_threads_and_gpus(monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,5,7")
    monkeypatch.setattr(sweep, "usable_cores", lambda: 8)
    assert sweep.worker_environment(0, 1) == {}
    gpus = [sweep.worker_environment(slot, 4)["CUDA_VISIBLE_DEVICES"] for slot in range(4)]
    assert gpus == ["2", "5", "7", "2"]
    assert sweep.worker_environment(0, 4)["OMP_NUM_THREADS"] == "2"
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2")
    assert sweep.worker_environment(1, 4) == {}


def pool(tmp_path: Path, script: str, *, jobs: int, number: int = 4) -> sweep.WorkerPool:
    """Cells that only run `script`, their index in argv[1]."""
    cells = sweep.cells("quickstart", [f"seed={','.join(map(str, range(number)))}"])
    return sweep.WorkerPool(
        tmp_path, cells, jobs, lambda i: [sys.executable, "-S", "-c", script, str(i)]
    )


def test_a_pool_works_on_so_many_cells_at_a_time_and_one_failure_stops_nobody(tmp_path):
    script = (
        "import os, sys, time, pathlib\n"
        f"here = pathlib.Path({str(tmp_path)!r})\n"
        "(here / f'at-{sys.argv[1]}').touch()\n"
        "print('beside', len(list(here.glob('at-*'))))\n"
        "time.sleep(0.3)\n"
        "(here / f'at-{sys.argv[1]}').unlink()\n"
        "print('error: bad luck') if sys.argv[1] == '2' else None\n"
        "sys.exit(3 * (sys.argv[1] == '2'))"
    )
    made = pool(tmp_path, script, jobs=2)
    statuses = dict(made.work([0, 1, 2, 3]))
    assert statuses == {0: 0, 1: 0, 2: 3, 3: 0}
    logs = [(tmp_path / c.name / sweep.LOG).read_text() for c in made.cells]
    assert max(int(log.split()[1]) for log in logs) == 2
    named = {made.cells[i].name: s for i, s in statuses.items()}
    with pytest.raises(InputError, match=r"1 of 4 cells failed\nwhy: seed=2: bad luck") as caught:
        sweep.refuse_failed(named, tmp_path)
    assert (caught.value.exit_status, caught.value.code) == (3, "cells")


def test_a_cell_that_is_held_by_a_process_that_ends_is_tried_again(tmp_path):
    script = (
        "import sys, pathlib\n"
        f"seen = pathlib.Path({str(tmp_path)!r}) / 'seen'\n"
        "first = not seen.exists()\n"
        "seen.touch()\n"
        "sys.exit(6 if first else 0)"
    )
    assert list(pool(tmp_path, script, jobs=1).work([0])) == [(0, 0)]


def test_a_pool_that_is_left_takes_its_processes_with_it(tmp_path):
    made = pool(tmp_path, "import sys; sys.stdin.read()", jobs=2)
    work = made.work([0])
    made.waiting.append(1)
    made.out = tmp_path
    made._start()
    (process,) = [p for _, p in made.running.values()]
    work.close()  # never begun: nothing to stop
    made._stop()
    assert process.returncode == -signal.SIGTERM


def test_cells_share_training_baseline_and_statistics(tmp_path, monkeypatch):
    collected = []
    collect = run_stages.collect
    monkeypatch.setattr(
        run_stages, "collect", lambda *a, **k: collected.append(1) or collect(*a, **k)
    )
    trained = [*SMALL[:1], *SMALL[2:], "train.epochs=1", "train.warmup_epochs=0"]
    cells = sweep.cells("quickstart", [*trained, "plan.macs=0.7,0.5"])
    reports = [
        run(c.recipe, tmp_path / c.name, cache=StageCache(tmp_path / sweep.SHARED)) for c in cells
    ]
    assert len(collected) == 1
    first, second = (tmp_path / c.name for c in cells)
    for name in ("statistics.safetensors", "trained/model.safetensors"):
        assert (first / name).read_bytes() == (second / name).read_bytes()
    assert reports[0].measurements[0] == reports[1].measurements[0]
    shared = sorted(p.name.partition("-")[0] for p in (tmp_path / sweep.SHARED).iterdir())
    assert shared == ["baseline", "collect", "train"]
    assert verify(first) == verify(second) == []
    assert all(sweep.finished(c, tmp_path) for c in cells)
    made = sweep.gather(cells, tmp_path)
    assert {r.budget for r in made.rows} == {None, "macs 0.7", "macs 0.5"}

    # what is damaged in between is not passed on, and does not count as ended
    stored = next((tmp_path / sweep.SHARED).glob("collect-*")) / "statistics.safetensors"
    whole = stored.read_bytes()
    stored.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    third = sweep.cells("quickstart", [*trained, "plan.macs=0.7,0.6"])[1]
    run(third.recipe, tmp_path / third.name, cache=StageCache(tmp_path / sweep.SHARED))
    assert len(collected) == 2
    assert stored.read_bytes() == whole
    (first / "statistics.safetensors").write_bytes(b"")
    assert [sweep.finished(c, tmp_path) for c in cells] == [False, True]


def start(out: Path, *words: str) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "seprune", "sweep", "quickstart", *SMALL, *words]
    return subprocess.Popen([*command, "--out", str(out)], stderr=subprocess.PIPE)


@pytest.mark.slow
def test_kill_9_in_the_middle_and_the_same_command_goes_on(tmp_path):
    words = ("importance.criterion=l1,l2",)
    process = start(tmp_path, *words)
    journal = tmp_path / "criterion=l1" / "journal.jsonl"
    while process.poll() is None and not journal.exists():
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    assert not (tmp_path / "criterion=l2" / "report.json").exists()
    again = start(tmp_path, *words)  # while the killed sweep's child may still hold its cell
    output = again.communicate()[1].decode()
    assert again.returncode == 0, output
    for name in ("criterion=l1", "criterion=l2"):
        stages = [json.loads(x)["stage"] for x in (tmp_path / name / "journal.jsonl").open()]
        assert stages.count("baseline") == 1
        assert read(tmp_path / name).budgets
    with (tmp_path / "compare.csv").open() as stream:
        assert {row["criterion"] for row in csv.DictReader(stream)} == {"", "l1", "l2"}


def test_the_command_line_lists_and_refuses(tmp_path, monkeypatch, capsys):
    def call(*words: str) -> tuple[int, str, str]:
        line = ["seprune", "sweep", "quickstart", *words, "--out", str(tmp_path / "s")]
        monkeypatch.setattr(sys, "argv", line)
        with pytest.raises(SystemExit) as stop:
            cli.main()
        output = capsys.readouterr()
        return int(stop.value.code or 0), output.out, output.err

    status, out, _ = call("seed=0,1", "--list", "--json")
    assert status == 0
    listed = [(row["index"], row["cell"], row["ended"]) for row in json.loads(out)]
    assert listed == [(0, "seed=0", False), (1, "seed=1", False)]
    assert "   1         seed=1" in call("seed=0,1", "--list")[1]
    status, _, err = call("seed=0,1", "--index", "2")
    assert (status, "0 to 1" in err) == (2, True)
    status, _, err = call("plan.latency=0.5,0.6", "--jobs", "2")
    assert (status, "needs the machine for itself" in err) == (2, True)
    assert not (tmp_path / "s").exists()
