"""`seprune report`: the report of a run, in the terminal or as a file."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from seprune.cli import console, options
from seprune.errors import InputError
from seprune.pipeline.journal import JOURNAL
from seprune.runtime.checksums import REPORT
from seprune.runtime.text import shell_word


def report(
    run: Annotated[
        Path, typer.Argument(metavar="RUN", help="The folder of a run or of a network.")
    ],
    html: Annotated[Path | None, typer.Option(metavar="F", help="Write the page here.")] = None,
    csv: Annotated[Path | None, typer.Option(metavar="F", help="One row a channel.")] = None,
    group: Annotated[str | None, typer.Option(help="The channels of one group.")] = None,
    gate: Annotated[str | None, typer.Option(help="The channels of one gate.")] = None,
    compare: Annotated[
        list[Path] | None,
        typer.Option(metavar="RUN", help="Another run beside it; may be given several times."),
    ] = None,
    json: options.Json = False,
) -> None:
    """The report of a run, in the terminal or as a file.

    Also of a network that prune or finetune saved, with the files that it was exported to.

    Examples:
      seprune report small --html small.html
      seprune report runs/quickstart --group layer1.0.conv1
      seprune report runs/quickstart --csv channels.csv
      seprune report runs/quickstart --compare runs/other --html both.html
    """
    from seprune.report import measurement, ways

    for path in (run, *(compare or ())):
        require_finished(path)
    paths = [run, *(compare or ())]
    reports = [measurement.read(path) for path in paths]
    names = ways.run_names(reports, paths)
    found, others = (
        reports[0],
        [replace(r, name=n) for r, n in zip(reports[1:], names[1:], strict=True)],
    )
    if html is not None:
        from seprune.report.html import write_html

        write_html(found, html, others)
    if csv is not None:
        from seprune.report.table import write_csv

        write_csv(found, csv)
    if json:
        console.give(measurement.to_json(found))
    elif html is None and csv is None:
        from seprune.report.terminal import show

        show(found, console.stdout(), group=group, gate=gate)
        if others:
            from seprune.cli.tables import comparison
            from seprune.report import compare as comparing

            made = comparing.compare(reports, names)
            console.stdout().print(comparison(made.table()))
            for warning in made.warnings:
                console.tell(f"warning: {warning}")


def require_finished(run: Path) -> None:
    """A run without a report is refused, with the command that finishes it."""
    if not run.exists():
        raise InputError(
            f"{run}: no such run",
            why="a report is read from a run folder or its report.json",
            fix="give the folder that was --out of `seprune run`",
        )
    if run.is_dir() and not (run / REPORT).is_file() and (run / "config.json").is_file():
        raise InputError(
            f"{run}: a network without a report",
            why="prune and finetune write report.json beside a network, seprune.save does not",
            fix=f"seprune evaluate {shell_word(run)} --data FOLDER",
            code="unfinished",
        )
    if run.is_dir() and not (run / REPORT).is_file() and (run / JOURNAL).is_file():
        raise InputError(
            f"{run}: the run is not finished",
            why="it has no report.json yet",
            fix=f"go on with: seprune run {shell_word(run / 'recipe.yaml')} "
            f"--out {shell_word(run)}",
            code="unfinished",
        )
