"""`seprune compare`: several runs side by side."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from seprune.cli import console, options
from seprune.cli.report import require_finished


def compare(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN...")],
    html: Annotated[Path | None, typer.Option(metavar="F", help="Table and figure.")] = None,
    csv: Annotated[Path | None, typer.Option(metavar="F", help="One row a network.")] = None,
    json: options.Json = False,
) -> None:
    """Several runs side by side, or networks.

    Accuracy against MACs, the Pareto front marked. Runs of one recipe that differ only in
    their seed become one row, mean ± standard deviation.

    Examples:
      seprune compare runs/* --html compare.html
      seprune compare small tuned
    """
    from seprune.report import compare as comparing
    from seprune.report import measurement, ways

    for path in runs:
        require_finished(path)
    found = [measurement.read(r) for r in runs]
    made = comparing.compare(found, ways.run_names(found, runs))
    if html is not None:
        from seprune.report.html import write_comparison

        write_comparison(made, html)
    if csv is not None:
        comparing.write_csv(made, csv)
    if json:
        console.give(made.to_json())
    elif html is None and csv is None:
        from seprune.cli.tables import comparison

        console.stdout().print(comparison(made.table()))
        for warning in made.warnings:
            console.tell(f"warning: {warning}")
