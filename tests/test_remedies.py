"""What messages and docs/errors.md tell people to type is taken by the parser and the schema."""

from __future__ import annotations

import ast
import inspect
import re
import shlex
import tomllib
import typing
from collections.abc import Iterable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import typer
from torch.utils.data import DataLoader

import seprune
from seprune.cli import app
from seprune.errors import UsageError
from seprune.models.blocks import SE
from seprune.recipe import recipe_of
from seprune.recipe.load import known_keys

ROOT = Path(__file__).parents[1]
BLANK = "\N{WHITE SQUARE}"  # in the place of what a message fills in
MINIMAL = {"name": "x", "model": {"name": "seprune/se_resnet8"}, "data": {"source": "digits"}}
KEYS = set(known_keys())
SECTIONS = {key.partition(".")[0] for key in KEYS if "." in key}
ROOT_COMMAND = typer.main.get_command(app)
ARGUMENT = re.compile(rf"--?[a-z]|[A-Z]+[;,:]?$|'|\.\.\.$|[a-z_.]+=|.*{BLANK}")
PROSE = {
    "changed",
    "cuts",
    "pruned",
    "pushed",
    "reads",
    "saved",
    "that",
    "writes",
    "wrote",
}  # "a folder that seprune wrote"
OF_OTHERS = {
    "--head",
    "--local-dir",
    "--repo-type",
    "--revision",
    "--nproc-per-node",
    "--upgrade",
    "--force-reinstall",
}  # ray, hf, torchrun and pip
KEY_OF = {"--task": "task", "--runtime": "plan.runtime", "--recover": "prune.recover",
          "--importance": "importance.criterion", "--device": "device", "--macs": "plan.macs",
          "--weights": "model.weights", "--classes": "model.classes",
          "--gradients": "collect.gradients"}  # fmt: skip


def _text(node: ast.AST) -> str | None:
    """A text of the source; what it fills in is blank."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    if isinstance(node, ast.JoinedStr):
        return "".join(v.value if isinstance(v, ast.Constant) else BLANK for v in node.values)
    return None


def _texts(nodes: Iterable[ast.AST]) -> Iterator[tuple[int, str]]:
    """Their texts but docstrings, with their lines; parents come before their children."""
    skipped = set()
    for node in nodes:
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)) and node.body:
            first = node.body[0]
            skipped |= {id(first.value)} if isinstance(first, ast.Expr) else set()
        if isinstance(node, ast.JoinedStr):
            skipped |= set(map(id, node.values))
        if id(node) not in skipped and (text := _text(node)) is not None:
            yield getattr(node, "lineno", 0), text


@cache
def sources() -> list[tuple[Path, list[ast.AST]]]:
    """Every file of the package and the nodes of its tree."""
    paths = sorted((ROOT / "seprune").rglob("*.py"))
    return [(path, list(ast.walk(ast.parse(path.read_text())))) for path in paths]


@cache
def messages() -> list[tuple[str, str]]:
    """Every text of the source but docstrings, and the cures of the catalogue, with its place."""
    found = [
        (f"{path.relative_to(ROOT)}:{line}", text)
        for path, nodes in sources()
        for line, text in _texts(nodes)
    ]
    catalogue = (ROOT / "docs" / "errors.md").read_text()
    rows = re.findall(r"^\| `([a-z-]+)` \|.*\| ([^|]+) \|$", catalogue, re.M)
    quoted = [(code, part) for code, cure in rows for part in re.findall(r"`([^`]+)`", cure)]
    return found + [(f"docs/errors.md {code}", part) for code, part in quoted]


@cache
def remedies() -> list[tuple[str, str]]:
    """The texts given as `fix=`, and the cures of the catalogue."""
    found = []
    for path, nodes in sources():
        for node in nodes:
            if isinstance(node, ast.keyword) and node.arg == "fix":
                texts = _texts(ast.walk(node.value))
                found += [(f"{path.name}:{line}", text) for line, text in texts]
    return found + [pair for pair in messages() if pair[0].startswith("docs/")]


def keys_and_values(text: str) -> list[tuple[str, str]]:
    """Every `key=value` outside of Python calls."""
    outside = re.sub(r"(?<=\S)\([^()]*\)", "", text)
    pattern = r"(?<![\w.{-])([a-z_]+(?:\.[a-z_]+)*)=((?:\[[^\]]*\]|[^\s;,]*))"
    return [(key, value.rstrip(":.")) for key, value in re.findall(pattern, outside)]


def _command(words: list[str]) -> tuple[Any, list[str]]:
    """The command of a line, and its arguments."""
    command: Any = ROOT_COMMAND
    while words and hasattr(command, "commands"):
        command, words = command.commands.get(words[0]), words[1:]
    return command, words


def _arguments(words: list[str]) -> list[str]:
    """The words at the start that are typed; the prose behind them is not."""
    typed: list[str] = []
    for word in words:
        follows = bool(typed) and typed[-1].startswith("--") and "," not in typed[-1]
        if not (follows or ARGUMENT.match(word)):
            break
        typed.append(word.rstrip(";,:"))
        if word[-1] in ";,:":
            break
    return typed


def command_lines() -> list[tuple[str, list[str]]]:
    found = []
    for place, text in messages():
        for rest in re.findall(rf"(?<![\w/'.])seprune ((?:[a-z][a-z-]+|{BLANK}).*)", text):
            words = rest.replace("`", " ` ").split(" ` ")[0].split()
            command, arguments = _command([re.sub(r"[;,:]$", "", w) for w in words[:2]])
            if words[0].rstrip(";,:.") in {*PROSE, BLANK}:
                continue
            name = words[: 2 - len(arguments)] if command else words[:1]
            found.append((place, [*name, *_arguments(words[len(name) :])]))
    return found


def test_there_is_something_to_check():
    assert len(command_lines()) > 20
    pairs = [key for _, text in remedies() for key, _ in keys_and_values(text)]
    assert len(pairs) > 25
    assert {"plan.protect", "finetune.mixup", "importance.probe.lr"} <= set(pairs)


def test_every_command_in_a_message_is_taken_by_the_parser():
    for place, words in command_lines():
        try:
            _parse(place, words)
        except Exception as error:
            error.add_note(f"{place}: seprune {' '.join(words)}")
            raise


def _parse(place: str, words: list[str]) -> None:
    command, arguments = _command([re.sub(r"[;,:]$", "", w) for w in words])
    assert command is not None, f"{place}: seprune {' '.join(words)}"
    given = [w.replace(BLANK, "1") for w in shlex.split(" ".join(arguments))]
    known = {o for p in command.params for o in (*p.opts, *p.secondary_opts)}
    assert {w for w in given if w.startswith("--")} - known - {"--1"} == set(), place
    for word in given:
        if re.match(r"[a-z_.]+=", word):
            assert word.partition("=")[0] in KEYS, place
    if given and not {"...", "--1"} & set(given) and given[-1] not in known:
        command.make_context("seprune", given)


def test_every_key_and_value_in_a_remedy_is_taken_by_the_schema():
    for place, text in remedies():
        _taken_by_the_schema(place, text)


def _taken_by_the_schema(place: str, text: str) -> None:
    for key, value in keys_and_values(text):
        if key not in KEYS or re.fullmatch("[A-Z][a-z]+", value):  # for people who call Python
            assert key in _parameters(), f"{place}: {key}={value}"
        elif BLANK not in value and not re.search("[A-Z]{3}|[HW],?", value):
            recipe_of(dict(MINIMAL), [f"{key}={value}"])
    for key in re.findall(rf"(?<![\w/.])((?:{'|'.join(SECTIONS)})\.[a-z_.]+[a-z])\b(?!\()", text):
        assert key in KEYS or key.endswith((".json", ".md", ".safetensors", "_orig_mod")), (
            f"{place}: {key}"
        )


@cache
def _parameters() -> set[str]:
    """What public functions and option classes take, networks and torch's loader."""
    public = [getattr(seprune, name) for name in seprune.__all__]
    callables = [*filter(callable, public), DataLoader, SE]
    found: set[str] = set()
    for value in callables:
        if typing.is_typeddict(value):
            found |= set(value.__annotations__)
        else:
            found |= set(inspect.signature(value).parameters)
    return found | {"macs", "params", "latency"}  # the names of budgets


def test_every_option_in_a_message_is_one_and_takes_its_value():
    options, todo = {*OF_OTHERS, "--help"}, [ROOT_COMMAND]
    while todo:
        command = todo.pop()
        options |= {o for p in command.params for o in (*p.opts, *p.secondary_opts)}
        todo += getattr(command, "commands", {}).values()
    for place, text in messages():
        for option, value in re.findall(
            r"(?<![\w-])(--[a-z][a-z0-9-]*)(?: ([a-z0-9_]+(?:\.\d+)?))?", text
        ):
            assert option in options, f"{place}: {option}"
            if option in KEY_OF and re.search(rf"{option} {value}(?:$|[,;)])", text) and value:
                recipe_of(dict(MINIMAL), [f"{KEY_OF[option]}={value}"])


def test_every_extra_in_a_message_is_one():
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    named = {e for _, text in messages() for e in re.findall(r"seprune\[(\w+)\]", text)}
    for path in (ROOT / "seprune").rglob("*.py"):
        if "import require\n" in (text := path.read_text()):
            named.update(re.findall(r"""extra["']?[=:] ?"(\w+)\"""", text))
    assert {"hub", "onnx", "tasks"} <= named  # of runtime/extras.require
    assert named <= set(extras["optional-dependencies"])


def test_calls_of_python_in_a_remedy_name_parameters_that_exist():
    checked = 0
    for place, text in remedies():
        for name, inner in re.findall(r"\b(\w+)\(([^()]*)\)", text):
            value = getattr(seprune, name, None) if name in seprune.__all__ else None
            if value is None:
                continue
            parameters = inspect.signature(value).parameters
            open_ended = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
            named = set(re.findall(r"\b(\w+)=", inner))
            assert open_ended or named <= set(parameters), f"{place}: {name}({inner})"
            checked += 1
    assert checked > 3


@pytest.mark.parametrize("wrong", ["importance.name=l2", "plan.protect=3", "finetune.mixup=high"])
def test_the_check_finds_what_the_schema_refuses(wrong):
    key, value = keys_and_values(f"see: seprune inspect MODEL; or choose {wrong}")[0]
    assert key not in {*KEYS, *_parameters()} or _refused(f"{key}={value}")


def _refused(override: str) -> bool:
    try:
        recipe_of(dict(MINIMAL), [override])
    except UsageError:
        return True
    return False
