"""The state of a fine-tuning on disk: the last two generations, hashed, without pickle."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from torch.optim import SGD, AdamW, Optimizer

from seprune.errors import InputError
from seprune.runtime.checksums import sha256
from seprune.runtime.files import tensors_of, write_text, write_with
from seprune.runtime.reading import parse_json, read_bytes
from seprune.runtime.typed import require_like

_REMEMBERED: dict[type[Optimizer], tuple[str, ...]] = {
    SGD: ("momentum_buffer",),
    AdamW: ("step", "exp_avg", "exp_avg_sq"),
}
_STEP = torch.zeros(())


@dataclass(frozen=True)
class Generation:
    """All that training needs to go on: tensors by name, and JSON facts."""

    tensors: dict[str, Tensor]
    facts: dict[str, Any]


def save_generation(folder: Path, generation: Generation) -> None:
    """Write the next generation; the hash beside it commits it, then the last but two goes."""
    number = max(_numbers(folder), default=0) + 1
    path = folder / f"state-{number:06d}.safetensors"
    fill = tensors_of(generation.tensors, {"facts": json.dumps(generation.facts)})
    write_with(path, fill, need=sum(t.nbytes for t in generation.tensors.values()))
    write_text(path.with_suffix(".sha256"), f"{sha256(path)}  {path.name}\n")
    for old in _numbers(folder):
        if old <= number - 2:
            _paths(folder, old)[1].unlink(missing_ok=True)
            _paths(folder, old)[0].unlink(missing_ok=True)


def has_generation(folder: Path) -> bool:
    """Whether anything was committed, be it damaged by now."""
    return any(_paths(folder, number)[1].is_file() for number in _numbers(folder))


def load_generation(folder: Path) -> Generation | None:
    """The newest generation whose hash holds, or None where nothing was saved yet.

    Raises:
        InputError: generations were committed, but every one of them is damaged.
    """
    committed = False
    for number in sorted(_numbers(folder), reverse=True):
        path, digest = _paths(folder, number)
        if not digest.is_file():
            continue
        committed = True
        if path.is_file() and read_bytes(digest) == f"{sha256(path)}  {path.name}\n".encode():
            try:
                return _read(path)
            except (SafetensorError, ValueError, KeyError, TypeError):
                continue
    if committed:
        raise InputError(
            f"{folder}: the saved training state is damaged",
            why="no generation matches its SHA-256",
            fix=start_again(folder),
        )
    return None


def start_again(folder: Path | str) -> str:
    """What to do about a state that cannot be used."""
    return f"delete {folder} to start this fine-tuning again"


def optimizer_state(
    tensors: Mapping[str, Tensor], optimizer: Optimizer, *, source: str, fix: str
) -> dict[int, dict[str, Tensor]]:
    """What an optimizer remembers of each parameter, by number, from tensors `NUMBER.NAME`.

    Raises:
        InputError: it does not fit the optimizer's parameters.
    """
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    numbers = {name.partition(".")[0] for name in tensors}
    numbers &= {str(number) for number in range(len(parameters))}
    own: dict[str, Tensor] = {}
    for number in sorted(numbers):
        shape = parameters[int(number)]
        for name in _REMEMBERED[type(optimizer)]:
            own[f"{number}.{name}"] = _STEP if name == "step" else shape
    require_like(tensors, own, source=source, fix=fix)
    state: dict[int, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        number, _, key = name.partition(".")
        # torch takes these tensors over as its own where device and type already fit
        state.setdefault(int(number), {})[key] = tensor.clone()
    return state


def _read(path: Path) -> Generation:
    with safe_open(path, framework="pt") as file:
        facts = parse_json(file.metadata()["facts"], finite=False)
        return Generation({name: file.get_tensor(name) for name in file.keys()}, facts)  # noqa: SIM118


def _numbers(folder: Path) -> list[int]:
    stems = {path.stem.removeprefix("state-") for path in folder.glob("state-*")}
    return [int(stem) for stem in stems if stem.isascii() and stem.isdigit()]


def _paths(folder: Path, number: int) -> tuple[Path, Path]:
    path = folder / f"state-{number:06d}.safetensors"
    return path, path.with_suffix(".sha256")
