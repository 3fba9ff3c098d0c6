"""A grid of runs: every comma in `key=value` makes cells, and every cell is a run folder.

Cells are processes of their own, so that one which fails takes nobody with it. They find the stages
that they share (training, baseline, statistics) in `shared/`, each done once.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import os
import re
import subprocess
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from seprune.errors import InputError, UsageError
from seprune.pipeline import run_folder
from seprune.recipe import Recipe, dump_recipe, load_recipe
from seprune.runtime import files, reading
from seprune.runtime.child_process import child_environment
from seprune.runtime.interrupts import safe_point
from seprune.runtime.paths import inside
from seprune.runtime.text import shell_word
from seprune.runtime.threads import usable_cores

SHARED, LOG, JOBS = "shared", "log.txt", "jobs"  # the last: of an engine
LOCKED = 6  # the exit status of a cell that another process works on
TRIES = 15  # for such a cell: about a minute, until a killed sweep's children have gone
LONGEST_NAME, MOST_CELLS = 120, 10_000
POLL_SECONDS = 0.1


@dataclass(frozen=True)
class Cell:
    """One run of a sweep: its folder's name, the overrides that make it, its recipe."""

    name: str
    overrides: tuple[str, ...]
    recipe: Recipe


def cells(path: str, overrides: Sequence[str], *, allow_code: bool = False) -> list[Cell]:
    """Every combination of the values between commas, the last key running fastest.

    Commas inside of brackets and quotes belong to a value: `plan.macs=[0.7,0.5],0.3` are two cells,
    the first with two budgets.

    Raises:
        UsageError: no commas, a key or a value twice, too many runs, or a recipe that is not valid.
    """
    axes = [_axis(override) for override in overrides]
    _refuse_twice([key for key, _ in axes], "key")
    for key, values in axes:
        _refuse_twice([f"{key}={value}" for value in values], "value")
    swept = [key for key, values in axes if len(values) > 1]
    if not swept:
        raise UsageError(
            "nothing to sweep: no key has several values",
            why="values with commas between them make the cells",
            fix=f"seprune sweep {shell_word(path)} seed=0,1,2, or seprune run for a single run",
        )
    if (count := math.prod(len(values) for _, values in axes)) > MOST_CELLS:
        raise UsageError(
            f"a sweep of {count:,} runs",
            why=f"there can be {MOST_CELLS:,} at most",
            fix="give fewer values, or make several sweeps",
        )
    names = _short(swept)
    found = []
    for combination in itertools.product(*(values for _, values in axes)):
        chosen = dict(zip((key for key, _ in axes), combination))
        name = _folder({short: chosen[key] for key, short in names.items()})
        given = tuple(f"{key}={value}" for key, value in chosen.items())
        recipe = load_recipe(path, given, allow_code=allow_code)
        if "name" not in chosen:  # a table of cells that are all called alike tells nothing
            given = (*given, f"name={json.dumps(f'{recipe.name} {name}', ensure_ascii=False)}")
            recipe = load_recipe(path, given, allow_code=allow_code)
        found.append(Cell(name, given, recipe))
    _refuse_twice([cell.name for cell in found], "folder")
    return found


def finished(cell: Cell, out: Path) -> bool:
    """Whether a cell's run has ended in its folder, and nothing there has changed since."""
    folder = out / cell.name
    try:
        recipe = reading.read_text(inside(out, f"{cell.name}/recipe.yaml"))
        same = recipe == dump_recipe(cell.recipe)
    except (OSError, InputError):
        return False
    ended = any(record.stage == "report" for record in run_folder.RunFolder(folder).records())
    return same and ended and not run_folder.verify(folder)


@dataclass
class WorkerPool:
    """Cells at work: at most `jobs` processes, each started by the command line of its index."""

    out: Path
    cells: Sequence[Cell]
    jobs: int
    command: Callable[[int], Sequence[str]]
    waiting: deque[int] = field(default_factory=deque)
    running: dict[int, tuple[int, subprocess.Popen[bytes]]] = field(default_factory=dict)

    def work(self, indices: Sequence[int]) -> Iterator[tuple[int, int]]:
        """Carry the cells out; (index, exit status) as each ends. Stops its processes with it."""
        self.waiting.extend(indices)
        tries: dict[int, int] = {}
        try:
            while self.waiting or self.running:
                self._start()
                for index, status in self._ended():
                    tries[index] = tries.get(index, 0) + 1
                    if status == LOCKED and tries[index] < TRIES:
                        self.waiting.append(index)
                    else:
                        yield index, status
        finally:
            self._stop()

    def _start(self) -> None:
        slots = [
            n for n in range(self.jobs) if n not in {slot for slot, _ in self.running.values()}
        ]
        for slot in slots[: len(self.waiting)]:
            index = self.waiting.popleft()
            with files.log(inside(self.out, f"{self.cells[index].name}/{LOG}")) as log:
                self.running[index] = slot, self._process(index, slot, log)

    def _process(self, index: int, slot: int, log: IO[bytes]) -> subprocess.Popen[bytes]:
        """A session of its own: a Ctrl-C reaches it once, as the signal that its parent sends."""
        return subprocess.Popen(
            self.command(index),
            stdin=subprocess.PIPE,  # closes when this process dies, however it dies
            stdout=log,
            stderr=log,
            env=child_environment(**worker_environment(slot, self.jobs)),
            start_new_session=True,
        )

    def _ended(self) -> Iterator[tuple[int, int]]:
        """Those that have ended, after a moment of waiting."""
        for index, (_, process) in list(self.running.items()):
            try:
                status = process.wait(POLL_SECONDS / len(self.running))
            except subprocess.TimeoutExpired:
                continue
            del self.running[index]
            yield index, status
        safe_point()

    def _stop(self) -> None:
        for _, process in self.running.values():
            process.terminate()
        for _, process in self.running.values():
            process.wait()


def worker_environment(slot: int, jobs: int) -> dict[str, str]:
    """A worker's share of the machine: its threads, and its GPU where there are several."""
    variables: dict[str, str] = {}
    if jobs == 1:
        return variables
    if "OMP_NUM_THREADS" not in os.environ:
        variables["OMP_NUM_THREADS"] = str(max(1, usable_cores() // jobs))
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    devices = _gpus() if visible is None else [d for d in visible.split(",") if d]
    if len(devices) > 1:
        variables["CUDA_VISIBLE_DEVICES"] = devices[slot % len(devices)]
    return variables


def gather(cells: Sequence[Cell], out: Path) -> Any:
    """The comparison of the cells that have ended, written as compare.html, .csv and .json."""
    from seprune.report import compare, measurement, ways
    from seprune.report.html import write_comparison

    folders = [out / c.name for c in cells]
    found = [measurement.read(folder) for folder in folders]
    made = compare.compare(found, ways.run_names(found, folders))
    write_comparison(made, out / "compare.html")
    compare.write_csv(made, out / "compare.csv")
    files.write_json(out / "compare.json", measurement.plain(made.to_json()))
    return made


def refuse_failed(statuses: dict[str, int], out: Path) -> None:
    """
    Raises:
        InputError: cells that ended badly; each with its exit status and its last error.
    """
    failed = {name: status for name, status in statuses.items() if status}
    if not failed:
        return
    lines = [f"{name}: {_last_error(out / name / LOG)} (status {s})" for name, s in failed.items()]
    error = InputError(
        f"{len(failed)} of {len(statuses)} cells failed",
        why="\n".join(lines),
        fix=f"read {out / next(iter(failed)) / LOG}; the same command goes on with what is missing",
        code="cells",
    )
    if len(set(failed.values())) == 1:
        error.exit_status = max(1, *failed.values())
    raise error


def _last_error(path: Path) -> str:
    text = reading.read_text(path, errors="replace") if path.is_file() else ""
    lines = text.splitlines()
    errors = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]
    return errors[-1] if errors else (lines or ["no message"])[-1]


def _gpus() -> list[str]:
    import torch

    return [str(n) for n in range(torch.cuda.device_count())]


def _axis(override: str) -> tuple[str, list[str]]:
    key, _, text = override.partition("=")
    values = split_values(text)
    if len(values) > 1 and not all(values):
        raise UsageError(
            f"{override}: an empty value",
            why="every comma separates two values",
            fix=f"{key}={','.join(filter(None, values))}",
        )
    return key, values


def split_values(text: str) -> list[str]:
    """The values between commas, those inside of brackets and quotes left alone."""
    values, depth, quote = [""], 0, ""
    for letter in text:
        if letter == "," and not depth and not quote:
            values.append("")
            continue
        if quote:
            quote = "" if letter == quote else quote
        elif letter in "'\"":
            quote = letter
        else:
            depth += (letter in "[{") - (letter in "]}")
        values[-1] += letter
    return [value.strip() for value in values]


def _short(keys: Sequence[str]) -> dict[str, str]:
    """Each key with its last part where that is unmistakable."""
    ends = [key.rpartition(".")[2] for key in keys]
    return {key: end if ends.count(end) == 1 else key for key, end in zip(keys, ends)}


def _folder(values: dict[str, str]) -> str:
    """A folder's name that says what the cell is, in letters that every shell leaves alone."""
    plain = {key: re.sub(r"[^\w.+-]+", "-", value).strip("-") for key, value in values.items()}
    name = ",".join(f"{key}={value}" for key, value in plain.items())
    if len(name) <= LONGEST_NAME:
        return name
    return f"{name[:LONGEST_NAME]}-{hashlib.sha256(name.encode()).hexdigest()[:8]}"


def _refuse_twice(names: Sequence[str], what: str) -> None:
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise UsageError(
            f"a {what} is given twice: {', '.join(twice)}",
            why="every cell must be another run, in a folder of its own",
            fix="say it once",
        )
