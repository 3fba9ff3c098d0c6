"""A recipe carried out: its stages, in order, each finished once the journal has its line.

Under `torchrun` every process carries out every stage; what is decided or written is so by the
first of them alone (`first`), and the others wait for the outcome.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path

from seprune.data import Data
from seprune.export import pruned_model
from seprune.importance import criterion
from seprune.importance.ablation import Sensitivity
from seprune.models import NO_CODE, ModelLoader
from seprune.pipeline import run_stages
from seprune.pipeline.budget_result import BudgetResult
from seprune.pipeline.context import Context, Runtime
from seprune.pipeline.inputs import open_both
from seprune.pipeline.network import LoadedNetwork
from seprune.pipeline.reporting import RECOVERED, RunResult, measurement
from seprune.pipeline.run_folder import RunFolder, open_run
from seprune.pipeline.run_stages import Workspace
from seprune.pipeline.runner import Runner
from seprune.pipeline.settings import CutSettings
from seprune.pipeline.stage_cache import StageCache
from seprune.pruning.limits import Budget
from seprune.recipe import Recipe, dump_recipe
from seprune.report import Measurement, Report
from seprune.report.measurement import read as read_report
from seprune.runtime.distributed import first, united
from seprune.runtime.text import shell_word
from seprune.statistics import GateStatistics


def run(
    recipe: Recipe,
    out: Path,
    *,
    runtime: Runtime | None = None,
    loader: ModelLoader = NO_CODE,
    command: str = "",
    cache: StageCache | None = None,
) -> Report:
    """Carry out `recipe` in the folder `out`; a run that was stopped goes on from its last stage.

    Args:
        runtime: where the work is done. None: as the recipe says.
        cache: of the stages that it has in common with other runs.

    Raises:
        SepruneError: whatever a stage finds wrong; earlier stages stay.
    """
    # an unknown name or a device that is not there costs nobody an hour of training
    criterion(recipe.importance.criterion)
    runtime = runtime or Runtime.of(recipe, out)
    with united(), _locked(out, recipe) as folder:
        runner = Runner(folder, cache)
        given, data = open_both(recipe, loader=loader, track=runtime.track)
        network = _trained(recipe, given, data, runner, runtime, loader)
        context = Context(network, data, runtime)
        settings = CutSettings.of(recipe)
        work = Workspace(folder.path, context, settings, recipe.model, loader)
        command = command or f"seprune run RECIPE --out {shell_word(out)}"
        return _carry_out(recipe, work, runner, command)


@contextmanager
def _locked(out: Path, recipe: Recipe) -> Iterator[RunFolder]:
    """The run folder; of several processes the first one locks it and writes in it."""
    with ExitStack() as stack:
        yield first(lambda: stack.enter_context(open_run(out, dump_recipe(recipe))))


def _trained(
    recipe: Recipe,
    given: LoadedNetwork,
    data: Data,
    runner: Runner,
    runtime: Runtime,
    loader: ModelLoader,
) -> LoadedNetwork:
    """The trained network: from the checkpoint, or trained here."""
    if given.digest is not None or recipe.train is None:
        return given
    folder = runner.folder.path
    record = runner(run_stages.train(folder, given, data, recipe, recipe.train, runtime))
    model = pruned_model.load(folder / run_stages.TRAINED, loader=loader)
    return replace(given, model=model, checkpoint=None, digest=record.key)


def _carry_out(recipe: Recipe, work: Workspace, runner: Runner, command: str) -> Report:
    """Every stage after the training, in order."""
    base = runner(run_stages.baseline(work))
    # mended if damaged, though all that was made of them may be finished
    known = _statistics(work, runner)
    losses = _sensitivity(work, runner, known)
    measurements, results = [measurement("baseline", None, base.facts)], []
    budgets = recipe.plan.budgets()
    for budget in budgets:
        home = work.folder if len(budgets) == 1 else work.folder / str(budget).replace(" ", "-")
        found, of_budget = _one_budget(recipe, work, runner, budget, home, (known, losses))
        measurements += found
        results.append(of_budget)
    result = RunResult(
        recipe=recipe,
        command=command,
        context=work.context,
        statistics=known,
        sensitivity=losses,
        measurements=tuple(measurements),
        budgets=tuple(results),
    )
    runner(run_stages.report(work, result, runner))
    return read_report(work.folder)


def _statistics(work: Workspace, runner: Runner) -> GateStatistics | None:
    """What the gates do, where the criterion looks at gates."""
    if not work.settings.needs_statistics:
        return None
    runner(run_stages.statistics(work))
    return GateStatistics.load(work.folder / run_stages.STATISTICS)


def _sensitivity(
    work: Workspace, runner: Runner, known: GateStatistics | None
) -> Sensitivity | None:
    """What the dense network loses without a part of one group, where it is asked for."""
    if not work.settings.needs_sensitivity:
        return None
    runner(run_stages.sensitivity(work, known))
    return Sensitivity.load(work.folder / run_stages.SENSITIVITY)


def _one_budget(
    recipe: Recipe,
    work: Workspace,
    runner: Runner,
    budget: Budget,
    home: Path,
    known: tuple[GateStatistics | None, Sensitivity | None],
) -> tuple[list[Measurement], BudgetResult]:
    """Plan, prune, fine-tune and measure for one budget."""
    label = str(budget)
    made = runner(run_stages.prune(work, runner, budget, home, known))
    measurements = [measurement("pruned", label, made.facts["pruned"])]
    if (stage := RECOVERED.get(recipe.prune.recover)) is not None:
        measurements.append(measurement(stage, label, made.facts["recovered"]))
    networks = {measurements[-1].stage: home / run_stages.PRUNED}
    section, last, tuning = recipe.finetune, recipe.report.last_epoch, {}
    if section.epochs or section.recalibrate:
        tuned = runner(run_stages.tuning(work, section, home, label, made.key, last))
        networks["fine-tuned"] = home / run_stages.FINETUNED
        if last:
            measurements.append(measurement("last epoch", label, tuned.facts["last"]))
        measurements.append(measurement("fine-tuned", label, tuned.facts))
        tuning = tuned.facts["tuning"]
    result = BudgetResult.read(label, home, made.facts, networks)
    return measurements, replace(result, tuning=tuning)
