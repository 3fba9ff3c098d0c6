"""`seprune recipes`: the shipped recipes, listed, shown, copied, checked."""

from __future__ import annotations

import textwrap
from pathlib import Path
from typing import Annotated

import typer

from seprune.cli import console, options
from seprune.errors import UsageError

app = typer.Typer(
    help="The shipped recipes.\n\n\b\nExample:\n  seprune recipes ls",
    no_args_is_help=True,
    rich_markup_mode=None,
)

Name = Annotated[str, typer.Argument(metavar="NAME", help="As `seprune recipes ls` has it.")]
Target = Annotated[Path, typer.Argument(metavar="FILE", help="Where to; it must not exist.")]


@app.command("ls")
@options.spread
def recipes_ls(json: options.Json = False) -> None:
    """The shipped recipes, each with its first line.

    Example:
      seprune recipes ls
    """
    from seprune.recipe import recipe_folder

    found = {}
    for path in sorted(recipe_folder().glob("*.yaml")):
        lines = [
            x.lstrip("# ")
            for x in path.read_text(encoding="utf-8").splitlines()
            if x.startswith("#")
        ]
        found[path.stem] = next((x for x in lines if x and "yaml-language-server" not in x), "")
    if json:
        console.give(found)
    else:
        wide = 2 + max(map(len, found))
        for name, line in found.items():
            head, *more = textwrap.wrap(line, max(20, console.stdout().width - wide)) or [""]
            console.write("\n".join([f"{name:{wide}s}{head}", *(" " * wide + t for t in more)]))


@app.command("show")
@options.spread
def recipes_show(name: Name) -> None:
    """Print a shipped recipe.

    Example:
      seprune recipes show quickstart
    """
    console.write(_shipped(name).read_text(encoding="utf-8").rstrip("\n"))


@app.command("cp")
@options.spread
def recipes_cp(name: Name, target: Target) -> None:
    """Copy a shipped recipe to a file of your own.

    Example:
      seprune recipes cp quickstart mine.yaml
    """
    from seprune.runtime.files import taken, write_text

    if taken(target):
        raise UsageError(f"{target}: exists already", why="nothing is overwritten",
                         fix="choose another name")  # fmt: skip
    write_text(target, _shipped(name).read_text(encoding="utf-8"), fresh=True)


@app.command("validate")
@options.spread
def recipes_validate(
    recipe: options.RecipeName,
    overrides: options.Overrides = None,
    json: options.Json = False,
) -> None:
    """Check a recipe; all mistakes at once.

    Example:
      seprune recipes validate mine.yaml plan.macs=0.4
    """
    from seprune.recipe import load_recipe

    loaded = load_recipe(recipe, overrides or [])
    if json:
        console.give(loaded.model_dump(mode="json"))
    else:
        console.tell(f"{recipe}: a valid recipe")


@app.command("schema")
@options.spread
def recipes_schema() -> None:
    """The JSON Schema of recipes, for editors.

    Example:
      seprune recipes schema > schema.json
    """
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
