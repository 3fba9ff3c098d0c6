"""What a recipe is about: the data, and the network with its trained weights."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from seprune import models
from seprune.checkpoint import apply_weights, is_pruned_folder, load_weights
from seprune.data import Data, DataSettings, open_data
from seprune.errors import InputError, UsageError
from seprune.export import pruned_model
from seprune.export.architecture import Architecture
from seprune.graph.trace import record
from seprune.measure.metrics import logits_of
from seprune.models import NO_CODE, ModelLoader
from seprune.recipe.sections import DataSection, ModelSection, Recipe
from seprune.runtime.files import sha256
from seprune.runtime.inference import evaluating
from seprune.runtime.progress import Track, silent
from seprune.tasks.batches import primary


@dataclass(frozen=True)
class LoadedNetwork:
    """A network on the CPU, how it is built again, and where its weights came from.

    `digest` is the SHA-256 of the weights file, None for random weights.
    """

    model: nn.Module
    architecture: Architecture
    shape: tuple[int, int, int]
    checkpoint: str | None = None
    digest: str | None = None
    notes: tuple[str, ...] = ()

    def example(self, batch: int = 2) -> Tensor:
        """Two images of noise, for tracing; the same ones every time."""
        generator = torch.Generator().manual_seed(0)
        return torch.rand(batch, *self.shape, generator=generator)


def open_both(
    recipe: Recipe,
    *,
    loader: ModelLoader = NO_CODE,
    labelled: bool = True,
    track: Track = silent,
) -> tuple[LoadedNetwork, Data]:
    """Network and data of a recipe, each at the other's size; the network has seen one image.

    A saved folder and `model.input` say how large images are, else the data do. A network that is
    built without a classifier (`model.args.num_classes` 0) has the task `embedding`.

    Args:
        labelled: whether labels are used, so that the network has to have an output for each.

    Raises:
        InputError: the network does not take these images; names the layer.
    """
    section = recipe.model
    task = recipe.task or ("embedding" if outputs_of(section) == 0 else None)
    is_folder = _folder(section) is not None
    if is_folder:
        network = open_network(section, loader=loader)
        args = network.architecture.args or {}
        task = task or ("embedding" if args.get("num_classes") == 0 else None)
        data = open_section(recipe.data, network.shape, task=task, track=track)
    else:
        data = open_section(recipe.data, section.input, task=task, track=track)
        info = data.info
        network = open_network(
            section,
            shape=info.input_shape,
            classes=None if info.task == "embedding" else len(info.classes),
            seed=recipe.seed,
            loader=loader,
        )
    outputs = _width(data.info.task, run_once(network.model, network.example(1)))
    if outputs not in (None, len(data.info.classes)):
        if not labelled:
            note = (
                f"the network has {outputs} outputs and the data have {len(data.info.classes)} "
                "classes, so the labels are not used"
            )
            return replace(network, notes=(*network.notes, note)), data
        raise InputError(
            f"the network has {outputs} outputs, the data have {len(data.info.classes)} classes",
            why=f"{network.architecture.name} against {data.info.source}",
            fix=f"use the data it was trained for, or --classes {len(data.info.classes)}",
            code="classes",
        )
    return network, data


def open_section(
    section: DataSection,
    shape: tuple[int, int, int] | None,
    *,
    task: str | None = None,
    track: Track = silent,
) -> Data:
    """The data of a recipe's data section, at one input size."""
    given = section.model_dump(exclude={"source"})
    return open_data(section.source, DataSettings(input=shape, task=task, **given), track=track)


def outputs_of(section: ModelSection) -> int | None:
    """The width of the last layer that `model.classes` or `model.args` ask for; 0: no classifier.

    Raises:
        UsageError: they contradict each other.
    """
    given = section.args.get("num_classes", section.args.get("classes"))
    if given is not None and section.classes not in (None, given):
        raise UsageError(
            f"model.classes is {section.classes}, model.args asks for {given}",
            why="both are the width of the last layer",
            fix=f"--classes {section.classes} without it in model.args",
        )
    return section.classes if given is None else given


def _width(task: str, outputs: Any) -> int | None:
    """How many classes, labels or numbers the outputs are for; None where they do not say."""
    if task == "classification":
        return logits_of(outputs).shape[-1]
    if task in ("detection", "embedding"):
        return None
    found = primary(outputs)
    return found.shape[1] if found.dim() > 1 else 1


def run_once(model: nn.Module, images: Tensor) -> Any:
    """What the model gives for these images; a failing forward is named like any other fault."""
    record(model, images)
    with evaluating(model), torch.no_grad():
        return model(images)


def open_network(
    section: ModelSection,
    *,
    shape: tuple[int, int, int] | None = None,
    classes: int | None = None,
    seed: int = 0,
    loader: ModelLoader = NO_CODE,
) -> LoadedNetwork:
    """The network of a recipe's model section, with its weights.

    Args:
        shape, classes: of the data, where the section does not say.
        seed: of the random weights, if there is no checkpoint.
    """
    shape = section.input or shape
    if outputs_of(section) is not None:  # in the arguments of the network, or here
        classes = section.classes
    folder = _folder(section)
    if folder is not None:
        _check_folder(folder, section)
        return _from_folder(folder, shape, loader=loader)
    with torch.random.fork_rng([]):
        torch.manual_seed(seed)
        model = loader.build(section.name, classes=classes, input=shape, **section.args)
    shape = shape or models.input_size(section.name, model)
    architecture = Architecture(section.name, classes, shape, dict(section.args))
    network = LoadedNetwork(model.eval(), architecture, shape)
    return network if section.checkpoint is None else with_weights(network, section)


def with_weights(network: LoadedNetwork, section: ModelSection) -> LoadedNetwork:
    """The network with the weights of the section's checkpoint."""
    path = Path(section.checkpoint or "")
    weights = load_weights(path, weights=section.weights)
    notes = dict.fromkeys((*weights.notes, *apply_weights(network.model, weights, path=path)))
    return replace(network, checkpoint=str(path), digest=weights.sha256, notes=tuple(notes))


def _folder(section: ModelSection) -> Path | None:
    """A folder that seprune wrote, given as the model or where a checkpoint is expected."""
    for given in (section.checkpoint, section.name):
        if given and is_pruned_folder(Path(given)):
            return Path(given)
    if section.name.startswith((".", "/", "~")) and not section.name.partition(":")[0].endswith(
        ".py"
    ):
        raise InputError(
            f"{section.name}: not a folder that seprune wrote",
            why="it lacks config.json with a 'seprune' entry, or model.safetensors",
            fix="give a folder that `seprune prune --out` wrote, or a name like timm/seresnet18",
            code="not-ours",
        )
    return None


def _check_folder(folder: Path, section: ModelSection) -> None:
    """Refuse a folder that holds another network than the section asks for."""
    own = pruned_model.read_architecture(folder)
    asked = section.name
    if is_pruned_folder(Path(asked)):
        asked = pruned_model.read_architecture(Path(asked)).name
    if _resolved(asked) != _resolved(own.name) or (section.args and section.args != own.args):
        raise InputError(
            f"{folder}: weights of another architecture",
            why=f"the folder holds {_spelled(own.name, own.args or {})}, "
            f"{_spelled(asked, section.args)} is asked for",
            fix=f"give the folder alone in the place of MODEL: {folder}",
            code="checkpoint-mismatch",
        )
    if section.classes and own.classes and section.classes != own.classes:
        raise InputError(
            f"{folder}: weights for {own.classes} classes, the model has {section.classes}",
            why=f"the folder holds {own.name} for {own.classes} classes",
            fix=f"--classes {own.classes}",
            code="checkpoint-classes",
        )


def _resolved(name: str) -> str:
    """A name of a network; FILE.py:FUNCTION however the path is spelled."""
    file, _, function = name.rpartition(":")
    return f"{Path(file).resolve()}:{function}" if file.endswith(".py") else name


def _spelled(name: str, args: Mapping[str, object]) -> str:
    return " ".join([name, *(f"{key}={value}" for key, value in args.items())])


def _from_folder(
    folder: Path, shape: tuple[int, int, int] | None, *, loader: ModelLoader
) -> LoadedNetwork:
    architecture = pruned_model.read_architecture(folder)
    model = pruned_model.load(folder, loader=loader)
    shape = architecture.input or shape or models.input_size(architecture.name, model)
    digest = sha256(folder / pruned_model.WEIGHTS)
    return LoadedNetwork(model, architecture, shape, str(folder), digest)


def data_digests(data: Data) -> dict[str, str]:
    """Hashes that keep statistics of different data or preprocessing apart."""
    info = data.info
    how = f"{info.input_shape} {info.mean} {info.std} {data.settings.crop}"
    return {
        "data": info.fingerprint,
        "preprocessing": hashlib.sha256(how.encode()).hexdigest(),
    }
