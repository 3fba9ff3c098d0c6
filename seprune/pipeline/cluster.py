"""Cells of a sweep on engines that other people keep running: a Ray cluster, or Slurm.

Each cell is a process on some node, as it is one on this machine without `--on`. The folder of the
sweep has to be on a disk that all nodes see. A node that is lost takes its processes with it, and
its cells start again elsewhere, where their journals say; the lock of a cell's folder keeps a
process that still ends and its successor apart, so no stage is done by two.
"""

from __future__ import annotations

import os
import socket
import subprocess
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from seprune.errors import EnvironmentFault, first_line
from seprune.pipeline.sweep import LOCKED, LOG, TRIES, Cell
from seprune.runtime import files
from seprune.runtime.child_process import MAIN, child_environment, python_command
from seprune.runtime.extras import require
from seprune.runtime.interrupts import safe_point
from seprune.runtime.paths import inside

POLL_SECONDS = 0.5
LOST = -1  # the status of a cell whose node or process has gone
RESTARTS = 5  # of such a cell
ENGINES = ("ray", "slurm")


@dataclass(frozen=True)
class Resources:
    """What a run asks its engine for; `hours` is Slurm's time limit."""

    cpus: int = 1
    gpus: int = 0
    hours: float = 24.0


@dataclass(frozen=True)
class CellProcess:
    """One cell as a process; called on a node, it gives the exit status.

    Attributes:
        words: of the command, behind `seprune`.
        log: the file that its messages go to.
        home: the folder that it works in.
    """

    words: tuple[str, ...]
    log: Path
    home: str
    threads: int

    def __call__(self) -> int:
        with files.log(self.log) as log:
            process = subprocess.Popen(
                python_command(MAIN, *self.words),
                cwd=self.home,
                stdin=subprocess.PIPE,  # closes when this process dies, however it dies
                stdout=log,
                stderr=log,
                env=child_environment(OMP_NUM_THREADS=str(self.threads)),
                start_new_session=True,
            )
            try:
                return process.wait()
            finally:
                process.terminate()
                process.wait()

    def checkpoint(self) -> Any:
        """What submitit queues again when Slurm takes the node away or the time is up."""
        helpers = require("submitit.helpers", extra="slurm", what="--on slurm needs a package")
        return helpers.DelayedSubmission(self)


class Engine(Protocol):
    """Where processes are started."""

    def start(self, process: CellProcess) -> Any:
        """Queue it; a handle."""
        ...

    def status(self, handle: Any) -> int | None:
        """The exit status, `LOST`, or None while it waits or works."""
        ...

    def stop(self, handle: Any) -> None:
        """End it, or take it out of the queue."""
        ...


class RayEngine:
    """The Ray cluster that `RAY_ADDRESS` names, or that this machine belongs to.

    Raises:
        EnvironmentFault: there is none, or Ray is not installed.
    """

    def __init__(self, resources: Resources) -> None:
        self.ray = require("ray", extra="ray", what="--on ray needs a package")
        address = os.environ.get("RAY_ADDRESS", "auto")
        if not self.ray.is_initialized():
            try:
                _knock(address)
                self.ray.init(address=address, log_to_driver=False, logging_level="ERROR")
            except (OSError, RuntimeError, ValueError) as error:
                raise EnvironmentFault(
                    f"--on ray: there is no cluster at {address}",
                    why=first_line(error),
                    fix="ray start --head, or let RAY_ADDRESS name the cluster",
                ) from error
        how = {"num_cpus": resources.cpus, "num_gpus": resources.gpus, "max_retries": 0}
        self.task = self.ray.remote(**how)(_call)

    def start(self, process: CellProcess) -> Any:
        return self.task.remote(process)

    def status(self, handle: Any) -> int | None:
        done, _ = self.ray.wait([handle], timeout=0)
        if not done:
            return None
        try:
            return int(self.ray.get(handle))
        except self.ray.exceptions.RayError:
            return LOST

    def stop(self, handle: Any) -> None:
        self.ray.cancel(handle, force=False)


def _knock(address: str) -> None:
    """
    Raises:
        OSError: nobody listens at HOST:PORT; Ray would end the process, after more than a minute.
    """
    host, _, port = address.rpartition(":")
    if port.isdigit() and "://" not in address:
        socket.create_connection((host, int(port)), timeout=5).close()


def _call(process: CellProcess) -> int:
    return process()


class SlurmEngine:
    """Slurm by submitit; partition and account are what `SBATCH_PARTITION` and so on say.

    Args:
        home: the folder of submitit's own files.
        cluster: None is Slurm; `local` are processes of this machine.

    Raises:
        EnvironmentFault: there is no Slurm here, or submitit is not installed.
    """

    def __init__(self, resources: Resources, home: Path, cluster: str | None = None) -> None:
        submitit = require("submitit", extra="slurm", what="--on slurm needs a package")
        try:
            self.executor = submitit.AutoExecutor(str(home), cluster=cluster or "slurm")
        except RuntimeError as error:
            raise EnvironmentFault(
                "--on slurm: there is no Slurm here",
                why=first_line(error),
                fix="run it where sbatch is, or without --on",
            ) from error
        self.executor.update_parameters(
            name="seprune",
            timeout_min=max(1, round(60 * resources.hours)),
            cpus_per_task=resources.cpus,
            gpus_per_node=resources.gpus,
        )

    def start(self, process: CellProcess) -> Any:
        return self.executor.submit(process)

    def status(self, handle: Any) -> int | None:
        if not handle.done():
            return None
        try:
            return int(handle.result())
        except Exception:  # what a job raised, or that it ended without a word
            return LOST

    def stop(self, handle: Any) -> None:
        handle.cancel()


@dataclass
class EnginePool:
    """Cells at work on an engine; as `sweep.WorkerPool` on this machine.

    Attributes:
        words: of the command for a cell, behind which its index goes.
        jobs: how many are queued or at work at a time; None: all.
        tell: what people are told of cells that start again.
    """

    out: Path
    cells: Sequence[Cell]
    engine: Engine
    words: tuple[str, ...]
    jobs: int | None = None
    threads: int = 1
    tell: Callable[[str], None] = lambda text: None
    running: dict[int, Any] = field(default_factory=dict)

    def work(self, indices: Sequence[int]) -> Iterator[tuple[int, int]]:
        """Carry the cells out; (index, exit status) as each ends. Stops its processes with it."""
        waiting, tries = deque(indices), dict[tuple[int, int], int]()
        try:
            while waiting or self.running:
                while waiting and len(self.running) < (self.jobs or len(self.cells)):
                    index = waiting.popleft()
                    self.running[index] = self.engine.start(self._process(index))
                for index, status in self._ended():
                    tries[index, status] = tries.get((index, status), 0) + 1
                    most = {LOCKED: TRIES, LOST: RESTARTS}.get(status, 1)
                    if tries[index, status] < most:
                        waiting.append(index)
                        if status == LOST:
                            name = self.cells[index].name
                            self.tell(f"{name}: its node or its process was lost; it starts again")
                    else:
                        yield index, status
        finally:
            for handle in self.running.values():
                self.engine.stop(handle)

    def _process(self, index: int) -> CellProcess:
        log = inside(self.out.absolute(), f"{self.cells[index].name}/{LOG}")
        words = (*self.words, "--index", str(index))
        return CellProcess(words, log, os.getcwd(), self.threads)

    def _ended(self) -> Iterator[tuple[int, int]]:
        """Those that have ended, after a moment of waiting."""
        time.sleep(POLL_SECONDS)
        safe_point()
        for index, handle in list(self.running.items()):
            if (status := self.engine.status(handle)) is not None:
                del self.running[index]
                yield index, status
