"""The application: the commands by name, in the order in which `seprune --help` lists them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from seprune import __version__
from seprune.cli import (
    collect,
    compare,
    convert,
    demo,
    env,
    evaluate,
    export,
    finetune,
    inspect,
    latency_table,
    models,
    options,
    prune,
    push,
    rank,
    recipes,
    report,
    run,
    sensitivity,
    sweep,
    verify,
)
from seprune.cli.faults import Raised

COMMANDS: dict[str, Callable[..., Any]] = {
    "run": run.run,
    "demo": demo.demo,
    "collect": collect.collect,
    "rank": rank.rank,
    "prune": prune.prune,
    "finetune": finetune.finetune,
    "evaluate": evaluate.evaluate,
    "sensitivity": sensitivity.sensitivity,
    "sweep": sweep.sweep,
    "inspect": inspect.inspect,
    "report": report.report,
    "compare": compare.compare,
    "export": export.export,
    "push": push.push,
    "models": models.models,
    "env": env.env,
    "verify": verify.verify,
    "convert": convert.convert,
}
"""Each in the file of its name."""


class _Commands(TyperGroup):
    """Lets no error of a command pass for one of the parser's own."""

    def invoke(self, ctx: Any) -> Any:
        """The command that was typed."""
        try:
            return super().invoke(ctx)
        except (KeyboardInterrupt, EOFError) as error:
            raise Raised(error) from None


app = typer.Typer(
    name="seprune",
    cls=_Commands,
    help="Prune Squeeze-and-Excitation networks by what their own gates say about each channel.\n\n"
    "\b\nExample:\n  seprune run quickstart --out runs/quickstart",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)
for name, command in COMMANDS.items():
    app.command(name)(options.spread(command))
app.add_typer(recipes.app, name="recipes")
app.add_typer(latency_table.app, name="latency-table")


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"seprune {__version__}")
        raise typer.Exit


@app.callback()
def _before_commands(
    _version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_print_version, is_eager=True, help="Show the version and exit."
        ),
    ] = False,
) -> None:
    pass
