"""Tensors and JSON facts in one safetensors file that carries its own SHA-256."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from seprune.errors import InputError, first_line
from seprune.runtime.files import tensors_of, write_with
from seprune.runtime.reading import parse_json, require_regular
from seprune.runtime.typed import typed


def write_tensors(path: Path, tensors: dict[str, Tensor], facts: dict[str, Any]) -> None:
    """Write `path` atomically; `facts` must be JSON."""
    own = {name: t.detach().cpu().contiguous() for name, t in tensors.items()}
    text = json.dumps(facts, allow_nan=False, sort_keys=True)
    metadata = {"facts": text, "sha256": _digest(own, text)}
    size = sum(t.nbytes for t in own.values()) + len(text)
    write_with(path, tensors_of(own, metadata), need=size)


def read_tensors(path: Path, *, what: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors and facts in `path`; `what` is named in errors.

    Raises:
        InputError: missing, unreadable, of another kind or damaged.
    """
    fix = f"restore the file, or collect again: seprune collect ... (it writes {what})"
    try:
        require_regular(path)
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            text, digest = metadata["facts"], metadata["sha256"]
        if _digest(tensors, text) != digest:
            raise InputError(f"{path}: damaged {what}", why="its SHA-256 does not match", fix=fix)
        return tensors, typed(dict[str, Any], parse_json(text), source=str(path), fix=fix)
    except FileNotFoundError as error:
        raise InputError(f"{path}: no such file", why=f"it should hold {what}", fix=fix) from error
    except KeyError as error:
        raise InputError(f"{path}: not {what}", why=f"it has no {error}", fix=fix) from error
    except (SafetensorError, OSError, ValueError) as error:
        reason = first_line(error)
        raise InputError(f"{path}: unreadable {what}", why=reason, fix=fix) from error


def _digest(tensors: dict[str, Tensor], text: str) -> str:
    digest = hashlib.sha256(text.encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(f"\n{name} {tuple(tensor.shape)} {tensor.dtype}\n".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
