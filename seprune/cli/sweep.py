"""`seprune sweep`: a grid of runs, on this machine or as the array of a cluster."""

from __future__ import annotations

import os
import shlex
import signal
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from seprune.cli import console, options
from seprune.errors import UsageError
from seprune.pipeline import sweep as sweeps
from seprune.pipeline.sweep import Cell
from seprune.runtime.child_process import MAIN, python_command

if TYPE_CHECKING:
    from seprune.pipeline.cluster import EnginePool


@dataclass(frozen=True)
class PlaceOptions:
    """The options that say where runs are carried out."""

    on: Annotated[
        str | None, typer.Option(metavar="E", help="ray or slurm: on its nodes, not here.")
    ] = None
    cpus: Annotated[int, typer.Option(min=1, help="Cores of a run, with --on.")] = 1
    gpus: Annotated[int, typer.Option(min=0, help="GPUs of a run, with --on.")] = 0
    hours: Annotated[float, typer.Option(min=0.1, help="Time limit of a run, on Slurm.")] = 24.0


HERE = PlaceOptions()


def sweep(
    recipe: options.RecipeName,
    overrides: Annotated[
        list[str] | None,
        typer.Argument(metavar="[KEY=VALUE,...]...", help="Every comma makes another cell."),
    ] = None,
    out: options.Out = Path("runs/sweep"),
    jobs: Annotated[
        int | None,
        typer.Option(min=1, help="Runs at a time, each a process; 1, or all with --on."),
    ] = None,
    place: PlaceOptions = HERE,
    show: Annotated[bool, typer.Option("--list", help="The cells, and which have ended.")] = False,
    index: Annotated[
        int | None, typer.Option(metavar="I", help="One cell, here: for arrays of a cluster.")
    ] = None,
    worker_of: Annotated[int, typer.Option(hidden=True)] = 0,
    allow_code: options.AllowCode = False,
    json: options.Json = False,
) -> None:
    """A run for every combination of values, then all compared.

    The same command goes on where a stopped sweep ended.

    Examples:
      seprune sweep quickstart plan.macs=0.7,0.5 seed=0,1,2 --jobs 2
      seprune sweep quickstart seed=0,1,2 --out runs/seeds --list
      seprune sweep quickstart seed=0,1,2 --on ray --cpus 4
    """
    given = overrides or []
    cells = sweeps.cells(recipe, given, allow_code=allow_code)
    if show:
        _list(cells, out, json=json)
    elif index is not None:
        _one(recipe, cells, out, index=index, workers=worker_of, allow_code=allow_code)
    else:
        several = jobs or (2 if place.on else 1)
        _refuse_latency_beside_others(cells, several)
        again = ["sweep", recipe, *given, "--out", str(out)]
        again += ["--worker-of", str(several), *(["--allow-code"] if allow_code else [])]
        _all(_pool(place, out, cells, jobs, again), json=json)


def _pool(
    place: PlaceOptions, out: Path, cells: list[Cell], jobs: int | None, again: list[str]
) -> sweeps.WorkerPool | EnginePool:
    """Who carries out the cells, each by the command `again` with its index."""
    if place.on is None:
        return sweeps.WorkerPool(
            out, cells, jobs or 1, lambda i: python_command(MAIN, *again, "--index", str(i))
        )
    from seprune.pipeline import cluster

    wanted = cluster.Resources(place.cpus, place.gpus, place.hours)
    engine: cluster.Engine
    if place.on == "ray":
        engine = cluster.RayEngine(wanted)
    elif place.on == "slurm":
        engine = cluster.SlurmEngine(wanted, out / sweeps.JOBS)
    else:
        raise UsageError(
            f"--on {place.on}: no such engine",
            why=f"there are {' and '.join(cluster.ENGINES)}",
            fix="--on ray, --on slurm, or --jobs 2 for this machine",
        )
    return cluster.EnginePool(out, cells, engine, tuple(again), jobs, place.cpus, console.tell)


def _list(cells: list[Cell], out: Path, *, json: bool) -> None:
    rows = [
        {"index": n, "cell": c.name, "ended": sweeps.finished(c, out), "overrides": c.overrides}
        for n, c in enumerate(cells)
    ]
    if json:
        console.give(rows)
        return
    for row in rows:
        console.write(f"{row['index']:>4}  {'ended' if row['ended'] else '     '}  {row['cell']}")


def _one(
    path: str, cells: list[Cell], out: Path, *, index: int, workers: int, allow_code: bool
) -> None:
    """One cell in this process, sharing what it can with the others."""
    if not 0 <= index < len(cells):
        raise UsageError(
            f"--index {index}: there is no such cell",
            why=f"this sweep has {len(cells)} cells, 0 to {len(cells) - 1}",
            fix="seprune sweep ... --list",
        )
    if workers:
        _end_with_parent()
    from seprune.cli import open_inputs
    from seprune.pipeline.run import run
    from seprune.pipeline.stage_cache import StageCache

    cell = cells[index]
    folder = out / cell.name
    command = shlex.join(["seprune", "run", path, *cell.overrides, "--out", str(folder)])
    run(
        cell.recipe,
        folder,
        runtime=open_inputs.runtime(cell.recipe, folder, shared_machine=workers > 1),
        loader=open_inputs.loader(allow_code, cell.recipe.model),
        command=command,
        cache=StageCache(out / sweeps.SHARED),
    )
    console.tell(f"report: {folder / 'report.html'}")


def _all(pool: sweeps.WorkerPool | EnginePool, *, json: bool) -> None:
    """Every cell that has not ended yet, then the comparison of those that have."""
    statuses = {c.name: 0 for c in pool.cells if sweeps.finished(c, pool.out)}
    missing = [n for n, c in enumerate(pool.cells) if c.name not in statuses]
    if statuses:
        console.tell(f"{len(statuses)} of {len(pool.cells)} cells have ended before")
    ended = console.track(pool.work(missing), label="cells", total=len(missing), unit="cells")
    for index, status in ended:
        name = pool.cells[index].name
        statuses[name] = status
        console.tell(f"{name}: {'ended' if status == 0 else f'failed (status {status})'}")
    good = [c for c in pool.cells if statuses[c.name] == 0]
    if good:
        made = sweeps.gather(good, pool.out)
        from seprune.cli.tables import comparison

        console.stderr().print(comparison(made.table()))
        console.tell(f"comparison: {pool.out / 'compare.html'}")
        if json:
            console.give(made.to_json())
    sweeps.refuse_failed(statuses, pool.out)


def _refuse_latency_beside_others(cells: list[Cell], jobs: int) -> None:
    if jobs > 1 and any(c.recipe.plan.latency for c in cells):
        raise UsageError(
            f"--jobs {jobs}: a latency budget needs the machine for itself",
            why="runs beside each other slow each other down, and plans would follow that",
            fix="--jobs 1, or a machine for each cell: --index",
        )


def _end_with_parent() -> None:
    """Stop as on SIGTERM when standard input closes: the parent holds its other end."""

    def watch() -> None:
        while os.read(0, 1):  # not sys.stdin: its lock would outlive this thread
            pass
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=watch, daemon=True).start()
