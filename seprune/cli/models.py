"""`seprune models`: the networks that can be built by name."""

from __future__ import annotations

from typing import Annotated

import typer

from seprune.cli import console, options
from seprune.errors import InputError


def models(
    pattern: Annotated[str, typer.Argument(help="A glob, or a part of the name.")] = "*",
    json: options.Json = False,
) -> None:
    """Networks that can be built here. Those with channel gates come first.

    Example:
      seprune models 'timm/seres*'
    """
    from seprune.models import names

    found = names(pattern)
    if not found:
        raise InputError(f"no network is called like '{pattern}'", why="nothing here matches it",
                         fix="seprune models", code="no-model")  # fmt: skip
    if json:
        console.give(found)
    else:
        console.write("\n".join(found))
