"""Packages of the extras, imported on demand; a missing one is named with its pip line."""

from __future__ import annotations

import importlib
import os
from typing import Any

from seprune.errors import EnvironmentFault, first_line

BEFORE = {"onnxruntime": ("ORT_DISABLE_TELEMETRY", "1")}
"""Variables that a package reads when it is imported, unless the user has set them.

From 1.32 on, ONNX Runtime keeps an identifier of the machine and a database of events in the user's
cache folder, for its maker.
"""


def require(*modules: str, extra: str, what: str, otherwise: str = "") -> Any:
    """Import `modules`; the last one is returned.

    Args:
        extra: of seprune, that installs them.
        what: the error's first sentence.
        otherwise: what can be done without the extra.

    Raises:
        EnvironmentFault: one cannot be imported.
    """
    for module in BEFORE.keys() & set(modules):
        os.environ.setdefault(*BEFORE[module])
    try:
        return [importlib.import_module(module) for module in modules][-1]
    except Exception as error:  # not there; or its own code fails, as under -OO
        raise EnvironmentFault(
            what,
            why=first_line(error),
            fix=f"pip install 'seprune[{extra}]'" + (otherwise and f", or {otherwise}"),
            code="extra",
        ) from error
