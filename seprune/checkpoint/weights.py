"""From the objects in a file to one plain state dict, saying what was taken and stripped."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from torch import Tensor

from seprune.checkpoint.pickles import LONGEST, MOST_NUMBERS
from seprune.checkpoint.read import read, read_metadata
from seprune.checkpoint.sniff import damaged, locate, sniff, unreadable
from seprune.errors import InputError
from seprune.runtime.checksums import sha256
from seprune.runtime.reading import read_json
from seprune.runtime.transaction import settle

Choice = Literal["auto", "raw", "ema"]

# timm.models.load_state_dict's precedence
EMA_KEYS = ("state_dict_ema", "model_ema")
RAW_KEYS = ("state_dict", "model")
PREFIXES = ("module.", "_orig_mod.", "model.")
AVERAGED = "n_averaged"  # torch.optim.swa_utils.AveragedModel


@dataclass(frozen=True)
class Weights:
    """A state dict read from somebody's file.

    Attributes:
        tensors: on the CPU, detached, names without wrapper prefixes.
        source: the key that they were taken from (`state_dict_ema`), empty for the file itself.
        stripped: the prefixes that every name had, outermost first.
        notes: what the user should be told, one sentence each.
        sha256: of the file.
        metadata: plain values beside the weights (`arch`, `epoch`, safetensors metadata).
    """

    tensors: dict[str, Tensor]
    source: str
    stripped: tuple[str, ...]
    notes: tuple[str, ...]
    sha256: str
    metadata: dict[str, Any]


def load_weights(path: Path, *, weights: Choice = "auto") -> Weights:
    """Read .safetensors, .pth, .pt or .bin, or a folder with model.safetensors; runs nothing in it.

    Args:
        path: only ever read.
        weights: `ema` or `raw` where a training checkpoint holds both; `auto` prefers EMA, as timm.

    Raises:
        InputError: missing, damaged, unsafe, another format, or without weights.
        EnvironmentFault: not enough memory.
    """
    file = locate(path)
    try:
        kind = sniff(file)
        content, notes = read(file, kind)
        digest = sha256(file)
        metadata = read_metadata(file) if kind == "safetensors" else _plain_values(content)
    except OSError as error:
        raise unreadable(file, error) from error
    return select(file, content, choice=weights, notes=notes, sha256=digest, metadata=metadata)


def is_pruned_folder(path: Path) -> bool:
    """Whether `path` is a folder that `seprune.save` wrote: config.json (`seprune`) and weights."""
    settle(path)
    try:
        config = read_json(path / "config.json")
    except InputError:
        return False
    marked = isinstance(config, dict) and "seprune" in config
    return marked and (path / "model.safetensors").is_file()


def select(
    path: Path,
    content: Any,
    *,
    choice: Choice,
    notes: tuple[str, ...],
    sha256: str,
    metadata: dict[str, Any],
) -> Weights:
    """The state dict among the objects of a file, without wrapper prefixes.

    Raises:
        InputError: there is none, or not the one that `choice` asks for.
    """
    source, state = _container(path, content, choice=choice)
    found = list(notes)
    if source:
        others = [key for key in (*EMA_KEYS, *RAW_KEYS) if key != source and _state(content, key)]
        beside = f" (beside it: {', '.join(others)}; --weights raw|ema chooses)" if others else ""
        found.append(f"weights taken from {source}{beside}")
    averaged = state.pop(AVERAGED, None)
    if isinstance(averaged, Tensor) and averaged.numel() == 1:
        found.append(f"averaged weights ({AVERAGED} = {int(averaged)})")
    tensors = {k: v.detach() for k, v in state.items() if isinstance(v, Tensor)}
    for name, tensor in tensors.items():
        if tensor.nbytes > tensor.untyped_storage().nbytes():
            shape = "x".join(map(str, tensor.shape))
            damaged(path, f"the tensor {name} claims {shape} numbers and has fewer")
    dropped = [str(key) for key in state if key not in tensors]
    if dropped:
        found.append(f"left out, not tensors: {', '.join(dropped[:5])}")
    tensors, stripped = _strip(tensors)
    found += [f"prefix {prefix} stripped from every name" for prefix in stripped]
    return Weights(tensors, source, stripped, tuple(found), sha256, metadata)


def _container(path: Path, content: Any, *, choice: Choice) -> tuple[str, dict[str, Any]]:
    """The state dict that `choice` means, and the key it stood under."""
    wanted = {"auto": EMA_KEYS + RAW_KEYS, "ema": EMA_KEYS, "raw": RAW_KEYS}[choice]
    for key in wanted:
        state = _state(content, key)
        if state:
            _refuse_averaged(path, state, choice=choice, source=key)
            return key, state
    state = _state({"": content}, "")
    if state:
        _refuse_averaged(path, state, choice=choice, source="")
        if choice == "ema" and AVERAGED not in state:
            raise _no_choice(path, choice, found="a plain state dict")
        return "", state
    found = [key for key in content if _state(content, key)] if isinstance(content, dict) else []
    if found and (choice == "ema" or (choice == "raw" and set(found) & {*EMA_KEYS})):
        raise _no_choice(path, choice, found=", ".join(map(_shown, found[:8])))
    if len(found) == 1:
        return _shown(found[0]), _state(content, found[0])
    raise _no_weights(path, content, found=found)


def _state(content: Any, key: object) -> dict[str, Any]:
    """A copy of `content[key]` if that is a state dict: text keys, at least one tensor."""
    state = content.get(key) if isinstance(content, dict) else None
    if not isinstance(state, dict) or not all(isinstance(name, str) for name in state):
        return {}
    # `{"epoch": 3, "model": {...}, "step": tensor}` is a container, not a state dict
    if any(isinstance(value, dict) and value for value in state.values()):
        return {}
    return dict(state) if any(isinstance(value, Tensor) for value in state.values()) else {}


def _strip(tensors: dict[str, Tensor]) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    stripped: list[str] = []
    while True:
        prefix = next((p for p in PREFIXES if all(name.startswith(p) for name in tensors)), None)
        if prefix is None or not tensors:
            return tensors, tuple(stripped)
        tensors = {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}
        stripped.append(prefix)


def _plain_values(content: Any) -> dict[str, Any]:
    if not isinstance(content, dict):
        return {}
    plain = (str, int, float, bool)
    return {k: v for k, v in content.items() if isinstance(k, str) and isinstance(v, plain)}


def _refuse_averaged(path: Path, state: dict[str, Any], *, choice: Choice, source: str) -> None:
    if choice == "raw" and AVERAGED in state:
        raise _no_choice(
            path, choice, found=f"averaged weights ({AVERAGED}) in {source or 'the file'}"
        )


def _no_choice(path: Path, choice: Choice, *, found: str) -> InputError:
    return InputError(
        f"{path}: no {choice} weights in it",
        why=f"it holds {found}",
        fix="use --weights auto",
        code="checkpoint-no-choice",
    )


def _shown(key: object) -> str:
    """A key of somebody's dict; an integer may have more digits than Python spells out."""
    plain = isinstance(key, str) or (type(key) is int and abs(key) < MOST_NUMBERS)
    return str(key)[:LONGEST] if plain else f"a {type(key).__name__}"


def _no_weights(path: Path, content: Any, *, found: list[Any]) -> InputError:
    if isinstance(content, dict):
        keys = ", ".join(repr(_shown(key)) for key in list(content)[:8]) or "nothing"
        why = f"it is a dict with {keys}"
    else:
        why = f"it is a {type(content).__name__}"
    if found:
        why += f"; several of them are state dicts: {', '.join(map(_shown, found[:8]))}"
    return InputError(
        f"{path}: no state dict in it",
        why=why,
        fix="save one with torch.save({'state_dict': model.state_dict()}, 'weights.pth')",
        code="checkpoint-no-weights",
    )
