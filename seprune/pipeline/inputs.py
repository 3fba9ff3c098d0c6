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
from seprune.data import Data, DataInfo, DataSettings, open_data
from seprune.errors import InputError, UsageError
from seprune.export import pruned_model
from seprune.export.architecture import Architecture
from seprune.graph.trace import record
from seprune.measure.metrics import logits_of
from seprune.models import NO_CODE, ModelLoader
from seprune.models.preprocessing import (
    Preprocessing,
    TrainedFor,
    preprocessing_in,
    remember_training,
    trained_for,
)
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

    @property
    def trained_for(self) -> TrainedFor:
        """What its weights were trained for, as far as it is known."""
        return trained_for(self.model)

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

    What trained weights say of images goes before what is usual for such data, and what the recipe
    says before both. The network knows from then on what it was used with. A network that is built
    without a classifier (`model.args.num_classes` 0) has the task `embedding`.

    Args:
        labelled: whether labels are used, so that the network has to have an output for each.

    Raises:
        InputError: the network does not take these images; names the layer.
    """
    section = recipe.model
    task = recipe.task or ("embedding" if outputs_of(section) == 0 else None)
    if _folder(section) is not None:
        network = open_network(section, loader=loader)
        known = network.trained_for
        bare = (network.architecture.args or {}).get("num_classes") == 0
        used = task or ("embedding" if bare else known.task)
        data = open_section(recipe.data, network.shape, task=used, known=known, track=track)
    else:
        known = TrainedFor(_beside(section))
        data = open_section(recipe.data, section.input, task=task, known=known, track=track)
        classes = None if data.info.task == "embedding" else len(data.info.classes)
        shape = data.info.preprocessing.shape
        network = open_network(
            section, shape=shape, classes=classes, seed=recipe.seed, loader=loader
        )
    return _matched(network, data, labelled=labelled), data


def _matched(network: LoadedNetwork, data: Data, *, labelled: bool) -> LoadedNetwork:
    """The network, which knows what it is used with; refuses data with other classes."""
    info, known = data.info, network.trained_for
    outputs = _width(info.task, run_once(network.model, network.example(1)))
    if info.task == "detection" and (network.architecture.classes or 0) < len(info.classes):
        outputs = network.architecture.classes  # labels beyond it would be found in training
    used = TrainedFor(info.preprocessing, info.task, info.classes, known.metrics)
    if outputs in (None, len(info.classes)):
        _require_order(network, info)
    elif labelled:
        raise InputError(
            f"the network has {outputs} outputs, the data have {len(info.classes)} classes",
            why=f"{network.architecture.name} against {info.source}",
            fix=f"use the data it was trained for, or --classes {len(info.classes)}",
            code="classes",
        )
    else:
        note = (
            f"the network has {outputs} outputs and the data have {len(info.classes)} "
            "classes, so the labels are not used"
        )
        network = replace(network, notes=(*network.notes, note))
        used = replace(used, labels=known.labels)
    remember_training(network.model, used)
    return network


def _beside(section: ModelSection) -> Preprocessing | None:
    """What the folder of a checkpoint says of images."""
    path = Path(section.checkpoint or "")
    return preprocessing_in(path) if section.checkpoint and path.is_dir() else None


def _require_order(network: LoadedNetwork, info: DataInfo) -> None:
    """Refuse data whose classes have the network's names in another order."""
    known = network.trained_for.labels
    if not known or known == info.classes or set(known) != set(info.classes):
        return
    place = next(n for n, pair in enumerate(zip(known, info.classes)) if pair[0] != pair[1])
    raise InputError(
        f"{info.source}: its classes are in another order than the network's",
        why=f"output {place} is {known[place]!r} in {network.architecture.name}, and "
        f"{info.classes[place]!r} in the data",
        fix="name the class folders so that they sort in the network's order",
        code="class-order",
    )


def open_section(
    section: DataSection,
    shape: tuple[int, int, int] | None,
    *,
    task: str | None = None,
    known: TrainedFor | None = None,
    track: Track = silent,
) -> Data:
    """The data of a recipe's data section.

    Args:
        shape: of the input; None: as the weights or the images say.
        known: what the weights were trained for.
    """
    given = section.model_dump(exclude={"source"})
    asked = known.preprocessing if known else None
    settings = DataSettings(input=shape, task=task, preprocessing=asked, **given)
    return open_data(section.source, settings, track=track)


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
        return _from_folder(folder, section.input, shape, loader=loader)
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
    folder: Path,
    given: tuple[int, int, int] | None,
    shape: tuple[int, int, int] | None,
    *,
    loader: ModelLoader,
) -> LoadedNetwork:
    """A saved network, at the size that was asked for or its own; `shape` where it has none."""
    architecture = pruned_model.read_architecture(folder)
    model = pruned_model.load(folder, loader=loader)
    shape = given or architecture.input or shape or models.input_size(architecture.name, model)
    digest = sha256(folder / pruned_model.WEIGHTS)
    return LoadedNetwork(model, architecture, shape, str(folder), digest)


def data_digests(data: Data) -> dict[str, str]:
    """Hashes that keep statistics of different data or preprocessing apart."""
    info = data.info
    how = repr(replace(info.preprocessing, source=""))
    return {
        "data": info.fingerprint,
        "preprocessing": hashlib.sha256(how.encode()).hexdigest(),
    }
