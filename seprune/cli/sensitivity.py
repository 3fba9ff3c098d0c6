"""`seprune sensitivity`: what a network loses without a part of one dependency group."""

from __future__ import annotations

from typing import Annotated

import typer

from seprune.cli import console, options
from seprune.errors import UsageError


def sensitivity(
    network: options.NetworkOptions,
    data: options.DataSource,
    statistics: options.Statistics = None,
    importance: options.Criterion = "gate_logit",
    images: Annotated[int, typer.Option(min=1, help="Of the validation split.")] = 512,
    shares: Annotated[
        str, typer.Option(help="Of a group that are masked, the lowest-scored first.")
    ] = "0.1,0.3,0.5",
    *,
    work: options.WorkOptions,
) -> None:
    """What is lost without a part of each dependency group.

    Masks one group at a time, and measures top-1 and loss. Validation images
    are set aside from the training ones (data.validation).

    Example:
      seprune sensitivity seprune/se_resnet20 --checkpoint F.pth --data D
    """
    section = {"images": images, "shares": shares_of(shares)}
    recipe = options.recipe(
        network, work, data, importance={"criterion": importance}, sensitivity=section
    )
    from seprune.cli import open_inputs, tables
    from seprune.pipeline import stages
    from seprune.pipeline.collection import collect
    from seprune.pipeline.settings import CutSettings

    context = open_inputs.context(recipe, loader=open_inputs.permission(network), glance=[])
    settings = CutSettings.of(recipe)
    known = open_inputs.statistics(statistics, context.network)
    if known is None and settings.needs_statistics:
        known = collect(context, settings)
    ranking = stages.rank(context, settings, known)
    measured = stages.sensitivity(context, settings, ranking).plain()
    if work.json:
        console.give(measured)
    else:
        console.stderr().print(tables.sensitivity(measured))


def shares_of(text: str) -> list[float]:
    """0.1,0.3 as [0.1, 0.3]."""
    try:
        found = [float(part) for part in text.split(",")]
    except ValueError:
        found = []
    if not found or not all(0 < share < 1 for share in found):
        raise UsageError(
            f"--shares {text}: not shares of a group",
            why="it takes numbers between 0 and 1 with commas between them",
            fix="--shares 0.1,0.3,0.5",
        )
    return found
