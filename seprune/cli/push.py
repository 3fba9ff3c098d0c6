"""`seprune push`: a saved network on a Hub."""

from __future__ import annotations

from typing import Annotated

import typer

from seprune.cli import console, options


def push(
    run: Annotated[
        str, typer.Argument(metavar="FOLDER", help="A network that seprune wrote, or a run folder.")
    ],
    name: Annotated[
        str, typer.Argument(metavar="ORG/NAME", help="The repository, with @BRANCH or without.")
    ],
    private: Annotated[bool, typer.Option("--private", help="Make a new one private.")] = False,
    json: options.Json = False,
) -> None:
    """Put a saved network on the Hugging Face Hub, with its card.

    `seprune.load("hf-hub:ORG/NAME")` takes it from there.

    Examples:
      seprune push runs/quickstart ORG/NAME --private
      seprune push small ORG/NAME@half
    """
    from seprune.cli.open_inputs import network_of_run
    from seprune.export.hub import push_folder

    folder = network_of_run(run, "push")
    url = push_folder(folder, name, private=private)
    if json:
        console.give({"folder": str(folder), "name": name, "commit": url})
    console.tell(f"{folder}: pushed to {name}; load it with seprune.load('hf-hub:{name}')")
