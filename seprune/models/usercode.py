"""FILE.py:FUNCTION: a network from the user's own file, only where the user allows code to run."""

from __future__ import annotations

import hashlib
import importlib.util
import inspect
import re
import sys
import sysconfig
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from seprune.errors import InputError
from seprune.models.origin import Origin
from seprune.runtime.surroundings import surroundings_kept
from seprune.runtime.text import shell_word

CODE = re.compile(r"(.+\.py):(\w+)")


def is_code(name: str) -> bool:
    """Whether `name` reads FILE.py:FUNCTION."""
    return CODE.fullmatch(name) is not None


def file_of(name: str) -> Path:
    """The resolved FILE.py of FILE.py:FUNCTION or of FILE.py."""
    matched = CODE.fullmatch(name)
    return Path(matched[1] if matched else name).resolve()


@surroundings_kept()
def build(origin: Origin) -> nn.Module:
    """What FUNCTION returns; `classes` (or `num_classes`) and `input` reach one that has them.

    It runs the file: `ModelLoader` decides whether it may.

    Raises:
        InputError: no such file or function, it fails, or it returns something else.
    """
    name = origin.name
    function = _load(name)
    takes = inspect.signature(function).parameters
    classes = "num_classes" if "num_classes" in takes and "classes" not in takes else "classes"
    wishes: dict[str, Any] = {classes: origin.classes, "input": origin.input, **origin.args}
    optional = {key for key in (classes, "input") if wishes[key] is None or key not in takes}
    try:
        model = function(**{key: value for key, value in wishes.items() if key not in optional})
    except Exception as error:  # the user's code may raise anything
        raise _failed(name, error) from error
    if not isinstance(model, nn.Module):
        raise InputError(
            f"{name}: returned {type(model).__name__}, not a network",
            why="the function must return a torch.nn.Module",
            fix="return the module from the function",
        )
    return model


def _load(name: str) -> Callable[..., Any]:
    matched = CODE.fullmatch(name)
    assert matched
    path, function = Path(matched[1]), matched[2]
    digest = hashlib.sha256(str(path.resolve()).encode()).hexdigest()
    spec = importlib.util.spec_from_file_location(f"{path.stem}_{digest[:8]}", path)
    if not path.is_file() or not spec or not spec.loader:
        raise InputError(f"{path}: no such file", why=f"{name} names it", fix="check the path")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where dataclasses and type hints look their module up
    try:
        spec.loader.exec_module(module)
    except Exception as error:  # the user's code may raise anything
        del sys.modules[spec.name]
        raise _failed(name, error) from error
    found = getattr(module, function, None)
    if not callable(found):
        has = [key for key, value in vars(module).items() if inspect.isfunction(value)]
        raise InputError(
            f"{path}: no function {function}",
            why=f"its functions are {', '.join(has) or 'none'}",
            fix=f"{path}:{has[0] if has else 'FUNCTION'}",
        )
    return found  # type: ignore[no-any-return]


def failed_in(error: Exception) -> str | None:
    """FILE:LINE of the user's code that the error came out of; None: of none, or of seprune's."""
    library = [Path(sysconfig.get_path(name)) for name in ("stdlib", "purelib", "platlib")]
    library.append(Path(torch.__file__).parents[1])  # a system's packages, or a folder of their own
    ours = Path(__file__).parents[1]
    for frame, line in reversed(list(traceback.walk_tb(error.__traceback__))):
        file = Path(frame.f_code.co_filename)
        if file.is_relative_to(ours):
            return None
        if file.is_file() and not any(file.is_relative_to(folder) for folder in library):
            return f"{file}:{line}"
    return None


def _failed(name: str, error: Exception) -> InputError:
    places = [f"{f.f_code.co_filename}:{n}" for f, n in traceback.walk_tb(error.__traceback__)]
    where = places[-1] if places else name
    beside = _beside(file_of(name), error)
    return InputError(
        f"{name}: the file's code failed",
        why=f"{type(error).__name__}: {error} ({where})",
        fix=f"PYTHONPATH={shell_word(beside)} before the command" if beside else f"mend {where}",
    )


def _beside(file: Path, error: Exception) -> Path | None:
    """The folder that has to be on the path, if the module that is missing lies near the file."""
    if not isinstance(error, ModuleNotFoundError) or not error.name:
        return None
    top = error.name.partition(".")[0]
    near = list(file.parents)[:3]
    return next((d for d in near if (d / f"{top}.py").is_file() or (d / top).is_dir()), None)
