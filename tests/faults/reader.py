"""A child process that reads one input after another: `python reader.py`, `KIND\\tPATH` on stdin.

Answers one JSON line each: a digest of what was read, or the error's code. Anything that is not a
SepruneError ends it with a traceback, which is what the fuzz test looks for.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[2]))

from seprune.checkpoint import load_weights
from seprune.data.decode import read_image
from seprune.errors import SepruneError
from seprune.recipe import dump_recipe, load_recipe
from seprune.saved import load


def tensors(held: Mapping[str, torch.Tensor]) -> bytes:
    """A hash of names, types, shapes and values."""
    found = hashlib.sha256()
    for name, tensor in held.items():
        found.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        found.update(bytes(tensor.contiguous().flatten().view(torch.uint8).tolist()))
    return found.digest()


READERS: dict[str, Callable[[Path], bytes]] = {
    "weights": lambda path: tensors(load_weights(path).tensors),
    "recipe": lambda path: dump_recipe(load_recipe(path)).encode(),
    "image": lambda path: read_image(path).tobytes(),
    "folder": lambda path: tensors(load(path).state_dict()),
}


def answer(kind: str, path: Path) -> dict[str, object]:
    """What reading `path` gives."""
    try:
        return {"digest": hashlib.sha256(READERS[kind](path)).hexdigest()}
    except SepruneError as error:
        parts = bool(error.what and error.why and error.fix)
        return {"code": error.code, "status": error.exit_status, "parts": parts}


if __name__ == "__main__":
    torch.set_num_threads(1)
    for line in sys.stdin:
        kind, _, path = line.rstrip("\n").partition("\t")
        print(json.dumps(answer(kind, Path(path))), flush=True)
