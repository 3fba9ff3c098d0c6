"""Several processes under `torchrun`: the same as one, and all of them end when one does."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from harness import Subject, reported
from safetensors.torch import load_file
from torch import distributed as dist
from warm import Warm

from seprune.pipeline.run import run
from seprune.pipeline.run_folder import RunFolder, open_run
from seprune.recipe import load_recipe
from seprune.report.measurement import read

ROOT = Path(__file__).parents[2]
SMALL = (
    "model.name=seprune/se_resnet8",
    "train=null",
    "data.batch_size=50",
    "collect.images=320",
    "plan.min_channels=2",
    "finetune.epochs=2",
    "finetune.batch_size=100",
    "finetune.recalibrate=64",
    "finetune.warmup_epochs=0",
    "report.latency=false",
    "report.html=false",
    "device=cpu",
)


def launch(
    world: int, out: Path, *overrides: str, only: Sequence[str] = SMALL, **environment: str
) -> subprocess.Popen[str]:
    """`seprune run quickstart` by `torchrun`, or alone where `world` is 0."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    torchrun = ["torch.distributed.run", "--nproc-per-node", str(world), "--master-port", str(port)]
    command = [sys.executable, "-m", *([*torchrun, "-m"] if world else []), "seprune"]
    return subprocess.Popen(
        [*command, "run", "quickstart", "--out", str(out), *only, *overrides],
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def end(process: subprocess.Popen[str]) -> str:
    output: str = process.communicate(timeout=900)[0]
    return output


def ranks(process: subprocess.Popen[str]) -> dict[int, int]:
    """rank -> pid of the processes that `torchrun` has started."""
    found = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            parent = (folder / "stat").read_text().rpartition(")")[2].split()[1]
            words = (folder / "environ").read_bytes().split(b"\0")
        except OSError:
            continue
        given = [w for w in words if w.startswith(b"RANK=")]
        if int(parent) == process.pid and given:
            found[int(given[0][5:])] = int(folder.name)
    return found


def wait_for(path: Path, process: subprocess.Popen[str]) -> None:
    while not path.exists():
        assert process.poll() is None, end(process)
        time.sleep(0.05)


def curve(out: Path) -> list[float]:
    lines = (out / "finetuned" / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line)["loss"] for line in lines]


def stages(out: Path) -> list[str]:
    return [record.stage for record in RunFolder(out).records()]


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("alone") / "run"
    run(load_recipe("quickstart", SMALL), out)
    return out


def fork(
    run: Subject, world: int, out: Path, codes: dict[int, str], **environment: str
) -> tuple[list[int], dist.TCPStore]:
    """The processes of a run as `torchrun` starts them, and the store that it keeps for them.

    Unlike `torchrun`, nobody ends them when one of them has gone: they have to find out themselves.
    """
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port), "WORLD_SIZE": str(world)}
    place |= {"TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RESTART_COUNT": "0"}
    pids = []
    for rank in range(world):
        own = place | {"RANK": str(rank), "LOCAL_RANK": str(rank), **environment}
        pids.append(run.start(out, env=own, before=codes.get(rank, "")))
    return pids, store


@pytest.mark.fault(33)
def test_every_stage_on_two_processes_equals_one(warm: Warm, tmp_path: Path, alone: Path):
    """359 reporting images, batches of 50 and 100: nothing divides by 2 or 3."""
    subject = Subject(warm, tmp_path, ("quickstart", *SMALL))
    pids, _store = fork(subject, 2, tmp_path / "run", {})
    ended = [warm.wait(pid) for pid in pids]
    assert [done and done.status for done in ended] == [0, 0], ended
    assert sum(done.output.count("report: ") for done in ended) == 1, "one process speaks"
    require_equal(tmp_path / "run", alone)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.fault(33)
def test_every_stage_under_torchrun_on_three_processes_equals_one(tmp_path: Path, alone: Path):
    process = launch(3, tmp_path)
    output = end(process)
    assert process.returncode == 0, output
    assert output.count("report: ") == 1, "one process speaks"
    require_equal(tmp_path, alone)


def require_equal(several: Path, alone: Path) -> None:
    """A run of several processes has the stages, plans, weights and numbers of one process's."""
    assert stages(several) == stages(alone)
    plans = [json.loads((out / "plan.json").read_text())["groups"] for out in (several, alone)]
    assert plans[0] == plans[1]
    ours, theirs = (load_file(out / "pruned" / "model.safetensors") for out in (several, alone))
    assert all(torch.allclose(ours[name], theirs[name], rtol=1e-4, atol=1e-6) for name in theirs)
    assert curve(several) == pytest.approx(curve(alone), rel=1e-4)
    for mine, other in zip(read(several).measurements, read(alone).measurements, strict=True):
        assert (mine.stage, mine.count, mine.macs) == (other.stage, other.count, other.macs)
        assert mine.loss == pytest.approx(other.loss, rel=1e-4 if "tuned" in mine.stage else 1e-6)
    left = {path.name for path in several.rglob("*") if path.is_file()}
    assert not {name for name in left if name.startswith("collecting-") or name.endswith(".part")}


@pytest.mark.slow
@pytest.mark.fault(33)
@pytest.mark.fault(28)
def test_a_killed_process_ends_all_and_fewer_go_on(tmp_path: Path):
    process = launch(2, tmp_path, "finetune.epochs=60", "finetune.schedule=constant")
    wait_for(tmp_path / "finetuned" / "metrics.jsonl", process)
    pids = ranks(process)
    start = time.monotonic()
    os.kill(pids[1], signal.SIGKILL)
    output = end(process)
    assert time.monotonic() - start < 60
    assert process.returncode != 0
    assert not any(Path(f"/proc/{pid}").exists() for pid in pids.values())
    assert "go on with: " in output or "it goes on, also with fewer processes" in output, output
    assert output.count("error: ") == 1
    before, lines = stages(tmp_path), curve(tmp_path)
    last = launch(0, tmp_path, "finetune.epochs=60", "finetune.schedule=constant")
    wait_for(tmp_path / "finetuned" / "state", last)
    deadline = time.monotonic() + 60
    while len(curve(tmp_path)) <= len(lines) + 1 and time.monotonic() < deadline:
        time.sleep(0.05)
    last.send_signal(signal.SIGTERM)
    assert end(last) is not None
    assert last.returncode in (0, 143)
    assert curve(tmp_path)[: len(lines)] == lines, "the epochs before are not done again"
    assert stages(tmp_path)[: len(before)] == before


@pytest.mark.slow
@pytest.mark.fault(33)
def test_a_process_that_hangs_ends_all(tmp_path: Path):
    process = launch(2, tmp_path, "finetune.epochs=60", SEPRUNE_TIMEOUT="20")
    wait_for(tmp_path / "finetuned" / "metrics.jsonl", process)
    pids = ranks(process)
    os.kill(pids[1], signal.SIGSTOP)
    output = end(process)
    assert process.returncode != 0
    assert "another of the 2 processes ended without a word, or hangs" in output, output
    assert not any(Path(f"/proc/{pid}").exists() for pid in pids.values())


GONE = """
import os, signal
from seprune.pipeline.runner import Runner

carry_out = Runner._carry_out

def gone(self, begun, key):
    if begun.name.partition("/")[0] == {stage!r}:
        os.kill(os.getpid(), {signum})
    return carry_out(self, begun, key)

Runner._carry_out = gone
"""


@pytest.fixture(scope="module")
def whole(warm: Warm, tiny_run: Subject, tmp_path_factory: pytest.TempPathFactory) -> Subject:
    """A small run with every stage, by one process.

    It recalibrates nothing: BatchNorm's variances are means over the batches of each process, and
    three share a batch of 8.
    """
    kept = [word for word in tiny_run.argv if not word.startswith("finetune.recalibrate")]
    more = ("plan.allocation=sensitivity", "sensitivity.images=4", "finetune.recalibrate=0")
    home = tmp_path_factory.mktemp("whole")
    return Subject.unbroken(warm, home, (*kept, *more), tiny_run.inputs)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.fault(33)
@pytest.mark.parametrize("victim", [0, 1])
@pytest.mark.parametrize(("signum", "then"), [(signal.SIGKILL, 3), (signal.SIGSTOP, 1)])
@pytest.mark.parametrize(
    "stage", ["train", "baseline", "collect", "sensitivity", "prune", "finetune", "report"]
)
def test_one_process_gone_in_any_stage_ends_the_other(
    warm, tmp_path, whole, stage, signum, then, victim
):
    """Killed, and the same command goes on with three processes; stopped, and one goes on."""
    out, code = tmp_path / "run", GONE.format(stage=stage, signum=int(signum))
    pids, _store = fork(whole, 2, out, {victim: code}, SEPRUNE_TIMEOUT="60")
    done = warm.wait(pids[1 - victim], limit=900)
    assert done is not None, "the other one waits for ever"
    reported(done, 4)
    assert "another of the 2 processes ended without a word, or hangs" in done.output
    warm.kill(pids[victim], 0)
    alone = whole.home / "whole"
    before, names = stages(out), stages(alone)
    assert names[len(before)].partition("/")[0] == stage
    assert before == names[: len(before)]
    pids, _store = fork(whole, then, out, {})
    for pid in pids:
        done = warm.wait(pid, limit=900)
        assert done is not None
        assert done.status == 0, done.output
    assert [name for name in stages(out) if name != "start"] == names[1:]
    for mine, other in zip(read(out).measurements, read(alone).measurements, strict=True):
        assert (mine.stage, mine.count, mine.macs) == (other.stage, other.count, other.macs)
        assert mine.loss == pytest.approx(other.loss, rel=1e-2)


EVERY = (
    "train.epochs=2",
    "train.batch_size=100",
    "sensitivity.images=64",
    "prune.recover=reconstruct",
    "prune.epochs=1",
)


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.fault(33)
def test_two_groups_of_processes_equal_one_process_in_every_stage(tmp_path: Path):
    """`torchrun --nnodes 2` twice, as on two machines: a training, and all that follows it."""
    plain = [word for word in SMALL if not word.startswith("train=")]
    single = run(load_recipe("quickstart", [*plain, *EVERY]), tmp_path / "alone")
    out = tmp_path / "run"
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    groups = [
        subprocess.Popen(
            [sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--node-rank",
             str(rank), "--nproc-per-node", "2", "--master-addr", "127.0.0.1", "--master-port",
             str(port), "-m", "seprune", "run", "quickstart", "--out", str(out), *plain, *EVERY],
            env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )
        for rank in range(2)
    ]  # fmt: skip
    said = [group.communicate(timeout=1000)[0] for group in groups]
    assert [group.returncode for group in groups] == [0, 0], said
    assert ["report: " in text for text in said] == [True, False], "one process speaks"
    assert stages(out) == stages(tmp_path / "alone")
    assert {"train", "baseline", "collect", "sensitivity"} <= set(stages(out))
    plans = [json.loads((p / "plan.json").read_text())["groups"] for p in (out, tmp_path / "alone")]
    assert plans[0] == plans[1]
    for name in ("trained", "pruned", "finetuned"):
        ours, theirs = (
            load_file(p / name / "model.safetensors") for p in (out, tmp_path / "alone")
        )
        assert ours.keys() == theirs.keys()
        worst = max(
            float((ours[n].float() - t.float()).norm() / (t.float().norm() + 1e-6))
            for n, t in theirs.items()
        )
        # sums in another order, which three trainings one after the other make larger
        assert worst < (1e-2 if name == "trained" else 5e-2), (name, worst)
    for mine, other in zip(read(out).measurements, single.measurements, strict=True):
        assert (mine.stage, mine.count, mine.macs) == (other.stage, other.count, other.macs)
        assert mine.loss == pytest.approx(other.loss, rel=1e-3)
        assert mine.metrics["top1"] == pytest.approx(other.metrics["top1"], abs=2 / 359)


HUNGRY = """
import os
import torch
from seprune.models import build

def network():
    torch.manual_seed(0)
    body = build("seprune/se_resnet8", classes=10, input=(1, 8, 8))
    body.register_forward_pre_hook(check)
    return body

def check(module, inputs):
    if module.training and os.environ.get("RANK") == "1":
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.")
"""


@pytest.mark.slow
@pytest.mark.fault(33)
@pytest.mark.fault(25)
def test_an_error_in_one_process_is_the_error_of_all(tmp_path: Path):
    """Memory is short for the second process alone: its error ends both, with its status."""
    (tmp_path / "net.py").write_text(HUNGRY)
    name = f"model.name={tmp_path / 'net.py'}:network"
    process = launch(2, tmp_path / "run", name, "--allow-code")
    output = end(process)
    what = "error: process 1 of 2: out of memory with micro-batches of 50 images"
    assert what in output, output
    assert "set finetune.accumulate=2 and run the same command again" in output
    assert output.count("exitcode  : 4") == 2, output
    assert stages(tmp_path / "run")[-1].startswith("prune/"), "what was finished stays"


@pytest.mark.slow
@pytest.mark.fault(33)
@pytest.mark.fault(30)
def test_a_fault_of_the_first_process_alone_is_the_error_of_all(tmp_path: Path):
    """Only the first process takes the lock; who holds the folder is reported once."""
    out = tmp_path / "run"
    with open_run(out, "name: another\n"):
        process = launch(2, out)
        output = end(process)
    assert f"{out}: another run works here" in output.replace("\n", ""), output
    assert output.count("another run works here") == 1
    assert output.count("exitcode  : 6") == 2, output
