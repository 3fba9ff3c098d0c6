"""Pages of the site made from the package: its commands, its API, and files of the root."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
from mkdocs.structure.files import File, Files
from typer.main import get_command

ROOT = Path(__file__).parents[1]
COPIES = {
    "index.md": "README.md", "contributing.md": "CONTRIBUTING.md", "security.md": "SECURITY.md",
    "changelog.md": "CHANGELOG.md",
}  # fmt: skip


def on_files(files: Files, config: Any) -> Files:
    """Add what is not kept as a file."""
    for page, source in COPIES.items():
        text = (ROOT / source).read_text()
        files.append(File.generated(config, page, content=_moved(text)))
    files.append(File.generated(config, "examples.md", content=examples()))
    files.append(File.generated(config, "cli.md", content=command_line()))
    files.append(File.generated(config, "python.md", content=python_api()))
    return files


def _moved(text: str) -> str:
    """Links of a page in the root, as a page beside those of docs/."""
    text = text.replace("English | [简体中文](README.zh-CN.md)\n\n", "")
    text = text.replace("](docs/", "](").replace('"docs/', '"')
    text = text.replace("](examples)", "](examples.md)")
    for page, source in COPIES.items():
        text = text.replace(f"]({source})", f"]({page})")
    return re.sub(r"<picture>.*?<img[^>]*src=\"([^\"]+)\"[^>]*>.*?</picture>",
                  r"![Top-1 against MACs kept](\1#only-light)"
                  r"![Top-1 against MACs kept](accuracy-dark.svg#only-dark)",
                  text, flags=re.DOTALL)  # fmt: skip


def examples() -> str:
    """Every example: what its docstring says, and its code."""
    parts = ["# Examples", "", "Files of the folder `examples`, each run by a test.", ""]
    for path in sorted((ROOT / "examples").glob("*.py")):
        text = path.read_text()
        parts += [f"## {path.name}", "", ast.get_docstring(ast.parse(text)) or "", ""]
        parts += ["```python", text.split('"""', 2)[2].strip(), "```", ""]
    return "\n".join(parts)


def command_line() -> str:
    """Every command with its help and options."""
    from seprune.cli.app import app

    parts = ["# Command line", "", "Every command has `--json` and examples in its `--help`.", ""]
    for name, command in _commands(get_command(app), "seprune"):
        help_text = (command.help or "").replace("\b", "").replace("\\\\", "\\")
        about, *examples = re.split(r"Examples?:\n", help_text, maxsplit=1)
        parts += [f"## {name}", "", _paragraphs(about), ""]
        if examples:
            parts += ["```bash", _dedented(examples[0]), "```", ""]
        parts += _options(command)
    return "\n".join(parts)


def _commands(command: click.Command, name: str) -> Iterator[tuple[str, click.Command]]:
    if hasattr(command, "commands"):
        for inner, found in command.commands.items():
            yield from _commands(found, f"{name} {inner}")
    else:
        yield name, command


def _options(command: click.Command) -> list[str]:
    rows = ["| option | meaning |", "|---|---|"]
    for option in command.params:
        if getattr(option, "hidden", False):
            continue
        names = ", ".join(f"`{text}`" for text in (*option.opts, *option.secondary_opts))
        if isinstance(option, click.Argument):
            names = f"`{option.make_metavar(click.Context(command))}`"
        about = str(getattr(option, "help", "") or "").replace("|", "\\|").replace("\n", " ")
        default = option.default if isinstance(option.default, str | int | float) else None
        shown = f" Default: `{default}`." if default not in (None, "", False) else ""
        rows.append(f"| {names} | {about}{shown} |")
    return [*rows, ""]


def _paragraphs(text: str) -> str:
    return "\n\n".join(" ".join(part.split()) for part in text.split("\n\n") if part.strip())


def _dedented(text: str) -> str:
    return "\n".join(line.strip() for line in text.strip().splitlines())


def python_api() -> str:
    """One entry for each public name, by the module that defines it."""
    parts = ["# Python", "", "All of `seprune`'s names, from `import seprune`.", ""]
    for module, names in _by_module().items():
        parts += [f"## {module.replace('seprune.', '').replace('.', ' / ')}", ""]
        for name in names:
            parts += [f"::: {module}.{name}", ""]
    return "\n".join(parts)


def _by_module() -> dict[str, list[str]]:
    tree = ast.parse((ROOT / "seprune" / "__init__.pyi").read_text())
    found: dict[str, list[str]] = {}
    for node in tree.body:
        if isinstance(node, ast.ImportFrom):
            found.setdefault(f"seprune.{node.module}", []).extend(a.name for a in node.names)
    return found
