"""`seprune verify`: hashes and journal of a folder."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from seprune.cli import console, options
from seprune.errors import InputError


def verify(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="A run or a saved network.")],
    json: options.Json = False,
) -> None:
    """Check the hashes and the journal of a folder.

    Example:
      seprune verify runs/quickstart
    """
    from seprune.pipeline.run_folder import verify as check

    problems = check(folder)
    for problem in problems:
        console.tell(problem)
    if problems:
        raise InputError(
            f"{folder}: {len(problems)} problem{'s' if len(problems) > 1 else ''}",
            why=f"files are not what seprune wrote: {'; '.join(problems[:3])}",
            fix="run the stage that wrote them again, or copy the folder again",
            code="damaged",
        )
    if json:
        console.give({"folder": str(folder), "problems": problems})
    console.tell(f"{folder}: as it was written")
