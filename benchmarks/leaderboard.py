"""Which criterion keeps the most accuracy: every cell is a recipe, carried out by `seprune.run`.

    python benchmarks/leaderboard.py --data FOLDER --checkpoint se_resnet20=FILE --runs RUNS
    python benchmarks/leaderboard.py --full --data FOLDER --checkpoint se_resnet20=FILE --runs RUNS
    python benchmarks/leaderboard.py --study choice --data FOLDER ...
    python benchmarks/leaderboard.py --study inner --data FOLDER ...  # budgets, iterative, ...
    python benchmarks/leaderboard.py --full --write CELLS ...    # the recipes alone, for any runner

FOLDER holds train/ and val/. Without `--full`: SE-ResNet-20, small parts of the images, one short
epoch, for a CPU. `--full` is every network, budget and criterion with short and full tuning and the
controls, for a GPU. `choice` compares candidates for the default on images that the leaderboard
does not report on. `--networks`, `--methods`, `--seeds` and `--minutes` take parts; a command
goes on where it stopped. A network without a checkpoint, given or kept in benchmarks/weights, is
trained first by its recipe. When all
cells are done (or with `--so-far`) their numbers are in benchmarks/results/leaderboard-NAME.csv,
and `python benchmarks/readme.py` makes the tables and the figure.
"""

from __future__ import annotations

import argparse
import csv
import os
import platform
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from datetime import date
from pathlib import Path
from typing import Any

import result_rows
from grids import GRIDS, METHODS, NETWORKS, QUIET, Cell, Grid, cells
from kept_weights import kept
from standings import rank_correlation

from seprune.errors import SepruneError
from seprune.recipe import dump_recipe, load_recipe
from seprune.runtime.files import write_json, write_text
from seprune.runtime.reading import read_json

RESULTS = Path(__file__).parent / "results"


def carry_out(cell: Cell, runs: Path, data: Path, checkpoint: Path | None) -> list[dict[str, Any]]:
    """The rows of one cell; its run goes on, or is read again, if its folder is there."""
    from seprune.pipeline.run import run
    from seprune.pipeline.stage_cache import StageCache

    folder = home(cell, runs)
    if (folder / "rows.json").is_file():
        return list(read_json(folder / "rows.json"))
    began = time.monotonic()
    try:
        report = run(
            cell.recipe(data, checkpoint),
            folder,
            command="benchmarks/leaderboard.py",
            cache=StageCache(runs / "shared"),
        )
    except SepruneError as error:  # a budget out of reach is a result, and the others go on
        if len(cell.grid.budgets) > 1:
            rows = [r for c in _one_by_one(cell) for r in carry_out(c, runs, data, checkpoint)]
        else:
            rows = [_row(cell, f"macs {cell.grid.budgets[0]}", "cut", error=error.what)]
    else:
        rows = [
            _row(
                cell,
                m.budget,
                column,
                top1=m.value,
                macs=m.macs,
                count=m.count,
                dense=report.baseline.value if report.baseline else None,
            )
            for m in report.measurements
            if (column := cell.column(m.stage)) is not None
        ]
    print(f"{cell.name}: {time.monotonic() - began:.0f} s", flush=True)
    write_json(folder / "rows.json", rows)
    return rows


def _one_by_one(cell: Cell) -> list[Cell]:
    return [replace(cell, grid=replace(cell.grid, budgets=(b,))) for b in cell.grid.budgets]


def _row(cell: Cell, budget: str | None, column: str, **numbers: Any) -> dict[str, Any]:
    return {
        "network": cell.network,
        "method": cell.method,
        "seed": cell.seed,
        "images": cell.images,
        "recover": cell.recover,
        "budget": None if budget is None else float(budget.rpartition(" ")[2]),
        "column": column,
        **numbers,
    }


Key = tuple[str, int, int]  # method, images, seed


def scores_of(done: Sequence[Cell], runs: Path) -> dict[Key, list[float]]:
    """The score of every unit, as the runs of a grid with one budget kept them."""
    found = {}
    for cell in done:
        with (home(cell, runs) / "importance.csv").open(newline="") as file:
            scores = [float(row["score"]) for row in csv.DictReader(file) if row["score"]]
        found[cell.method, cell.images, cell.seed] = scores
    return found


def with_stability(
    rows: Sequence[dict[str, Any]], scores: Mapping[Key, Sequence[float]]
) -> list[dict[str, Any]]:
    """The rows with Spearman's rank correlation to the most images of every other seed, averaged.

    The same seed's images are no judge: the few are among the many.
    """
    most, seeds = max(key[1] for key in scores), sorted({key[2] for key in scores})
    made = []
    for row in rows:
        mine = scores[row["method"], row["images"], row["seed"]]
        others = [(row["method"], most, seed) for seed in seeds if seed != row["seed"]]
        each = [rank_correlation(mine, scores[key]) for key in others if key in scores]
        made.append({**row, "spearman": sum(each) / len(each) if each else None})
    return made


def trained(network: str, grid: Grid, runs: Path, data: Path) -> Path:
    """The dense network, trained once on all of `data` by its recipe for all its cells."""
    from seprune.pipeline.run import run

    shorter = (
        f"train.epochs={grid.dense[network]}", "train.warmup_epochs=1", "train.channels_last=true",
    )  # fmt: skip
    given = (
        f"data.source={data}", "importance.criterion=random", "plan.macs=0.7",
        "prune.recover=none", "finetune.epochs=0", "finetune.recalibrate=0", *QUIET,
        *(shorter if network in grid.dense else ()),
    )  # fmt: skip
    folder = runs / "dense" / network
    run(load_recipe(NETWORKS[network], given), folder, command="benchmarks/leaderboard.py")
    return folder / "trained"


def part_of(data: Path, runs: Path, grid: Grid) -> Path:
    """A folder of links to the first images of every class, or `data` itself for a whole grid."""
    if grid.train is None or grid.val is None:
        return data
    small = runs / f"data-{grid.train}-{grid.val}-{grid.skip}"
    if small.is_dir():
        return small.resolve()
    making = runs / f"{small.name}.making"
    for part, skip, count in (("train", 0, grid.train), ("val", grid.skip, grid.val)):
        classes = sorted(p for p in (data / part).iterdir() if p.is_dir())
        for folder in classes:
            (making / part / folder.name).mkdir(parents=True, exist_ok=True)
            first, last = skip // len(classes), (skip + count) // len(classes)
            for image in sorted(folder.iterdir())[first:last]:
                link = making / part / folder.name / image.name
                if not link.is_symlink():
                    link.symlink_to(image.resolve())
    os.replace(making, small)
    return small.resolve()


def main() -> None:
    """Run what is left of a grid; write its numbers when all of it is done."""
    arguments = parsed()
    grid = chosen(arguments)
    given = {n: Path(f) for n, f in (text.split("=", 1) for text in arguments.checkpoint)}
    data, runs = part_of(arguments.data, arguments.runs, grid), arguments.runs
    todo, end = list(cells(grid)), time.monotonic() + 60 * arguments.minutes
    if arguments.write:
        for cell in todo:
            text = dump_recipe(cell.recipe(data, given.get(cell.network)))
            write_text(arguments.write / f"{cell.name}.yaml", text)
        return
    done = (
        [c for c in todo if (home(c, runs) / "rows.json").is_file()] if arguments.so_far else todo
    )
    rows = []
    for number, cell in enumerate(done):
        if time.monotonic() > end:
            raise SystemExit(f"{number} of {len(todo)} cells are done; run the same command again")
        there = given.get(cell.network) or kept(cell.network)
        where = there or trained(cell.network, grid, runs, arguments.data)
        rows += carry_out(cell, runs, data, where)
    if len(grid.calibration) > 1:
        rows = with_stability(rows, scores_of(done, runs))
    path = RESULTS / f"leaderboard-{grid.name}.csv"
    made, what = result(grid, rows), command(grid)
    result_rows.write(path, result_rows.flat(made, data=arguments.data.name, command=what))
    print(f"{len(done)} of {len(todo)} cells are in {RESULTS.name}/{path.name}")


def command(grid: Grid) -> str:
    """What carries the grid out, without the places of one machine."""
    which = {"cpu": "", "full": " --full"}.get(grid.name, f" --study {grid.name}")
    return f"python benchmarks/leaderboard.py{which} --data FOLDER --checkpoint NETWORK=FILE"


def home(cell: Cell, runs: Path) -> Path:
    """The run folder of a cell."""
    return runs / cell.grid.name / cell.name


def chosen(arguments: argparse.Namespace) -> Grid:
    """The grid that the command line means."""
    grid = GRIDS["full" if arguments.full else arguments.study or "cpu"]
    return replace(
        grid,
        networks=tuple(arguments.networks or grid.networks),
        methods=tuple(arguments.methods or grid.methods),
        seeds=tuple(arguments.seeds or grid.seeds),
    )


def result(grid: Grid, rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The rows of a grid, and where they come from; its settings are in grids.py."""
    import torch

    cuda = torch.cuda.is_available()
    hardware = torch.cuda.get_device_name() if cuda else f"{platform.machine()} CPU"
    return {
        "grid": grid.name,
        "date": date.today().isoformat(),
        "hardware": f"{hardware}, {torch.get_num_threads()} threads",
        "torch": torch.__version__,
        "train_images": grid.train,
        "rows": list(rows),
    }


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--full", action="store_true")
    which.add_argument("--study", choices=[name for name in GRIDS if name not in ("cpu", "full")])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--checkpoint", nargs="*", default=[], metavar="NETWORK=FILE")
    parser.add_argument("--runs", type=Path, default=Path("runs/leaderboard"))
    parser.add_argument("--networks", nargs="*", choices=list(NETWORKS))
    parser.add_argument("--methods", nargs="*", choices=list(METHODS))
    parser.add_argument("--seeds", nargs="*", type=int)
    parser.add_argument("--minutes", type=float, default=1e9, help="start no cell after that long")
    parser.add_argument("--so-far", action="store_true", help="keep what is done, run nothing")
    parser.add_argument("--write", type=Path, help="write the recipes here and run nothing")
    return parser.parse_args()


if __name__ == "__main__":
    main()
