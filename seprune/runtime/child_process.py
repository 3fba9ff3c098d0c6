"""Command lines of child Pythons, which never import from the folder that they are started in."""

from __future__ import annotations

import os
import sys
from pathlib import Path

_HOME = Path(__file__).parents[2]  # where this package lies: installed, or a checkout
MAIN = "from seprune.cli import main; main()"
_START = "import sys; sys.path.append(sys.argv.pop(1)); "


def python_command(code: str, *arguments: str) -> list[str]:
    """Run `code` in a Python of its own; `sys.argv[1:]` are the arguments.

    `-P` keeps the working folder out of its path: a `random.py` that lies beside the user's data
    is no module of ours. What PYTHONPATH names stays, because the user named it.
    """
    return [sys.executable, "-P", "-c", _START + code, str(_HOME), *arguments]


def child_environment(**changes: str) -> dict[str, str]:
    """The environment for such a child and for the processes that it starts in turn."""
    made = {**os.environ, "PYTHONSAFEPATH": "1", **changes}
    if "PYTHONPATH" in made:
        # an empty entry, which `$PYTHONPATH:FOLDER` leaves, is the working folder
        named = filter(None, made["PYTHONPATH"].split(os.pathsep))
        made["PYTHONPATH"] = os.pathsep.join(named)
    return made
