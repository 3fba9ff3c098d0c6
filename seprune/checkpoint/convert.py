"""Turn a pickled model that the user trusts into .safetensors, in a process of its own."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from seprune.checkpoint.read import read_pickled, read_safetensors
from seprune.checkpoint.sniff import locate
from seprune.checkpoint.weights import Choice, Weights, load_weights, select
from seprune.errors import InputError, SepruneError, UsageError
from seprune.runtime import files
from seprune.runtime.checksums import sha256
from seprune.runtime.child_process import child_environment, python_command
from seprune.runtime.text import shell_word

_UNWRITTEN = "not written, errno "
_CHILD = "from seprune.checkpoint.convert import main; main(*sys.argv[1:3], weights=sys.argv[3])"


def convert(
    path: Path,
    out: Path,
    *,
    weights: Choice = "auto",
    limit_seconds: float = 600,
    fresh: bool = False,
) -> Weights:
    """Write the weights in `path` to the .safetensors file `out`, and read that back safely.

    Files that hold only weights are read here. Others are unpickled in a child process on the CPU,
    which runs the code that they name: call this only for a file whose author the user trusts.

    Args:
        fresh: refuse to replace `out`.

    Raises:
        InputError: no weights, a pickle that runs commands, or classes that cannot be imported.
        UsageError: `out` is `path`, or is to be fresh and is there.
    """
    file = locate(path)
    if out.exists() and out.samefile(file):
        raise UsageError(
            f"{out}: is the input itself",
            why="inputs are never written over",
            fix="name another file with --out",
        )
    try:
        safe = load_weights(file, weights=weights)
    except InputError as error:
        if error.code != "checkpoint-pickled":
            raise
        safe = None

    def fill(temporary: Path) -> None:
        if safe is None:
            _convert_in_child(file, temporary, weights=weights, limit_seconds=limit_seconds)
        else:
            _write(safe, temporary)
        read_safetensors(temporary)

    files.write_with(out, fill, need=file.stat().st_size, fresh=fresh)
    return load_weights(out)


def main(path: str, out: str, *, weights: Choice) -> None:
    """The child: unpickle, take the state dict, write it."""
    file = Path(path)
    content = _without_modules(read_pickled(file))
    try:
        digest = sha256(file)
        state = select(file, content, choice=weights, notes=(), sha256=digest, metadata={})
        _write(state, Path(out))
    except SepruneError as error:
        sys.exit(f"{error.what}: {error.why}")
    except OSError as error:
        sys.exit(f"{_UNWRITTEN}{error.errno or errno.EIO}")


def _convert_in_child(path: Path, out: Path, *, weights: Choice, limit_seconds: float) -> None:
    environment = child_environment(CUDA_VISIBLE_DEVICES="")
    environment.pop("TORCH_FORCE_WEIGHTS_ONLY_LOAD", None)
    command = python_command(_CHILD, str(path), str(out), weights)
    try:
        child = subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            env=environment,
            timeout=limit_seconds,
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        raise _failed(path, f"it did not end within {limit_seconds:g} s") from error
    if child.returncode:
        lines = child.stderr.decode(errors="replace").strip().splitlines()
        reason = lines[-1] if lines else f"the process ended with status {child.returncode}"
        if reason.startswith(_UNWRITTEN):
            number = int(reason.removeprefix(_UNWRITTEN))
            raise OSError(number, os.strerror(number))
        raise _failed(path, reason)


def _without_modules(content: Any) -> Any:
    if isinstance(content, nn.Module):
        return content.state_dict()
    if isinstance(content, dict):
        return {k: v.state_dict() if isinstance(v, nn.Module) else v for k, v in content.items()}
    return content


def _write(weights: Weights, out: Path) -> None:
    metadata = {"format": "pt", "source_sha256": weights.sha256, "notes": "; ".join(weights.notes)}
    files.tensors_of({name: _own(t) for name, t in weights.tensors.items()}, metadata)(out)


def _own(tensor: Tensor) -> Tensor:
    # safetensors refuses tensors that share memory and channels_last
    return tensor.clone(memory_format=torch.contiguous_format)


def _failed(path: Path, reason: str) -> InputError:
    return InputError(
        f"{path}: cannot be converted",
        why=reason,
        fix="run it in the environment that the model was trained in; if its classes lie in files "
        f"of your own: PYTHONPATH=FOLDER seprune convert --allow-pickle {shell_word(path)}",
        code="checkpoint-convert",
    )
