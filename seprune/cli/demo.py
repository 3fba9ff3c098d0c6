"""`seprune demo`: the quickstart, and its report in a browser."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from seprune.cli import options
from seprune.cli.run import run


def demo(
    out: options.Out = Path("runs/demo"),
    show: Annotated[bool, typer.Option("--open", help="Open the report in a browser.")] = False,
    json: options.Json = False,
) -> None:
    """Train, prune and report a small network, offline.

    The shipped recipe quickstart, on the digits that ship with seprune.

    Example:
      seprune demo --open
    """
    run("quickstart", out=out, json=json)
    if show:
        typer.launch(str(out / "report.html"))
