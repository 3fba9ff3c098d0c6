"""`seprune recipes`: the shipped recipes, listed, shown, copied, checked."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from seprune.cli import console, options
from seprune.errors import UsageError

app = typer.Typer(help="The shipped recipes.", no_args_is_help=True, rich_markup_mode=None)


@app.command("ls")
def recipes_ls(json: options.Json = False) -> None:
    """The shipped recipes, each with its first line."""
    from seprune.recipe import recipe_folder

    found = {}
    for path in sorted(recipe_folder().glob("*.yaml")):
        lines = [x.lstrip("# ") for x in path.read_text().splitlines() if x.startswith("#")]
        found[path.stem] = next((x for x in lines if x and "yaml-language-server" not in x), "")
    if json:
        console.give(found)
    else:
        for name, line in found.items():
            print(f"{name:28s} {line}")


@app.command("show")
def recipes_show(name: str) -> None:
    """Print a shipped recipe."""
    print(_shipped(name).read_text(), end="")


@app.command("cp")
def recipes_cp(name: str, target: Path) -> None:
    """Copy a shipped recipe to a file of your own."""
    from seprune.files import write_text

    if target.exists():
        raise UsageError(f"{target}: exists already", why="nothing is overwritten",
                         fix="choose another name")  # fmt: skip
    write_text(target, _shipped(name).read_text())


@app.command("validate")
def recipes_validate(path: str, overrides: Annotated[list[str] | None, typer.Argument()] = None,
                     json: options.Json = False) -> None:  # fmt: skip
    """Check a recipe; all mistakes at once."""
    from seprune.recipe import load_recipe

    loaded = load_recipe(path, overrides or [])
    if json:
        console.give(loaded.model_dump(mode="json"))
    else:
        console.tell(f"{path}: a valid recipe")


@app.command("schema")
def recipes_schema() -> None:
    """The JSON Schema of recipes, for editors."""
    from seprune.recipe import recipe_schema

    console.give(recipe_schema())


def _shipped(name: str) -> Path:
    from seprune.recipe import recipe_folder

    path = recipe_folder() / f"{name.removesuffix('.yaml')}.yaml"
    if not path.is_file():
        known = ", ".join(p.stem for p in sorted(recipe_folder().glob("*.yaml")))
        raise UsageError(f"no shipped recipe is called '{name}'", why=f"there are: {known}",
                         fix="seprune recipes ls", code="recipe")  # fmt: skip
    return path
