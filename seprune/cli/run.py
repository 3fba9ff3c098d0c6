"""`seprune run`: everything that a recipe says, in a run folder."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path

from seprune.cli import console, options


def run(
    recipe: options.RecipeName,
    overrides: options.Overrides = None,
    out: options.Out = Path("runs/seprune"),
    allow_code: options.AllowCode = False,
    json: options.Json = False,
) -> None:
    """Everything, from training to the report.

    Train if need be, collect, rank, prune, fine-tune, report. The same command goes on where
    a stopped run ended.

    Example:
      seprune run quickstart --out runs/quickstart plan.macs=0.4
    """
    from seprune.recipe import load_recipe

    loaded = load_recipe(recipe, overrides or [], allow_code=allow_code)
    from seprune.cli import open_inputs
    from seprune.models.preprocessing import Preprocessing
    from seprune.pipeline.run import run as carry_out
    from seprune.report import measurement, terminal

    runtime = open_inputs.runtime(loaded, out)
    command = shlex.join(["seprune", *sys.argv[1:]])
    report = carry_out(
        loaded,
        out,
        runtime=runtime,
        loader=open_inputs.loader(allow_code, loaded.model),
        command=command,
    )
    console.stderr().print(terminal.results(report))
    for note in (
        *report.model.get("notes", ()),
        *report.data.get("notes", ()),
        *report.warnings,
    ):
        console.tell(f"note: {note}")
    if known := report.data.get("preprocessing"):
        console.tell(f"preprocessing: {Preprocessing.of(known)}")
    console.tell(f"report: {out / ('report.html' if loaded.report.html else 'report.json')}")
    if json:
        console.give(measurement.to_json(report))
