"""The words that commands share, and the recipe that a stage command's options amount to."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from seprune.errors import UsageError

if TYPE_CHECKING:
    from seprune.recipe import Recipe

Model = Annotated[
    str,
    typer.Argument(
        metavar="MODEL",
        help="torchvision/NAME, timm/NAME, seprune/NAME, a folder that seprune wrote, or "
        "FILE.py:FUNCTION with --allow-code.",
    ),
]
Checkpoint = Annotated[
    str | None, typer.Option("--checkpoint", metavar="F", help="Trained weights, or a folder.")
]
Weights = Annotated[str, typer.Option(help="Which weights of a checkpoint: auto, raw or ema.")]
DataSource = Annotated[
    str,
    typer.Option(
        "--data", metavar="D", help="digits, a folder with train/ and val/, torchvision/CIFAR10:DIR"
    ),
]
Classes = Annotated[int | None, typer.Option(help="Number of classes, if it cannot be inferred.")]
Input = Annotated[str | None, typer.Option("--input", metavar="CxHxW", help="As in 3x224x224.")]
Criterion = Annotated[str, typer.Option("--importance", help="A criterion of docs/importance.md.")]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1.")]
Seed = Annotated[int, typer.Option(help="Of everything random.")]
Json = Annotated[bool, typer.Option("--json", help="One JSON document on stdout.")]
AllowCode = Annotated[
    bool, typer.Option("--allow-code", help="Let MODEL name a Python file to run.")
]
Set = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Any key of a recipe, such as data.mean=..."),
]
Out = Annotated[Path, typer.Option("--out", metavar="DIR", help="The folder to write.")]


def shape_of(text: str | None) -> list[int] | None:
    """3x224x224 as [3, 224, 224]."""
    if text is None:
        return None
    parts = text.lower().split("x")
    if len(parts) != 3 or not all(p.isdigit() and int(p) > 0 for p in parts):
        raise UsageError(
            f"--input {text}: not channels x height x width",
            why="it takes three numbers with an x between them",
            fix="--input 3x224x224",
        )
    return [int(p) for p in parts]


def budget_of(text: str) -> float | str:
    """A fraction as a number, an amount such as 20M as it is."""
    try:
        return float(text)
    except ValueError:
        return text


def recipe_for(
    model: dict[str, Any], data: str | None, more: dict[str, Any], overrides: list[str] | None
) -> Recipe:
    """The recipe that a stage command's options amount to.

    Args:
        model: the model section, `input` as typed.
        more: other sections, and `seed`, `device`.
        overrides: `key=value` for whatever has no option of its own.
    """
    from seprune.recipe import recipe_of

    section = {k: v for k, v in model.items() if v is not None}
    if "input" in section:
        section["input"] = shape_of(section["input"])
    values = {"name": str(model["name"]), "model": section, "data": {"source": data or "digits"}}
    values |= more
    return recipe_of(values, overrides or ())
