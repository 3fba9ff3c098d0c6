"""A child process that reads one input after another: `python reader.py`, `[KIND, PATH]` on stdin.

Answers one JSON line each: a digest of what was read, or the error's code. Anything that is not a
SepruneError ends it with a traceback, which is what the fuzz test looks for.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch

from seprune.checkpoint import load_weights
from seprune.data.decode import read_image
from seprune.errors import SepruneError
from seprune.export.pruned_model import load
from seprune.recipe import dump_recipe, load_recipe


def tensors(tensors_by_name: Mapping[str, torch.Tensor]) -> str:
    """A hash of names, types, shapes and values."""
    found = hashlib.sha256()
    for name, tensor in sorted(tensors_by_name.items()):
        found.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        found.update(tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


READERS: dict[str, Callable[[Path], str]] = {
    "weights": lambda path: tensors(load_weights(path).tensors),
    "recipe": lambda path: dump_recipe(load_recipe(path)),
    "image": lambda path: hashlib.sha256(read_image(path).tobytes()).hexdigest(),
    "folder": lambda path: tensors(load(path).state_dict()),
}


def outcome(read: Callable[[], Any]) -> Any:
    """What reading gives, or the error."""
    try:
        return read()
    except SepruneError as error:
        parts = bool(error.what and error.why and error.fix)
        return {"code": error.code, "status": error.exit_status, "parts": parts}


if __name__ == "__main__":
    for line in sys.stdin:
        kind, path = json.loads(line)
        print(json.dumps(outcome(partial(READERS[kind], Path(path)))), flush=True)
