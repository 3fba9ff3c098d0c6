"""Packages of the extras, imported on demand; a missing one is named with its pip line."""

from __future__ import annotations

import importlib
from typing import Any

from seprune.errors import EnvironmentFault, first_line


def require(*modules: str, extra: str, what: str, otherwise: str = "") -> Any:
    """Import `modules`; the last one is returned.

    Args:
        extra: of seprune, that installs them.
        what: the error's first sentence.
        otherwise: what can be done without the extra.

    Raises:
        EnvironmentFault: one cannot be imported.
    """
    try:
        return [importlib.import_module(module) for module in modules][-1]
    except ImportError as error:
        raise EnvironmentFault(
            what,
            why=first_line(error),
            fix=f"pip install 'seprune[{extra}]'" + (otherwise and f", or {otherwise}"),
            code="extra",
        ) from error
