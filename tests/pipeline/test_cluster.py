"""Sweeps on engines: every cell ends and none twice, though nodes and processes are killed."""

from __future__ import annotations

import collections
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from test_sweep import SMALL

from seprune.errors import EnvironmentFault
from seprune.pipeline import cluster, sweep
from seprune.pipeline.cluster import LOST, CellProcess, EnginePool, Resources, SlurmEngine
from seprune.pipeline.run_folder import verify

GRID = ("plan.macs=0.8,0.7,0.6", "importance.criterion=l1,l2")


class Script:
    """An engine that ends every process at once, with the statuses that it is given in turn."""

    def __init__(self, **statuses: list[int]) -> None:
        self.statuses = statuses
        self.started: list[str] = []
        self.stopped: list[str] = []
        self.at_once = 0
        self.going: set[str] = set()

    def start(self, process: CellProcess) -> str:
        name = process.log.parent.name
        self.started.append(name)
        self.going.add(name)
        self.at_once = max(self.at_once, len(self.going))
        return name

    def status(self, handle: str) -> int | None:
        left = self.statuses.get(handle.replace("=", ""), [0])
        if left == [None]:
            return None
        self.going.discard(handle)
        return left.pop(0) if len(left) > 1 else left[0]

    def stop(self, handle: str) -> None:
        self.stopped.append(handle)


@pytest.fixture
def pool(tmp_path, monkeypatch):
    monkeypatch.setattr(cluster, "POLL_SECONDS", 0.0)

    def make(engine: Script, jobs: int | None = None) -> EnginePool:
        cells = sweep.cells("quickstart", ["seed=0,1,2,3"])
        return EnginePool(tmp_path, cells, engine, ("sweep", "quickstart"), jobs)

    return make


def test_lost_and_locked_cells_start_again_and_failed_ones_do_not(pool):
    engine = Script(seed0=[LOST, LOST, 0], seed1=[6, 6, 6, 0], seed2=[3], seed3=[LOST])
    ended = dict(pool(engine).work(range(4)))
    assert ended == {0: 0, 1: 0, 2: 3, 3: LOST}
    counts = collections.Counter(engine.started)
    assert counts == {"seed=0": 3, "seed=1": 4, "seed=2": 1, "seed=3": cluster.RESTARTS}


def test_so_many_are_at_work_at_a_time_and_all_without_a_number(pool):
    for jobs, most in ((2, 2), (None, 4)):
        engine = Script()
        assert len(dict(pool(engine, jobs).work(range(4)))) == 4
        assert engine.at_once == most


def test_a_pool_that_is_left_stops_what_it_started(pool):
    engine = Script(seed1=[None], seed2=[None])
    work = pool(engine).work(range(3))
    assert next(work) == (0, 0)
    work.close()
    assert sorted(engine.stopped) == ["seed=1", "seed=2"]


@pytest.mark.slow
def test_a_cells_process_keeps_its_messages_and_its_status(tmp_path):
    process = CellProcess(("models", "no-such-*"), tmp_path / "log.txt", str(tmp_path), 1)
    assert process() == 3
    assert "error: no network is called like" in (tmp_path / "log.txt").read_text()


def test_what_is_not_there_is_named(seprune, monkeypatch, tmp_path):
    words = ("sweep", "quickstart", "seed=0,1", "--out", tmp_path / "s", "--on")
    status, _, err = seprune(*words, "kubernetes")
    assert (status, "there are ray and slurm" in err) == (2, True)
    monkeypatch.setenv("PATH", str(tmp_path))
    pytest.importorskip("submitit", reason="submitit is not installed")
    status, _, err = seprune(*words, "slurm")
    assert (status, "there is no Slurm here" in err) == (4, True)
    assert not (tmp_path / "s").exists()
    monkeypatch.setitem(sys.modules, "ray", None)
    status, _, err = seprune(*words, "ray")
    assert (status, "pip install 'seprune[ray]'" in err) == (4, True)


def test_latency_budgets_need_a_machine_for_themselves(seprune):
    status, _, err = seprune("sweep", "quickstart", "plan.latency=0.5,0.6", "--on", "slurm")
    assert (status, "needs the machine for itself" in err) == (2, True)


# -- real engines --------------------------------------------------------------------------------


def ancestors(pid: int) -> list[int]:
    found = []
    while pid > 1:
        try:
            stat = Path(f"/proc/{pid}/stat").read_text()
        except OSError:
            break
        pid = int(stat.rpartition(")")[2].split()[1])
        found.append(pid)
    return found


def holders(out: Path) -> dict[str, int]:
    """The process that works in each cell now."""
    found = {}
    for path in out.glob("*/lock.json"):
        try:
            found[path.parent.name] = json.loads(path.read_text())["pid"]
        except (OSError, ValueError):
            continue
    return found


def every_cell_has_ended_and_none_twice(out: Path) -> None:
    cells = sweep.cells("quickstart", [*SMALL, *GRID])
    assert len(cells) == 6
    assert all(sweep.finished(cell, out) for cell in cells)
    for cell in cells:
        lines = (out / cell.name / "journal.jsonl").read_text().splitlines()
        stages = collections.Counter(json.loads(line)["stage"] for line in lines)
        assert set(stages.values()) == {1}, (cell.name, stages)
        assert verify(out / cell.name) == []
    shared = [path.name for path in (out / sweep.SHARED).iterdir()]
    assert [name.partition("-")[0] for name in shared] == ["baseline"]
    assert (out / "compare.csv").is_file()


def started(out: Path, *words: str, **environment: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "seprune", "sweep", "quickstart", *SMALL, *GRID]
    return subprocess.Popen(
        [*command, "--out", str(out), *words],
        env={**os.environ, **environment},
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_ray_node_is_killed_and_every_cell_ends_once(tmp_path):
    pytest.importorskip("ray", reason="ray is not installed")
    from ray.cluster_utils import Cluster

    made = Cluster(initialize_head=True, head_node_args={"num_cpus": 0})
    nodes = [made.add_node(num_cpus=1) for _ in range(3)]
    made.wait_for_nodes()
    out = tmp_path / "sweep"
    process = started(out, "--on", "ray", RAY_ADDRESS=made.address)
    try:
        victim = None
        while victim is None:
            assert process.poll() is None, process.communicate()[1]
            for cell, pid in holders(out).items():
                above = ancestors(pid)
                for node in nodes:
                    if node.all_processes["raylet"][0].process.pid in above:
                        victim = cell, pid, node
            time.sleep(0.02)
        cell, pid, node = victim
        assert not (out / cell / "report.json").exists()
        made.remove_node(node, allow_graceful=False)
        said = process.communicate()[1]
    finally:
        process.kill()
        made.shutdown()
    assert process.returncode == 0, said
    assert not Path(f"/proc/{pid}").exists()
    assert f"{cell}: its node or its process was lost; it starts again" in said
    every_cell_has_ended_and_none_twice(out)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_job_of_submitit_is_killed_and_every_cell_ends_once(tmp_path, monkeypatch, seprune):
    """Its local executor: the same jobs as on Slurm, as processes of this machine."""
    pytest.importorskip("submitit", reason="submitit is not installed")
    home = tmp_path / "sweep"

    whole = SlurmEngine
    monkeypatch.setattr(cluster, "SlurmEngine", lambda r, h: whole(r, h, "local"))
    killed: list[tuple[str, int]] = []

    def kill() -> None:
        while not killed:
            for cell, pid in holders(home).items():
                for above in ancestors(pid)[:1]:  # the job's process, whose child the cell is
                    killed.append((cell, pid))
                    os.kill(above, signal.SIGKILL)
                    return
            time.sleep(0.02)

    watcher = threading.Thread(target=kill, daemon=True)
    watcher.start()
    words = ("sweep", "quickstart", *SMALL, *GRID, "--out", home, "--on", "slurm", "--jobs", 2)
    status, _, err = seprune(*words)
    assert status == 0, err
    [(cell, pid)] = killed
    assert not Path(f"/proc/{pid}").exists()
    assert f"{cell}: its node or its process was lost; it starts again" in err
    every_cell_has_ended_and_none_twice(home)


@pytest.mark.slow
def test_no_cluster_is_named(monkeypatch):
    pytest.importorskip("ray", reason="ray is not installed")
    import ray

    def nobody(**how: object) -> None:
        raise ConnectionError("Could not find any running Ray instance.")

    monkeypatch.setattr(ray, "init", nobody)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    with pytest.raises(EnvironmentFault, match="there is no cluster at auto") as caught:
        cluster.RayEngine(Resources())
    assert "RAY_ADDRESS" in caught.value.fix
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:9")
    with pytest.raises(EnvironmentFault, match=r"there is no cluster at 127\.0\.0\.1:9"):
        cluster.RayEngine(Resources())
