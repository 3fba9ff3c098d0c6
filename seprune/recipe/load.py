"""Reading a recipe: file, overrides, all mistakes at once; writing it out again."""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

from pydantic import ValidationError

from seprune.errors import UsageError
from seprune.recipe.sections import CommandRecipe, Recipe, Section
from seprune.recipe.yamlfile import (
    COMMAND_LINE,
    Document,
    Key,
    Place,
    Problem,
    dotted,
    dump_yaml,
    read_yaml,
    short,
)

_Kind = TypeVar("_Kind", bound=CommandRecipe)


def recipe_folder() -> Path:
    """Where the shipped recipes are: in the package, or beside it in a checkout."""
    packed = Path(__file__).parents[1] / "recipes"
    return packed if packed.is_dir() else Path(__file__).parents[2] / "recipes"


def recipe_schema() -> dict[str, Any]:
    """The JSON Schema of a recipe, for editors."""
    schema = Recipe.model_json_schema()
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema}


def dump_recipe(recipe: CommandRecipe) -> str:
    """The recipe with every default filled in, as YAML: one line per key."""
    return dump_yaml(recipe.model_dump(mode="json"))


def load_recipe(
    path: str | Path, overrides: Sequence[str] = (), *, allow_code: bool = False
) -> Recipe:
    """Read a recipe file, or a shipped recipe by its name, and apply `key=value` overrides.

    Args:
        path: a file, or a name such as `quickstart`.
        overrides: `plan.macs=0.5` and the like; values are YAML 1.2.
        allow_code: let an override (never the file) name the network as `FILE.py:FUNCTION`.

    Raises:
        UsageError: everything that is wrong, one line each: `file:line:col key: message (got ...)`.
    """
    document = read_yaml(_find(path), str(path))
    if document.data is None:
        raise _error(document)
    for override in overrides:
        document.override(override)
    _refuse_code(document, document.data, (), allow_code=allow_code)
    return _validated(document, Recipe)


def recipe_of(values: dict[str, Any], overrides: Sequence[str] = ()) -> Recipe:
    """A recipe from plain values.

    Raises:
        UsageError: everything that is wrong, one line each.
    """
    return _validated(_from_values(values, overrides), Recipe)


def command_recipe(values: dict[str, Any], overrides: Sequence[str] = ()) -> CommandRecipe:
    """The recipe of one command's options: a `Recipe` where they name data.

    Raises:
        UsageError: everything that is wrong, one line each.
    """
    document = _from_values(values, overrides)
    return _validated(document, Recipe if document.data.get("data") else CommandRecipe)


def _from_values(values: dict[str, Any], overrides: Sequence[str]) -> Document:
    document = Document(COMMAND_LINE, values, {(): Place((0, 0), COMMAND_LINE)})
    for override in overrides:
        document.override(override)
    return document


def _validated(document: Document, kind: type[_Kind]) -> _Kind:
    if broken := list(_not_text(document)):  # the check below would not name their keys
        document.problems.extend(broken)
        raise _error(document)
    try:
        recipe = kind.model_validate_json(json.dumps(document.data), strict=True)
    except ValidationError as error:
        faults = error.errors(include_url=False)
        document.problems.extend(_problem(document, fault) for fault in faults)
    if document.problems:
        raise _error(document)
    return recipe


def _find(path: str | Path) -> Path:
    """The recipe's file; only a regular one, so that nothing endless is read."""
    given = Path(path)
    if given.is_file():
        return given
    shipped = {p.stem: p for p in sorted(recipe_folder().glob("*.yaml"))}
    if given.name == str(path) and given.stem in shipped and (given.is_dir() or not given.exists()):
        return shipped[given.stem]
    close = difflib.get_close_matches(given.stem, shipped, n=1)
    raise UsageError(
        f"{path}: {'not a file' if given.exists() else 'no such file'}",
        why=f"a recipe is a YAML file, or one of those shipped: {', '.join(shipped)}",
        fix=f"did you mean {close[0]}?" if close else "check the path, or take a shipped one",
        code="recipe",
    )


def _refuse_code(document: Document, value: Any, key: Key, *, allow_code: bool) -> None:
    """Nothing in a recipe may name code to run; the command line may, for the network."""
    if isinstance(value, (dict, list)):
        items = value.items() if isinstance(value, dict) else enumerate(value)
        for name, item in items:
            _refuse_code(document, item, (*key, name), allow_code=allow_code)
    elif isinstance(value, str) and re.search(r"\.py:\w+$", value):
        place = document.place_of(key)
        if not (allow_code and key == ("model", "name") and place.label == COMMAND_LINE):
            message = "names code to run; say model.name=FILE.py:FUNCTION and --allow-code"
            message = f"{message} on the command line (got {short(value)})"
            document.problems.append(Problem(place, dotted(key), message))


def _not_text(document: Document) -> Iterator[Problem]:
    """File names whose bytes are no characters; Python spells such bytes as surrogates."""
    for key, value in _texts(document.data, ()):
        if not value.isprintable() and re.search("[\ud800-\udfff]", value):
            message = "is not UTF-8 text: rename the file, or give a UTF-8 locale: LC_ALL=C.UTF-8"
            yield Problem(document.place_of(key), dotted(key), f"{message} (got {short(value)})")


def _texts(value: Any, key: Key) -> Iterator[tuple[Key, str]]:
    if isinstance(value, str):
        yield key, value
    elif isinstance(value, (dict, list)):
        for name, item in value.items() if isinstance(value, dict) else enumerate(value):
            yield from _texts(item, (*key, name))


_WORDS = {
    "an object": "a section of keys",
    "a valid array": "a list",
    "a valid string": "a text",
    "a valid integer": "a whole number",
    "a valid number": "a number",
    "a valid boolean": "true or false",
}


def _problem(document: Document, fault: Any) -> Problem:
    key: Key = fault["loc"]
    place = document.place_of(key)
    if fault["type"] == "extra_forbidden":
        return Problem(place, dotted(key), f"unknown key{_hint(key)}")
    if fault["type"] == "missing":
        return Problem(place, dotted(key), "is required")
    message = re.sub(r"^\w+ should ", "must ", fault["msg"].removeprefix("Value error, "))
    for theirs, ours in _WORDS.items():
        message = message.replace(theirs, ours)
    return Problem(place, dotted(key), f"{message} (got {short(fault['input'])})")


def _hint(key: Key) -> str:
    """The known key that was probably meant: a near one here, or this one in another section."""
    section, name = dotted(key[:-1]), str(key[-1])
    known = [k.rpartition(".") for k in known_keys()]
    here = [last for above, _, last in known if above == section]
    close = [dotted((*key[:-1], k)) for k in difflib.get_close_matches(name, here, n=1)]
    close = close or ["".join(k) for k in known if k[2] == name]
    return f"; did you mean {close[0]}?" if close else f"; known here: {', '.join(here)}"


def known_keys(section: type[Section] = Recipe, prefix: str = "") -> list[str]:
    """All dotted keys of a section, such as `plan.macs`."""
    found = []
    for name, info in section.model_fields.items():
        found.append(prefix + name)
        for kind in (info.annotation, *getattr(info.annotation, "__args__", ())):
            if isinstance(kind, type) and issubclass(kind, Section):
                found += known_keys(kind, f"{prefix}{name}.")
    return found


def _error(document: Document) -> UsageError:
    problems = sorted(document.problems)
    return UsageError(
        "\n".join(map(str, problems)),
        why="a recipe is checked whole before any work starts",
        fix="mend what is listed; docs/recipes.md and `seprune recipes schema` have every key",
        code="recipe",
    )
