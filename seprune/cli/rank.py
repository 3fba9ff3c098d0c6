"""`seprune rank`: a score for every unit of every dependency group."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from seprune.cli import console, options


def rank(
    network: options.NetworkOptions,
    statistics: options.Statistics = None,
    importance: options.Criterion = "gate_logit",
    out: Annotated[Path | None, typer.Option("--out", metavar="FILE", help="A CSV.")] = None,
    *,
    work: options.WorkOptions,
) -> None:
    """Score every unit of every dependency group. Higher means keep.

    Example:
      seprune rank seprune/se_resnet20 --checkpoint F.pth \\
        --statistics stats.safetensors --out importance.csv
    """
    recipe = options.recipe(network, work, importance={"criterion": importance})
    from seprune.cli import open_inputs
    from seprune.pipeline import stages
    from seprune.pipeline.settings import CutSettings

    context = open_inputs.context(recipe, loader=open_inputs.permission(network), glance=[])
    known = open_inputs.statistics(statistics, context.network)
    made = stages.rank(context, CutSettings.of(recipe), known)
    if out is not None:
        from seprune.runtime.files import write_text
        from seprune.runtime.text import csv_text

        rows = [(name, unit, repr(float(s))) for name, scores in made.scores.items()
                for unit, s in enumerate(scores)]  # fmt: skip
        write_text(out, csv_text([("group", "unit", "score"), *rows]))
    if work.json:
        scores = {name: s.tolist() for name, s in made.scores.items()}
        console.give({"criterion": importance, "scores": scores})
    else:
        from seprune.cli.tables import ranking

        console.stderr().print(ranking(made))
