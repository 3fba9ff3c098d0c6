"""The words that commands share, each written once, and the recipe that they amount to."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import MISSING, dataclass, fields, is_dataclass
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_type_hints

import typer

from seprune.cli import console
from seprune.errors import InputError, UsageError

if TYPE_CHECKING:
    from seprune.checkpoint.weights import Choice
    from seprune.recipe import CommandRecipe

RecipeName = Annotated[
    str, typer.Argument(metavar="RECIPE", help="A YAML file, or the name of a shipped recipe.")
]
Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="As in plan.macs=0.5.")
]
DataSource = Annotated[
    str,
    typer.Option(
        "--data", metavar="D", help="digits, a folder, torchvision/X:DIR, hf:NAME, wds:SHARDS."
    ),
]
Calibration = Annotated[
    str | None, typer.Option("--data", metavar="D", help="Calibration images (training part).")
]
Statistics = Annotated[Path | None, typer.Option(metavar="F", help="What `seprune collect` wrote.")]
Criterion = Annotated[str, typer.Option("--importance", help="A criterion of docs/importance.md.")]
Probe = Annotated[
    int | None,
    typer.Option(
        "--probe", metavar="EPOCHS", min=1, help="Train SE gates for channels without one first."
    ),
]
Json = Annotated[bool, typer.Option("--json", help="One JSON document on stdout.")]
AllowCode = Annotated[
    bool, typer.Option("--allow-code", help="Let MODEL name a Python file to run.")
]
Weights = Annotated[str, typer.Option(help="Which weights of a checkpoint: auto, raw or ema.")]
Out = Annotated[Path, typer.Option("--out", metavar="DIR", help="The folder to write.")]


@dataclass(frozen=True)
class NetworkOptions:
    """The options that say which network is meant."""

    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL",
            help="torchvision/NAME, timm/NAME, smp/NAME, seprune/NAME, hf-hub:ORG/NAME, a folder "
            "that seprune wrote, or FILE.py:FUNCTION with --allow-code.",
        ),
    ]
    checkpoint: Annotated[
        str | None, typer.Option("--checkpoint", metavar="F", help="Trained weights, or a folder.")
    ] = None
    pretrained: Annotated[
        bool, typer.Option("--pretrained", help="Published weights, as timm/NAME.TAG names them.")
    ] = False
    weights: Weights = "auto"
    classes: Annotated[
        int | None, typer.Option(help="Number of classes, if it cannot be inferred.")
    ] = None
    input: Annotated[
        str | None, typer.Option("--input", metavar="CxHxW", help="As in 3x224x224.")
    ] = None
    task: Annotated[
        str | None,
        typer.Option("--task", help="What the network is for, if the data do not say."),
    ] = None
    allow_code: AllowCode = False
    allow_pickle: Annotated[
        bool, typer.Option("--allow-pickle", help="Let weights from a Hub be a pickle.")
    ] = False


@dataclass(frozen=True)
class WorkOptions:
    """The options that say how a command goes about its work."""

    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1.")] = "auto"
    seed: Annotated[int, typer.Option(help="Of everything random.")] = 0
    set: Annotated[
        list[str] | None,
        typer.Option(
            "--set", metavar="KEY=VALUE", help="Any key of a recipe, such as data.mean=..."
        ),
    ] = None
    json: Json = False


def spread(command: Callable[..., None]) -> Callable[..., None]:
    """The command as typer reads it: a parameter that is a set of options becomes its options.

    The lines from `Example` on are shown as they stand.
    """
    hints = get_type_hints(command, include_extras=True)
    sets: dict[str, Any] = {name: hint for name, hint in hints.items() if is_dataclass(hint)}
    spelt: list[inspect.Parameter] = []
    for name, parameter in inspect.signature(command).parameters.items():
        if name in sets:
            spelt += _options_of(sets[name])
        else:
            kind = inspect.Parameter.KEYWORD_ONLY
            spelt.append(parameter.replace(annotation=hints[name], kind=kind))

    @wraps(command)
    def flat(**given: Any) -> None:
        for name, kind in sets.items():
            given[name] = kind(**{f.name: given.pop(f.name) for f in fields(kind)})
        with console.results_apart():
            command(**given)

    del flat.__wrapped__  # typer would look through it, at the sets
    flat.__signature__ = inspect.Signature(spelt)  # type: ignore[attr-defined]
    flat.__annotations__ = {p.name: p.annotation for p in spelt}
    flat.__doc__ = inspect.cleandoc(command.__doc__ or "").replace("\nExample", "\n\b\nExample")
    return flat


def _options_of(kind: Any) -> list[inspect.Parameter]:
    hints = get_type_hints(kind, include_extras=True)
    return [
        inspect.Parameter(
            f.name,
            inspect.Parameter.KEYWORD_ONLY,
            default=inspect.Parameter.empty if f.default is MISSING else f.default,
            annotation=hints[f.name],
        )
        for f in fields(kind)
    ]


def shape_of(text: str | None) -> list[int] | None:
    """3x224x224 as [3, 224, 224]."""
    if text is None:
        return None
    parts = text.lower().split("x")
    if len(parts) != 3 or not all(p.isdecimal() and int(p) > 0 for p in parts):
        raise UsageError(
            f"--input {text}: not channels x height x width",
            why="it takes three numbers with an x between them",
            fix="--input 3x224x224",
        )
    return [int(p) for p in parts]


def weights_of(text: str) -> Choice:
    """auto, raw or ema."""
    for choice in ("auto", "raw", "ema"):
        if text == choice:
            return choice
    raise UsageError(
        f"--weights {text}: no such choice", why="there are auto, raw and ema", fix="--weights auto"
    )


def number_or_auto(text: str) -> float | str:
    """A number, or the text as it is; the recipe says what else there may be."""
    try:
        return float(text)
    except ValueError:
        return text


def budget_of(name: str, text: str) -> float | str:
    """A fraction as a number, an amount such as 20M as it is.

    Raises:
        InputError: the whole network or more, which nothing has to be cut for.
    """
    try:
        kept = float(text)
    except ValueError:
        return text
    if kept >= 1:
        raise InputError(
            f"budget {name}={text} is met without a cut",
            why="it says which fraction is kept, and 1 is the whole network",
            fix=f"--{name} 0.5 keeps half; an amount is written 20M or 1.5G",
            code="budget",
        )
    return kept


def recipe(
    network: NetworkOptions,
    work: WorkOptions | None = None,
    data: str | None = None,
    **sections: Any,
) -> CommandRecipe:
    """The recipe that a command's options amount to, with further sections of it."""
    from seprune.recipe import command_recipe

    model = {
        "name": network.model,
        "checkpoint": network.checkpoint,
        "pretrained": network.pretrained or None,
        "weights": network.weights,
        "classes": network.classes,
        "input": shape_of(network.input),
    }
    values: dict[str, Any] = {
        "name": network.model,
        "model": {k: v for k, v in model.items() if v is not None},
        "task": network.task,
        **({} if data is None else {"data": {"source": data}}),
        **sections,
    }
    if work is None:
        return command_recipe(values)
    return command_recipe({**values, "device": work.device, "seed": work.seed}, work.set or ())
