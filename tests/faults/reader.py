"""A child process that loads one file after another: `python reader.py`, paths on stdin.

Answers one JSON line each: what was loaded (a digest of the tensors), or the error's code.
Anything that is not a SepruneError ends it with a traceback, which is what the fuzz test looks for.
"""

from __future__ import annotations

import hashlib
import json
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[2]))

from seprune.checkpoint import load_weights
from seprune.checkpoint.weights import Weights
from seprune.errors import SepruneError


def digest(weights: Weights) -> str:
    """A hash of names, types, shapes and values."""
    found = hashlib.sha256()
    for name, tensor in weights.tensors.items():
        found.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        found.update(bytes(tensor.contiguous().flatten().view(torch.uint8).tolist()))
    return found.hexdigest()


def answer(path: Path) -> dict[str, object]:
    """What loading `path` gives."""
    try:
        return {"digest": digest(load_weights(path))}
    except SepruneError as error:
        parts = bool(error.what and error.why and error.fix)
        return {"code": error.code, "status": error.exit_status, "parts": parts}


if __name__ == "__main__":
    torch.set_num_threads(1)
    for line in sys.stdin:
        print(json.dumps(answer(Path(line.rstrip("\n")))), flush=True)
