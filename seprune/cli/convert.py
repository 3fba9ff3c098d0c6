"""`seprune convert`: the weights of a pickled model, as safetensors."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from seprune.cli import console, options
from seprune.errors import UsageError
from seprune.runtime.text import shell_word


def convert(
    file: Annotated[Path, typer.Argument(help="A pickled model whose author you trust.")],
    allow_pickle: Annotated[
        bool, typer.Option("--allow-pickle", help="Yes, run the code in this file.")
    ] = False,
    out: Annotated[Path | None, typer.Option("--out", metavar="F")] = None,
    weights: options.Weights = "auto",
    json: options.Json = False,
) -> None:
    """Take the weights out of a pickled model.

    In a process of its own, into safetensors.

    Example:
      seprune convert model.pkl --allow-pickle --out weights.safetensors
    """
    from seprune.checkpoint import convert as carry_out
    from seprune.checkpoint import load_weights

    choice = options.weights_of(weights)
    if allow_pickle:
        target = out or _beside(file)
        found = carry_out(file, target, weights=choice, fresh=out is None)
        where = f"tensors: {target}"
    else:
        target = file
        found, where = load_weights(file, weights=choice), "tensors can be read as they are"
    console.tell(f"{file}: {len(found.tensors)} {where}")
    if json:
        console.give({"file": str(target), "tensors": len(found.tensors), "sha256": found.sha256})


def _beside(file: Path) -> Path:
    """FILE.safetensors; a file that is there already may be somebody's."""
    from seprune.runtime.files import taken

    target = file.with_suffix(".safetensors")
    if taken(target):
        raise UsageError(
            f"{target}: exists already",
            why="nothing is overwritten unasked",
            fix=f"seprune convert --allow-pickle {shell_word(file)} --out FILE",
        )
    return target
