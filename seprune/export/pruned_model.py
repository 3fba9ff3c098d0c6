"""Pruned models on disk: config.json + model.safetensors + plan.json + SHA256SUMS, no pickle."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
from torch import nn

from seprune.checkpoint import check_values, read_safetensors
from seprune.errors import InputError
from seprune.export.architecture import Architecture, readable, rebuilt
from seprune.export.hub import pushed
from seprune.models import NO_CODE, ModelLoader
from seprune.models.hub import is_hub
from seprune.models.preprocessing import (
    Preprocessing,
    TrainedFor,
    remember_training,
    trained_for,
)
from seprune.pruning.plan import PruningPlan
from seprune.pruning.prune import tied
from seprune.runtime.checksums import SUMS, check_sums
from seprune.runtime.files import Fill, bytes_of, json_text, tensors_of, write_folder
from seprune.runtime.reading import read_json
from seprune.runtime.transaction import settle, undisturbed
from seprune.runtime.typed import typed, within

FORMAT = 1
_AGAIN = "copy the folder again, or run the stage that wrote it again"
_Classes = Annotated[int, within(1, 10**6)]
_Side = Annotated[int, within(1, 10**5)]
_Plans = Annotated[int, within(0, 1000)]
MOST_VALUES = 1 << 26  # of one image: 8,192 x 8,192
CONFIG, WEIGHTS, PLANS = "config.json", "model.safetensors", "plan.json"


def save(
    model: nn.Module,
    folder: Path | str,
    architecture: Architecture | None = None,
    *,
    about: Mapping[str, Any] | None = None,
    beside: Mapping[str, Fill] | None = None,
) -> None:
    """Write `model` to `folder`: all of it, or what was there before.

    Args:
        architecture: how the network is built again. A network that `build` or `load` made, or a
            pruned or fine-tuned copy of one, knows that itself.
        about: what else `config.json` should say; JSON types. What the network was trained for
            (preprocessing, task, labels) it knows itself.
        beside: other files that belong to it.

    Raises:
        EnvironmentFault: no space or no permission.
        InputError: weights that are not finite, or a network that `load` could not read back.
    """
    folder = Path(folder)
    tensors = _tensors(model)
    architecture = readable(model, architecture, tensors)
    size = sum(t.numel() * t.element_size() for t in tensors.values())
    config = json_text(_config(architecture, _trained_for(model) | dict(about or {})))
    plans = {_plan_name(n): bytes_of(p.dumps().encode()) for n, p in enumerate(architecture.plans)}
    parts = {WEIGHTS: tensors_of(tensors, {"format": "pt"}), **plans, **(beside or {})}
    write_folder(folder, {**parts, CONFIG: bytes_of(config.encode())}, need=size + 100_000)


def load(folder: Path | str, *, device: str = "cpu", loader: ModelLoader = NO_CODE) -> nn.Module:
    """The network in `folder`: built on the meta device, cut by its plans, loaded strictly.

    Args:
        folder: also `hf-hub:ORG/NAME`, which is downloaded into the cache of the Hub's library.

    Raises:
        InputError: not such a folder, a file that is damaged, or written by a newer version.
    """
    place = pushed(str(folder), loader.hub) if is_hub(str(folder)) else Path(folder)
    return undisturbed(place, SUMS, partial(_load, place, device, loader))


def _load(folder: Path, device: str, loader: ModelLoader) -> nn.Module:
    architecture = read_architecture(folder)
    try:
        # copies: the file's own memory is not aligned, and kernels then round differently
        read = read_safetensors(folder / WEIGHTS)
        tensors = {n: t.clone().to(device) for n, t in read.items()}
    except (OSError, InputError) as error:
        raise InputError(
            f"{folder / WEIGHTS}: cannot be read",
            why=getattr(error, "why", "") or str(error),
            fix="save the model again, or copy the folder again",
            code="damaged",
        ) from error
    model = rebuilt(architecture, loader=loader)
    _fill(model, tensors, folder)
    if _unfilled(model):  # tensors that only a real build computes (anchors, index tables)
        model = rebuilt(architecture, loader=loader, device="cpu")
        _fill(model, tensors, folder)
    remember_training(model, read_trained_for(folder))
    return model.to(device).eval()


def read_architecture(folder: Path | str) -> Architecture:
    """What `config.json` and the plans of a folder say, once its hashes are found right."""
    return undisturbed(Path(folder), SUMS, partial(_read_architecture, Path(folder)))


def _read_architecture(folder: Path) -> Architecture:
    source, config = f"{folder / CONFIG}: seprune", read_config(folder)
    entries = typed(_Entries, config["seprune"], source=source, fix=_AGAIN, code="damaged")
    names = [_plan_name(number) for number in range(entries.plans)]
    wrong = check_sums(folder, need=[CONFIG, WEIGHTS, *names])
    if wrong:
        raise InputError(
            f"{folder}: {', '.join(wrong)} changed or missing since seprune wrote it",
            why="the hashes in SHA256SUMS do not match",
            fix=_AGAIN,
            code="damaged",
        )
    plans = tuple(PruningPlan.load(folder / name) for name in names)
    return Architecture(entries.model, entries.classes, entries.input, entries.args, plans)


@dataclass(frozen=True)
class _Entries:
    """What `config.json` says of a network; whoever wrote it may have meant harm."""

    model: str
    classes: _Classes | None = None
    input: tuple[_Side, _Side, _Side] | None = None
    args: dict[str, Any] = field(default_factory=dict)
    plans: _Plans = 0

    def __post_init__(self) -> None:
        if self.input is not None and math.prod(self.input) > MOST_VALUES:
            raise ValueError(f"input: more than {MOST_VALUES:,} values")
        if named := {"name", "classes", "input", "allow_code"} & set(self.args):
            raise ValueError(f"args: {min(named)!r} is no argument of a network")


@dataclass(frozen=True)
class _Purpose:
    """What `config.json` says that the weights were trained for."""

    task: str | None = None
    labels: tuple[str, ...] = ()
    base_model: str | None = None
    metrics: dict[str, float] | None = None


def read_config(folder: Path | str) -> dict[str, Any]:
    """`config.json` of a folder that seprune wrote."""
    path = Path(folder) / CONFIG
    settle(path.parent)
    config = read_json(path)
    if not isinstance(config, dict) or not isinstance(config.get("seprune"), dict):
        raise InputError(
            f"{path}: not written by seprune",
            why="it has no 'seprune' entry",
            fix="give a folder that `seprune prune --out` wrote",
            code="not-ours",
        )
    if config["seprune"].get("format") != FORMAT:
        raise InputError(
            f"{path}: folder format {config['seprune'].get('format')}, this seprune reads {FORMAT}",
            why="a newer version of seprune wrote it",
            fix="upgrade seprune: pip install -U seprune",
            code="newer",
        )
    return config


def _config(architecture: Architecture, about: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "architecture": architecture.name,
        "num_classes": architecture.classes,
        "library_name": "seprune",
        "seprune": {
            "format": FORMAT,
            "model": architecture.name,
            "classes": architecture.classes,
            "input": list(architecture.input) if architecture.input else None,
            "args": dict(architecture.args or {}),
            "plans": len(architecture.plans),
        },
        **about,
    }


def _trained_for(model: nn.Module) -> dict[str, Any]:
    known = trained_for(model)
    made = known.preprocessing.plain() if known.preprocessing else None
    if made is not None:
        del made["source"]  # a path perhaps: the same run in another folder writes the same file
    entries = {"preprocessing": made, "task": known.task, "labels": list(known.labels) or None,
               "base_model": known.base_model}  # fmt: skip
    return {name: value for name, value in entries.items() if value is not None}


def read_trained_for(folder: Path) -> TrainedFor:
    """What `config.json` of a folder says that its weights were trained for.

    Raises:
        InputError: it does not hold what seprune writes.
    """
    config, path = read_config(folder), folder / CONFIG
    found = typed(_Purpose, config, source=str(path), fix=_AGAIN, code="damaged")
    given = config.get("preprocessing")
    made = None if given is None else Preprocessing.of(given, where=f"{path}: preprocessing")
    made = made and replace(made, source=str(folder))
    return TrainedFor(made, found.task, found.labels, found.base_model)


def read_metrics(folder: Path) -> dict[str, float]:
    """What was measured of the network in a folder when it was written, as fractions.

    Raises:
        InputError: anything else is in its place.
    """
    path = folder / CONFIG
    found = typed(_Purpose, read_config(folder), source=str(path), fix=_AGAIN, code="damaged")
    return found.metrics or {}


def _plan_name(number: int) -> str:
    return PLANS if number == 0 else f"plan-{number + 1}.json"


def _tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    """Parameters and all buffers as safetensors takes them: contiguous, and tied ones apart."""
    named = {**dict(model.named_buffers()), **model.state_dict()}
    tensors = {n: t.detach().cpu().contiguous() for n, t in named.items()}
    bad = [n for n, t in tensors.items() if t.is_floating_point() and not bool(t.isfinite().all())]
    if bad:
        raise InputError(
            f"the model is not saved: {len(bad)} tensors hold NaN or infinities",
            why=f"the first is {bad[0]}",
            fix="go back to the last good weights",
            code="nonfinite",
        )
    seen: set[int] = set()
    for name, tensor in tensors.items():
        if tensor.data_ptr() in seen:
            tensors[name] = tensor.clone()
        seen.add(tensor.data_ptr())
    return tensors


def _fill(model: nn.Module, tensors: dict[str, torch.Tensor], folder: Path) -> None:
    named = {**dict(model.named_buffers()), **model.state_dict()}
    wrong = [n for n, own in named.items() if n not in tensors or not _alike(tensors[n], own)]
    extra = sorted(set(tensors) - set(named))
    if wrong or extra:
        raise InputError(
            f"{folder}: the weights do not fit the network that its plan makes",
            why=f"{len(wrong)} tensors missing or of another shape or kind, {len(extra)} "
            f"not known; first: {(wrong or extra)[0]}",
            fix="copy the folder again, or install the versions named in its config.json",
            code="mismatch",
        )
    check_values(model, tensors, path=folder / WEIGHTS)
    state = model.state_dict()
    with tied(model):
        model.load_state_dict({n: tensors[n] for n in state}, assign=True)
    for name in set(named) - set(state):  # buffers that a state dict leaves out
        owner, _, leaf = name.rpartition(".")
        model.get_submodule(owner)._buffers[leaf] = tensors[name]


def _alike(found: torch.Tensor, own: torch.Tensor) -> bool:
    """Whether one can stand for the other; floats may be of another precision."""
    same = found.dtype == own.dtype or (found.is_floating_point() and own.is_floating_point())
    return same and found.shape == own.shape


def _unfilled(model: nn.Module) -> bool:
    """Whether a module keeps a tensor outside of parameters and buffers."""
    values = (v for m in model.modules() for v in vars(m).values())
    flat = (t for v in values for t in (v if isinstance(v, (list, tuple)) else [v]))
    return any(isinstance(t, torch.Tensor) and t.is_meta for t in flat)
