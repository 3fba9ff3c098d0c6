"""Opening what a command's options name: network, data, statistics; and saying what was found."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from seprune.checkpoint import is_pruned_folder
from seprune.cli import console
from seprune.errors import UsageError
from seprune.export.pruned_model import read_architecture
from seprune.models import ModelLoader
from seprune.models.hub import HubAccess, HubRepo, is_hub
from seprune.models.usercode import is_code
from seprune.pipeline import inputs
from seprune.pipeline.context import Context, Runtime
from seprune.pipeline.network import LoadedNetwork, open_network, saved_folder
from seprune.recipe import CommandRecipe, Recipe
from seprune.recipe.sections import ModelSection
from seprune.runtime.text import shell_word
from seprune.statistics import GateStatistics, fingerprint

if TYPE_CHECKING:
    from seprune.cli.options import NetworkOptions
    from seprune.data import Data
    from seprune.data.dataset import Part


def permission(network: NetworkOptions) -> ModelLoader:
    """What `--allow-code` and `--allow-pickle` permit."""
    section = ModelSection(name=network.model, checkpoint=network.checkpoint)
    return loader(network.allow_code, section, pickles=network.allow_pickle)


def loader(allow_code: bool, model: ModelSection, *, pickles: bool = False) -> ModelLoader:
    """What `--allow-code` permits: the file that MODEL names, or its folder, here or on a Hub."""
    if not allow_code:
        return ModelLoader(pickles=pickles)
    name, asking = model.name, HubAccess()
    folder: Path | None = Path(name)
    if is_hub(name):
        folder = saved_folder(model)
        asking = HubAccess(fetched=frozenset({str(HubRepo.of(name))}) if folder else frozenset())
    if folder is not None and is_pruned_folder(folder):
        name = read_architecture(folder).name
    allowed = ModelLoader.allowing(*filter(is_code, [name]), pickles=pickles)
    return replace(allowed, hub=asking)


def network_of_run(run: str, command: str) -> Path:
    """The network of a run folder: the fine-tuned one, if there is just one; or a network itself.

    Raises:
        UsageError: it holds several; one is named for `command`.
    """
    folder = Path(run)
    if (folder / "config.json").is_file() or not folder.is_dir():
        return folder
    for name in ("finetuned", "pruned"):
        found = [p.parent for p in sorted(folder.rglob(f"{name}/config.json"))]
        if len(found) > 1:
            more = f" and {len(found) - 5} more" if len(found) > 5 else ""
            raise UsageError(
                f"{run}: holds {len(found)} networks",
                why=", ".join(str(p.relative_to(folder)) for p in found[:5]) + more,
                fix=f"seprune {command} {shell_word(found[0])} ...",
            )
        if found:
            return found[0]
    return folder


def network_and_data(
    recipe: Recipe,
    *,
    loader: ModelLoader,
    labelled: bool = True,
    glance: Collection[Part] = inputs.BOTH,
) -> tuple[LoadedNetwork, Data]:
    """Both, each at the other's size."""
    opened, data = inputs.open_both(
        recipe, loader=loader, labelled=labelled, glance=glance, track=console.track
    )
    _tell_notes(opened)
    for note in data.info.notes:
        console.tell(f"note: {note}")
    console.tell(f"preprocessing: {data.info.preprocessing}")
    return opened, data


def network(
    recipe: CommandRecipe,
    *,
    loader: ModelLoader,
    like: LoadedNetwork | None = None,
    quiet: bool = False,
) -> LoadedNetwork:
    """The network alone.

    Args:
        like: another one, in size and classes, where the recipe is silent.
        quiet: random weights need no remark, since nobody looks at them.
    """
    opened = open_network(
        recipe.model,
        shape=like.shape if like else None,
        classes=like.architecture.classes if like else None,
        seed=recipe.seed,
        loader=loader,
    )
    _tell_notes(opened, quiet=quiet)
    return opened


def statistics(path: Path | None, opened: LoadedNetwork) -> GateStatistics | None:
    """The statistics in a file, if they are of this very network."""
    if path is None:
        return None
    found = GateStatistics.load(path)
    found.require(model=fingerprint(opened.model))
    return found


def runtime(
    recipe: CommandRecipe, folder: Path | None = None, *, shared_machine: bool = False
) -> Runtime:
    """Where the work is done; says so if nobody chose it, or if a trial was needed to know.

    Args:
        folder: of a run, whose earlier choice of threads stands.
    """
    found = Runtime.of(recipe, folder, track=console.track, shared_machine=shared_machine)
    if found.device.type == "cpu" and recipe.device == "auto":
        console.tell("note: there is no GPU here, so device auto is the CPU")
    if found.threads is not None and found.threads.rates:
        console.tell(f"note: {found.threads}")
    return found


def context(
    recipe: CommandRecipe,
    *,
    loader: ModelLoader,
    labelled: bool = True,
    quiet: bool = False,
    glance: Collection[Part] = inputs.BOTH,
) -> Context:
    """Where a command's work is done, its network, and its data if it has any.

    Args:
        labelled: whether the command looks at labels.
        glance: parts of the data that the command reads as a whole, but not at once.
        quiet: random weights need no remark, since nobody looks at them.
    """
    place = runtime(recipe)
    if isinstance(recipe, Recipe):
        opened = network_and_data(recipe, loader=loader, labelled=labelled, glance=glance)
        return Context(*opened, place)
    return Context(network(recipe, loader=loader, quiet=quiet), None, place)


def _tell_notes(opened: LoadedNetwork, *, quiet: bool = False) -> None:
    for note in opened.notes:
        console.tell(f"note: {note}")
    if opened.checkpoint is not None:
        return
    zoo, _, rest = opened.architecture.name.partition("/")
    named = zoo in ("timm", "torchvision") and "." in rest
    if named or not quiet:
        console.tell("note: no checkpoint is given, so the weights are random")
    if named:
        console.tell(f"note: {rest} names weights, which only --pretrained loads")
