"""Which network a model section means, and its trained weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from seprune import models
from seprune.checkpoint import apply_weights, is_pruned_folder, load_weights
from seprune.errors import InputError, UsageError
from seprune.export import pruned_model
from seprune.export.architecture import Architecture, rebuilt
from seprune.export.hub import pushed_folder
from seprune.models import NO_CODE, ModelLoader
from seprune.models.hub import HubRepo, is_hub, unusable
from seprune.models.preprocessing import (
    TrainedFor,
    remember_training,
    trained_for,
)
from seprune.models.pretrained import fetch_published
from seprune.models.usercode import is_code
from seprune.recipe.sections import ModelSection
from seprune.runtime.checksums import SUMS, sha256
from seprune.runtime.random_state import cpu_random
from seprune.runtime.transaction import undisturbed

# files of weights that another download would mend, were they not as a Hub promised
BROKEN = {f"checkpoint-{kind}" for kind in ("empty", "incomplete", "damaged", "not-weights")}
MOST_NUMBERS = 4  # of a network, for each byte of the file of its weights


@dataclass(frozen=True)
class LoadedNetwork:
    """A network on the CPU, how it is built again, and where its weights came from.

    `digest` is the SHA-256 of the weights file, None for random weights. `published` are metrics
    that came with the weights, as fractions.
    """

    model: nn.Module
    architecture: Architecture
    shape: tuple[int, int, int]
    checkpoint: str | None = None
    digest: str | None = None
    notes: tuple[str, ...] = ()
    published: Mapping[str, float] = field(default_factory=dict)

    @property
    def trained_for(self) -> TrainedFor:
        """What its weights were trained for, as far as it is known."""
        return trained_for(self.model)

    def example(self, batch: int = 2) -> Tensor:
        """Two images of noise, for tracing; the same ones every time."""
        generator = torch.Generator().manual_seed(0)
        return torch.rand(batch, *self.shape, generator=generator)


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
    folder = saved_folder(section, loader)
    if folder is not None:
        _check_folder(folder, section)
        network = _from_folder(folder, section.input, shape, loader=loader)
        known = network.trained_for
        if is_hub(section.name) and known.preprocessing:  # not the path in the cache
            how = replace(known.preprocessing, source=section.name)
            remember_training(network.model, replace(known, preprocessing=how))
        return network
    if section.pretrained or is_hub(section.name):
        return _published(section, shape, loader=loader)
    architecture = Architecture(section.name, classes, shape, dict(section.args))
    with cpu_random(seed):
        if is_code(section.name):  # the user's own, who may take the time
            model = loader.build(section.name, classes=classes, input=shape, **section.args)
        else:
            model = rebuilt(architecture, loader=loader, device="cpu")
    shape = shape or models.input_size(section.name, model)
    architecture = replace(architecture, input=shape)
    network = LoadedNetwork(model.eval(), architecture, shape)
    return network if section.checkpoint is None else with_weights(network, section)


def _published(
    section: ModelSection, shape: tuple[int, int, int] | None, *, loader: ModelLoader
) -> LoadedNetwork:
    """The network that published weights are for, with them."""
    copied = _copy_of_hub(section)
    theirs = section.checkpoint is None or copied is not None
    found = fetch_published(section.name, loader=loader, folder=copied, weights=theirs)
    known = found.trained_for.preprocessing
    shape = section.input or (known.shape if known else shape)
    classes = found.classes if outputs_of(section) is None else section.classes
    args = {**found.args, **section.args}
    architecture = Architecture(found.name, classes, shape, args)
    file = found.file or Path(section.checkpoint or "")
    model = rebuilt(architecture, loader=loader)
    _require_size(model, found.name, file)
    if any(parameter.is_meta for parameter in model.parameters()):
        model = rebuilt(architecture, loader=loader, device="cpu")
    shape = shape or models.input_size(found.name, model)
    remember_training(model, found.trained_for)
    network = LoadedNetwork(model.eval(), replace(architecture, input=shape), shape)
    try:
        made = _filled(network, file, section)
    except InputError as error:
        if copied is None and found.file and error.code in BROKEN and is_hub(section.name):
            raise unusable(section.name, file.parent, error) from error
        raise
    if found.file is None:  # weights of one's own
        return made
    return replace(made, checkpoint=found.origin, published=found.metrics)


def _require_size(model: nn.Module, name: str, file: Path) -> None:
    """Refuse a network that is far larger than the file of its weights, before it takes memory."""
    claimed = sum(t.numel() for t in model.state_dict().values())
    if claimed > MOST_NUMBERS * max(file.stat().st_size, 1 << 20):
        raise InputError(
            f"{file}: not the weights of {name}",
            why=f"the network that its configuration means has {claimed:,} numbers",
            fix="download the files again",
            code="checkpoint-mismatch",
        )


def _copy_of_hub(section: ModelSection) -> Path | None:
    """The folder that holds the files of a repository of a Hub, fetched elsewhere."""
    path = Path(section.checkpoint or "")
    if section.checkpoint and not path.exists():
        load_weights(path, weights=section.weights)  # names it, before anything is asked for
    return path if section.checkpoint and (path / "config.json").is_file() else None


def with_weights(network: LoadedNetwork, section: ModelSection) -> LoadedNetwork:
    """The network with the weights of the section's checkpoint."""
    return _filled(network, Path(section.checkpoint or ""), section)


def _filled(network: LoadedNetwork, path: Path, section: ModelSection) -> LoadedNetwork:
    """The network with the weights in a file."""
    weights = load_weights(path, weights=section.weights)
    notes = dict.fromkeys((*weights.notes, *apply_weights(network.model, weights, path=path)))
    return replace(network, checkpoint=str(path), digest=weights.sha256, notes=tuple(notes))


def saved_folder(section: ModelSection, loader: ModelLoader = NO_CODE) -> Path | None:
    """A folder that seprune wrote or pushed to a Hub, as the model or where a checkpoint is."""
    if is_hub(section.name):
        return pushed_folder(HubRepo.of(section.name, _copy_of_hub(section), loader.hub))
    for given in (section.checkpoint, section.name):
        if given and is_pruned_folder(Path(given)):
            return Path(given)
    if section.name.startswith((".", "/", "~")) and not section.name.partition(":")[0].endswith(
        ".py"
    ):
        raise InputError(
            f"{section.name}: not a folder that seprune wrote",
            why="it lacks config.json with a 'seprune' entry, or model.safetensors"
            if Path(section.name).exists()
            else "there is no such folder",
            fix="give a folder that `seprune prune --out` wrote, or a name like timm/seresnet18",
            code="not-ours",
        )
    return None


def _check_folder(folder: Path, section: ModelSection) -> None:
    """Refuse a folder that holds another network than the section asks for."""
    own = pruned_model.read_architecture(folder)
    asked = section.name
    if is_hub(asked):
        return
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

    def read() -> tuple[Architecture, nn.Module, str, dict[str, float]]:
        model = pruned_model.load(folder, loader=loader)
        digest = sha256(folder / pruned_model.WEIGHTS)
        measured = pruned_model.read_metrics(folder)
        return pruned_model.read_architecture(folder), model, digest, measured

    architecture, model, digest, measured = undisturbed(folder, SUMS, read)
    shape = given or architecture.input or shape or models.input_size(architecture.name, model)
    return LoadedNetwork(model, architecture, shape, str(folder), digest, published=measured)
