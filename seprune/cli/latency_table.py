"""`seprune latency-table`: measured times of operators, built, shown, exported."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from seprune.cli import console, options
from seprune.errors import InputError

if TYPE_CHECKING:
    from seprune.measure.latency_table import LatencyTable

app = typer.Typer(
    help="Times of operators, for latency budgets.\n\n\b\nExample:\n  seprune latency-table show",
    no_args_is_help=True,
    rich_markup_mode=None,
)
Runtime = Annotated[str, typer.Option(help="eager, compiled, onnx or openvino.")]
Batch = Annotated[int, typer.Option(min=1, help="Images at once.")]


@app.command("build")
@options.spread
def latency_table_build(
    network: options.NetworkOptions,
    runtime: Runtime = "eager",
    batch: Batch = 1,
    table: Annotated[
        Path | None, typer.Option(metavar="F", help="Start from this exported table.")
    ] = None,
    *,
    work: options.WorkOptions,
) -> None:
    """Measure what the table of this machine lacks for a network.

    Tables lie in the user's cache folder. A build that was stopped goes on.

    Example:
      seprune latency-table build torchvision/mobilenet_v3_large \\
        --runtime onnx
    """
    recipe = options.recipe(network, work, plan={"runtime": runtime, "batch": batch})
    from seprune.cli import open_inputs
    from seprune.measure.latency_model import adopt, latency_model, table_path
    from seprune.measure.latency_table import TableKey

    permission = open_inputs.permission(network)
    context = open_inputs.context(recipe, loader=permission, quiet=True)
    opened, structure = context.network, context.structure
    key = TableKey.here(runtime, batch=batch, device=str(context.runtime.device))
    if table is not None:
        adopt(table, key, _note)
    made = latency_model(
        opened.model, structure, opened.example(1), key=key, track=console.track, note=_note
    )
    ms = made.at(structure.full_widths())
    facts = {**_facts(table_path(key), made.table), "network_ms": ms}
    if work.json:
        console.give(facts)
        return
    console.write(f"{len(made.table.times):,} operators in {facts['file']}")
    console.write(f"sum over {network.model}: {ms:.3g} ms a batch of {batch}, {runtime}")


@app.command("show")
@options.spread
def latency_table_show(
    file: Annotated[
        Path | None, typer.Argument(metavar="[FILE]", help="One table; else all of the cache.")
    ] = None,
    json: options.Json = False,
) -> None:
    """List the tables of this machine's cache, or the times of one table.

    Examples:
      seprune latency-table show
      seprune latency-table show table.json
    """
    from seprune.measure.latency_table import LatencyTable

    if file is not None:
        table = LatencyTable.load(file)
        if json:
            console.give({**_facts(file, table), "times": table.times})
            return
        console.write(_line(file, table))
        slowest = sorted(table.times.items(), key=lambda pair: -pair[1])
        console.write("\n".join(f"{ms:10.4f} ms  {name}" for name, ms in slowest))
        return
    found = list(_tables())
    if json:
        console.give([_facts(path, table) for path, table in found])
    elif found:
        console.write("\n".join(_line(path, table) for path, table in found))
    else:
        console.tell("no table yet: seprune latency-table build MODEL --runtime onnx")


@app.command("export")
@options.spread
def latency_table_export(
    out: Annotated[Path, typer.Argument(metavar="FILE", help="Where to: JSON.")],
    runtime: Runtime = "eager",
    batch: Batch = 1,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1.")] = "auto",
) -> None:
    """Write this machine's table to a file, for machines of the same kind.

    There: seprune latency-table build MODEL --table FILE

    Example:
      seprune latency-table export table.json --runtime onnx
    """
    from seprune.measure.latency_model import table_path
    from seprune.measure.latency_table import LatencyTable, TableKey
    from seprune.runtime.distributed import resolve_device

    key = TableKey.here(runtime, batch=batch, device=str(resolve_device(device)))
    path = table_path(key)
    if not path.is_file():
        raise InputError(
            f"there is no latency table of {runtime} at batch {batch}",
            why=f"{path} does not exist",
            fix=f"seprune latency-table build MODEL --runtime {runtime} --batch {batch}",
        )
    table = LatencyTable.load(path)
    table.save(out)
    console.tell(f"{len(table.times):,} operators: {out}")


def _tables() -> Iterator[tuple[Path, LatencyTable]]:
    """Those of the cache folder."""
    from seprune.measure.latency_table import LatencyTable
    from seprune.runtime.paths import cache_folder

    for path in sorted(cache_folder("latency").glob("*.json")):
        yield path, LatencyTable.load(path)


def _facts(path: Path, table: LatencyTable) -> dict[str, Any]:
    kinds = Counter(name.split(" ")[0] for name in table.times)
    return {"file": str(path), **asdict(table.key), "operators": dict(sorted(kinds.items()))}


def _line(path: Path, table: LatencyTable) -> str:
    key = table.key
    threads = f", {key.threads} threads" if key.threads else ""
    return (
        f"{key.runtime} {key.version}, {key.device}{threads}, batch {key.batch}, {key.dtype}: "
        f"{len(table.times):,} operators\n  {path}"
    )


def _note(text: str) -> None:
    console.tell(f"note: {text}")
