"""The stages of a run as values: what each depends on, what it does, what it leaves behind."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from seprune.data import Data
from seprune.export import pruned_model
from seprune.importance.ablation import Sensitivity
from seprune.models import ModelLoader
from seprune.pipeline import reporting, stages
from seprune.pipeline.budget_result import PLAN, SCORES, write_importance
from seprune.pipeline.collection import collect
from seprune.pipeline.context import Context, Runtime
from seprune.pipeline.inputs import data_digests
from seprune.pipeline.network import LoadedNetwork
from seprune.pipeline.run_folder import keep_state_of
from seprune.pipeline.runner import Runner
from seprune.pipeline.settings import CutSettings, finetune_settings
from seprune.pipeline.stage import BaselineFacts, FinetuneFacts, Output, PruneFacts, Stage
from seprune.pruning.limits import Budget
from seprune.recipe import sections
from seprune.recovery.finetune import METRICS, Teacher, finetune
from seprune.report import words
from seprune.runtime.checksums import SUMS
from seprune.runtime.distributed import first
from seprune.runtime.files import remove_folders, write_json
from seprune.statistics import GateStatistics
from seprune.statistics.result import FORMAT

SENSITIVITY = "sensitivity.json"
_UNFINISHED = "reconstructing-"
STATISTICS, TRAINED, PRUNED, FINETUNED = "statistics.safetensors", "trained", "pruned", "finetuned"


@dataclass(frozen=True)
class Workspace:
    """What all stages of a run are given: its folder, the dense network, data and settings."""

    folder: Path
    context: Context
    settings: CutSettings
    model: sections.ModelSection
    loader: ModelLoader

    def inputs(self, stage: str, *parts: Any, after: str = "") -> dict[str, Any]:
        """What a stage depends on: the network, the data, the seed, and these sections."""
        weights, data = self.context.network.digest, self.context.images()
        # nothing is drawn where trained weights are measured
        seed = None if stage == "baseline" and weights else self.settings.seed
        return _inputs(
            stage, self.model, data, weights=weights, seed=seed, parts=parts, after=after
        )

    def relative(self, *paths: Path) -> list[Path]:
        """Paths as the journal has them: relative to the run folder."""
        return [path.relative_to(self.folder) for path in paths]

    def saved(self, home: Path) -> list[Path]:
        """The files of a saved model and of its training; a card is the report's."""
        return self.relative(*_model_files(home))


def _inputs(stage: str, model: sections.ModelSection, data: Data, **more: Any) -> dict[str, Any]:
    """Plain data that the key of a stage is the hash of."""
    parts = [p.model_dump() if hasattr(p, "model_dump") else p for p in more.pop("parts")]
    network = model.model_dump(exclude={"checkpoint"})
    return {"stage": stage, "model": network, "data": data_digests(data), "parts": parts, **more}


def _model_files(home: Path) -> list[Path]:
    extra = sorted([*home.glob("plan*.json"), *home.glob(METRICS)])
    return [home / pruned_model.CONFIG, home / pruned_model.WEIGHTS, home / SUMS, *extra]


def train(
    folder: Path,
    given: LoadedNetwork,
    data: Data,
    recipe: sections.Recipe,
    section: sections.TrainSection,
    runtime: Runtime,
) -> Stage:
    """The dense network, trained from random weights."""
    home = folder / TRAINED
    inputs = _inputs(
        "train", recipe.model, data, weights="", seed=recipe.seed, parts=(section,), after=""
    )

    def run() -> Output:
        data.decode()  # the reporting images too, which are not looked at before the end
        first(lambda: keep_state_of(home, stage.key))
        settings = finetune_settings(section, runtime, seed=recipe.seed)
        tuned = finetune(given.model, data, settings, folder=home, track=runtime.track)
        first(lambda: pruned_model.save(tuned.model.cpu(), home, given.architecture))
        files = [path.relative_to(folder) for path in _model_files(home)]
        return Output(files, {"best_epoch": tuned.best_epoch})

    stage = Stage("train", inputs, run, shared=True)
    return stage


def baseline(work: Workspace) -> Stage:
    """The numbers of the dense network."""

    def run() -> Output:
        model = work.context.network.model
        found = stages.measured(work.context, model)
        return Output([], found | {"bytes": reporting.size_of(model)})

    return Stage("baseline", work.inputs("baseline"), run, shared=True, facts=BaselineFacts)


def statistics(work: Workspace) -> Stage:
    """What the gates do on the calibration set."""
    settings = work.settings
    parts = (settings.collect, settings.gradients, settings.importance.probe, FORMAT)

    def run() -> Output:
        found = collect(work.context, settings, work.folder / "collecting")
        first(lambda: found.save(work.folder / STATISTICS))
        return Output([STATISTICS], {"images": found.samples})

    return Stage("collect", work.inputs("collect", *parts), run, shared=True)


def sensitivity(work: Workspace, known: GateStatistics | None) -> Stage:
    """What the dense network loses without a part of one group."""
    settings = work.settings
    parts = (settings.sensitivity, settings.importance, settings.collect, settings.gradients)

    def run() -> Output:
        importance = first(lambda: stages.rank(work.context, settings, known))
        found = stages.sensitivity(work.context, settings, importance)
        first(lambda: write_json(work.folder / SENSITIVITY, found.plain()))
        return Output([SENSITIVITY], {})

    return Stage("sensitivity", work.inputs("sensitivity", *parts), run, shared=True)


def prune(
    work: Workspace,
    runner: Runner,
    budget: Budget,
    home: Path,
    known: tuple[GateStatistics | None, Sensitivity | None],
) -> Stage:
    """One budget's network, cut and recovered; with several small cuts each is a stage as well.

    Args:
        known: statistics and sensitivities of the dense network, where they are needed.
    """
    settings = work.settings
    parts: list[sections.Section] = [settings.importance, settings.plan, settings.prune]
    if settings.plan.allocation == "sensitivity":
        parts.append(settings.sensitivity)

    def run() -> Output:
        context, (found, losses) = work.context, known
        *early, last = stages.parts(context, settings.plan, budget)
        for number, part in enumerate(early, 1):
            context = _step(work, runner, context, found, part, home / f"step-{number}")
            losses = None
            found = collect(context, settings) if settings.needs_statistics else None
        unfinished = home / f"{_UNFINISHED}{stage.key[:12]}"
        cut = stages.cut(context, settings, found, last, known=losses, folder=unfinished)
        first(lambda: _write(cut, home))
        first(lambda: remove_folders(home, f"{_UNFINISHED}*"))
        own = work.relative(home / PLAN, home / SCORES)
        return Output([*own, *work.saved(home / PRUNED)], _numbers(work.context, cut, home))

    inputs = work.inputs("prune", *parts, str(budget))
    stage = Stage(f"prune/{budget}", inputs, run, facts=PruneFacts)
    return stage


def _step(
    work: Workspace,
    runner: Runner,
    context: Context,
    found: GateStatistics | None,
    part: Budget,
    folder: Path,
) -> Context:
    """One of several small cuts, kept and in the journal; the context of the next one."""
    settings = work.settings

    def run() -> Output:
        cut = stages.cut(context, settings, found, part)
        first(lambda: pruned_model.save(cut.recovered.cpu(), folder, cut.architecture))
        return Output(work.saved(folder), {"plan": dict(cut.plan.facts)})

    name = folder.relative_to(work.folder).as_posix()
    parts = (settings.importance, settings.plan, settings.prune, str(part))
    runner(Stage(f"prune/{name}", work.inputs("step", *parts, after=name), run))
    model = pruned_model.load(folder, loader=work.loader)
    return context.after(model, pruned_model.read_architecture(folder))


def _numbers(context: Context, cut: stages.Cut, home: Path) -> dict[str, Any]:
    """The numbers of a cut network before and after its recovery."""
    pruned = stages.measured(context, cut.pruned)
    same = cut.recovered is cut.pruned
    after = pruned if same else stages.measured(context, cut.recovered)
    size = {"bytes": (home / PRUNED / pruned_model.WEIGHTS).stat().st_size}
    return {
        "pruned": pruned | size,
        "recovered": after | size,
        "plan": dict(cut.plan.facts),
        "laps": dict(cut.seconds),
        "notes": list(cut.notes),
    }


def _write(cut: stages.Cut, home: Path) -> None:
    cut.plan.save(home / PLAN)
    write_importance(cut.importance, cut.plan, home / SCORES)
    pruned_model.save(cut.recovered.cpu(), home / PRUNED, cut.architecture)


def tuning(
    work: Workspace,
    section: sections.FinetuneSection,
    home: Path,
    label: str,
    after: str,
    last: bool,
) -> Stage:
    """One budget's network, fine-tuned.

    Args:
        after: the key of the stage that pruned it.
        last: measure the weights of the last epoch too.
    """
    into, context = home / FINETUNED, work.context

    def run() -> Output:
        first(lambda: keep_state_of(into, stage.key))
        pruned = pruned_model.load(home / PRUNED, loader=work.loader)
        cut, dense = pruned_model.read_architecture(home / PRUNED), context.network
        teacher = None
        if section.distill and stages.distils(context):
            teacher = Teacher(dense.model, cut.plans[len(dense.architecture.plans) :])
        tuned = finetune(
            pruned,
            context.images(),
            finetune_settings(section, context.runtime, seed=work.settings.seed),
            teacher=teacher,
            folder=into,
            track=context.runtime.track,
        )
        found = stages.measured(context, tuned.model)
        about = {"metrics": words.finite(found["metrics"])}
        first(lambda: pruned_model.save(tuned.model.cpu(), into, cut, about=about))
        size = (into / pruned_model.WEIGHTS).stat().st_size
        facts: dict[str, Any] = {"bytes": size, "tuning": tuned.numbers()}
        if last:
            same = tuned.last is tuned.model
            end: Mapping[str, Any] = found if same else stages.measured(context, tuned.last)
            facts["last"] = {**end, "bytes": size}
        return Output(work.saved(into), found | facts)

    inputs = work.inputs("finetune", section, after=after)
    stage = Stage(f"finetune/{label}", inputs, run, facts=FinetuneFacts)
    return stage


def report(work: Workspace, result: reporting.RunResult, runner: Runner) -> Stage:
    """The report of a run, with latencies where they are wanted; read from the folder later."""
    section, runtime = result.recipe.report, work.context.runtime

    def run() -> Output:
        made = result
        if section.latency and not runtime.shared_machine:
            made = reporting.with_latency(made, work.loader)
        made = reporting.finished(made, runner.seconds, runner.notes)
        return Output(work.relative(*first(lambda: reporting.write(made, work.folder))), {})

    inputs = work.inputs("report", section, runtime.shared_machine)
    return Stage("report", inputs, run)
