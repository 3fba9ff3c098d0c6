"""The story: run(recipe) -> Report. Each stage counts once the journal has its commit line.

Under `torchrun` every process tells the whole story; what is decided or written is so by the first
of them alone (`first`), and the others wait for what it says.

`story` has the stages in order, `subject` opens the network and the data, `bench` is what lies
ready for work on them, `collection` and `steps` do it on plain objects, `reporting` puts the
numbers together.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from seprune.importance import criterion
from seprune.models import NO_CODE, ModelLoader
from seprune.pipeline.run_folder import RunFolder, kept_threads, open_run
from seprune.pipeline.runner import Story
from seprune.pipeline.stage_cache import Sharing
from seprune.recipe import Recipe, dump_recipe
from seprune.report import Report
from seprune.runtime.distributed import first, join, resolve_device, united
from seprune.runtime.progress import Track, silent
from seprune.runtime.threads import choose_threads, use_threads, used_threads


def run(
    recipe: Recipe,
    out: Path,
    *,
    track: Track = silent,
    loader: ModelLoader = NO_CODE,
    command: str = "",
    sharing: Sharing | None = None,
) -> Report:
    """Carry out `recipe` in the folder `out`; a run that was stopped goes on from its last stage.

    Args:
        sharing: with the runs that it has stages in common with.

    Raises:
        SepruneError: whatever a stage finds wrong; earlier stages stay.
    """
    # an unknown name or a device that is not there costs nobody an hour of training
    criterion(recipe.importance.criterion)
    join(resolve_device(recipe.device))
    if used_threads() is None or recipe.threads != "auto":
        kept = kept_threads(out)
        use_threads(first(lambda: choose_threads(recipe.threads, kept=kept)))
    with united(), _held(out, recipe) as folder:
        story = Story(recipe, folder, track, loader, sharing)
        story.tell()
        return story.report(command or f"seprune run RECIPE --out {out}")


@contextmanager
def _held(out: Path, recipe: Recipe) -> Iterator[RunFolder]:
    """The run folder; of several processes the first one locks it and writes in it."""
    with ExitStack() as stack:
        yield first(lambda: stack.enter_context(open_run(out, dump_recipe(recipe))))
