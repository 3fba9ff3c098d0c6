"""Opening what a command's options name: network, data, statistics; and saying what was found."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from seprune.checkpoint import is_pruned_folder
from seprune.cli import console
from seprune.export.pruned_model import read_architecture
from seprune.models import ModelLoader
from seprune.models.usercode import is_code
from seprune.pipeline import inputs as subjects
from seprune.pipeline.inputs import Subject
from seprune.pipeline.run_folder import kept_threads
from seprune.runtime.distributed import first, join, resolve_device
from seprune.runtime.threads import choose_threads, use_threads
from seprune.statistics import GateStatistics, fingerprint

if TYPE_CHECKING:
    from seprune.recipe import Recipe


def loader(allow_code: bool, model: str) -> ModelLoader:
    """What `--allow-code` permits: the one file that MODEL names, or that its folder names."""
    if not allow_code:
        return ModelLoader()
    if is_pruned_folder(Path(model)):
        model = read_architecture(Path(model)).name
    return ModelLoader.allowing(model) if is_code(model) else ModelLoader()


def network_and_data(recipe: Recipe, *, loader: ModelLoader) -> tuple[Subject, Any]:
    """Both, each at the other's size; under `torchrun` the processes join."""
    join(resolve_device(recipe.device))
    tell_device(recipe)
    settle_threads(recipe)
    subject, found = subjects.open_both(recipe, loader=loader, track=console.track)
    _say(subject)
    for note in found.info.notes:
        console.tell(f"note: {note}")
    return subject, found


def network(
    recipe: Recipe, *, loader: ModelLoader, like: Subject | None = None, quiet: bool = False
) -> Subject:
    """The network alone.

    Args:
        like: another one, in size and classes, where the recipe is silent.
        quiet: random weights need no remark, since nobody looks at them.
    """
    subject = subjects.open_subject(
        recipe.model,
        shape=like.shape if like else None,
        classes=like.architecture.classes if like else None,
        seed=recipe.seed,
        loader=loader,
    )
    _say(subject, quiet=quiet)
    return subject


def statistics(path: Path | None, subject: Subject) -> GateStatistics | None:
    """The statistics in a file, if they are of this very network."""
    if path is None:
        return None
    held = GateStatistics.load(path)
    held.require(model=fingerprint(subject.model))
    return held


def settle_threads(recipe: Recipe, folder: Path | None = None) -> None:
    """Choose how many threads this process works with, and say so where a trial was needed.

    Args:
        folder: of a run, whose earlier choice stands.
    """
    choice = first(lambda: choose_threads(recipe.threads, kept=kept_threads(folder)))
    use_threads(choice)
    if choice.rates:
        console.tell(f"note: {choice}")


def tell_device(recipe: Recipe) -> None:
    """Say where the work is done if nobody chose it and it is not the fastest place."""
    if resolve_device(recipe.device).type == "cpu" and recipe.device == "auto":
        console.tell("note: there is no GPU here, so device auto is the CPU")


def _say(subject: Subject, *, quiet: bool = False) -> None:
    for note in subject.notes:
        console.tell(f"note: {note}")
    if subject.checkpoint is None and not quiet:
        console.tell("note: no checkpoint is given, so the weights are random")
