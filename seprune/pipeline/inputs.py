"""What a recipe is about: the network and the data, each at the other's size."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from seprune.data import Data, DataInfo, DataSettings, open_data
from seprune.data.dataset import Part
from seprune.errors import InputError
from seprune.graph.trace import record
from seprune.measure.metrics import logits_of
from seprune.models import NO_CODE, ModelLoader
from seprune.models.hub import is_hub
from seprune.models.preprocessing import (
    Preprocessing,
    TrainedFor,
    preprocessing_in,
    remember_training,
)
from seprune.pipeline.network import LoadedNetwork, open_network, outputs_of, saved_folder
from seprune.recipe.sections import DataSection, ModelSection, Recipe
from seprune.runtime.inference import evaluating
from seprune.runtime.progress import Track, silent
from seprune.tasks.batches import primary

BOTH: tuple[Part, ...] = ("train", "val")


def open_both(
    recipe: Recipe,
    *,
    loader: ModelLoader = NO_CODE,
    labelled: bool = True,
    glance: Collection[Part] = BOTH,
    track: Track = silent,
) -> tuple[LoadedNetwork, Data]:
    """Network and data of a recipe, each at the other's size; the network has seen one image.

    What trained weights say of images goes before what is usual for such data, and what the recipe
    says before both. The network knows from then on what it was used with. A network that is built
    without a classifier (`model.args.num_classes` 0) has the task `embedding`.

    Args:
        labelled: whether labels are used, so that the network has to have an output for each.
        glance: parts of the data whose every file is looked at first, as of `open_data`.

    Raises:
        InputError: the network does not take these images; names the layer.
    """
    section = recipe.model
    task = recipe.task or ("embedding" if outputs_of(section) == 0 else None)
    if section.pretrained or is_hub(section.name) or saved_folder(section) is not None:
        network = open_network(section, loader=loader)
        known = network.trained_for
        bare = (network.architecture.args or {}).get("num_classes") == 0
        used = task or ("embedding" if bare else known.task)
        data = open_section(
            recipe.data, network.shape, task=used, known=known, glance=glance, track=track
        )
    else:
        known = TrainedFor(_beside(section))
        data = open_section(
            recipe.data, section.input, task=task, known=known, glance=glance, track=track
        )
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
    used = TrainedFor(info.preprocessing, info.task, info.classes, known.base_model)
    if outputs in (None, len(info.classes)):
        _require_order(network, info)
        if known.labels and set(known.labels) != set(info.classes):
            note = (
                f"the network's classes are called {_few(known.labels)}, those of the data "
                f"{_few(info.classes)}: they are taken in this order"
            )
            network = replace(network, notes=(*network.notes, note))
    elif labelled:
        count = len(info.classes)
        raise InputError(
            f"the network has {outputs} outputs, the data have {count} classes",
            why=f"{network.architecture.name} against {info.source}",
            fix="use the data it was trained for, or "
            + (
                f"--classes {count}"
                if network.checkpoint is None
                else f"weights that were trained for {count} classes"
            ),
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


def _few(names: Sequence[str]) -> str:
    shown = ", ".join(names[:3])
    return shown + (", ..." if len(names) > 3 else "")


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
    glance: Collection[Part] = BOTH,
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
    return open_data(section.source, settings, glance=glance, track=track)


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


def data_digests(data: Data) -> dict[str, str]:
    """Hashes that keep statistics of different data or preprocessing apart."""
    info = data.info
    how = repr(replace(info.preprocessing, source=""))
    return {
        "data": info.fingerprint,
        "preprocessing": hashlib.sha256(how.encode()).hexdigest(),
    }
