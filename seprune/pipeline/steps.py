"""The steps of a run, each on plain objects: no folder, no journal, no printing."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import nn

from seprune.budget import Allocation, make_plan, resolve
from seprune.cost import count
from seprune.data import Data
from seprune.errors import InputError
from seprune.evaluation import Evaluation, evaluate, recalibrate
from seprune.finetune import FineTuneSettings
from seprune.groups import Structure
from seprune.importance import Importance, Scoring, collecting, criterion, score
from seprune.latency import latency
from seprune.pipeline.subject import Subject, data_digests
from seprune.plan import PruningPlan
from seprune.progress import Track, silent
from seprune.prune import cuttable, prune
from seprune.recipe.sections import Recipe, Train
from seprune.refit import RefitOptions, refit
from seprune.report import Measurement
from seprune.saved import Architecture
from seprune.statistics import CollectOptions, GateStatistics, collect_statistics


@dataclass(frozen=True)
class Cut:
    """What a budget made of a network, before and after it was recovered."""

    structure: Structure
    importance: Importance
    plan: PruningPlan
    pruned: nn.Module
    recovered: nn.Module
    architecture: Architecture
    seconds: Mapping[str, float]


def scoring_of(recipe: Recipe) -> Scoring:
    """The recipe's importance section as `score` takes it."""
    section = recipe.importance
    normalize = None if section.normalize == "auto" else section.normalize
    return Scoring(section.criterion, section.combine, section.ungated, normalize, recipe.seed)


def needs_statistics(recipe: Recipe) -> bool:
    """Whether the recipe's criterion looks at gates at all."""
    return criterion(recipe.importance.criterion).family != "weights"


def collect(
    subject: Subject,
    structure: Structure,
    data: Data,
    recipe: Recipe,
    *,
    folder: Path | None = None,
    track: Track = silent,
) -> GateStatistics:
    """Statistics for the recipe's criterion over the calibration set."""
    section, rule = recipe.collect, criterion(recipe.importance.criterion)
    gradients = rule.gradients if section.gradients == "auto" else section.gradients
    options = CollectOptions(
        device=recipe.device, seed=recipe.seed, folder=folder, meta=data_digests(data)
    )
    if gradients != "none":
        options = collecting(structure, options)
    if not structure.gates:
        raise InputError(
            f"{subject.architecture.name}: no channel gates",
            why=f"criterion '{recipe.importance.criterion}' scores channels by their gates",
            fix="importance.criterion=l2 works without gates",
            code="no-gates",
        )
    loader = data.calibration(section.images, batch_size=section.batch_size, seed=recipe.seed)
    return collect_statistics(
        subject.model,
        loader,
        gates=structure.gates,
        gradients=gradients,
        options=options,
        track=track,
    )


def plan(
    subject: Subject,
    structure: Structure,
    importance: Importance,
    recipe: Recipe,
    budget: Mapping[str, float | str],
) -> PruningPlan:
    """The plan for one budget."""
    section = recipe.plan
    allocation = Allocation(
        section.allocation,
        section.floor,
        section.min_channels,
        section.round_to,
        section.protect,
        section.bottleneck,
    )

    def measure(candidate: PruningPlan) -> float:
        small = prune(subject.model, candidate)
        timed = latency({"it": small}, subject.shape, batch_sizes=(1,), device=_device(recipe))
        return float(timed[0].median_ms or 0.0)

    return make_plan(structure, importance, allocation=allocation, measure=measure, **dict(budget))


def cut(
    subject: Subject,
    structure: Structure,
    statistics: GateStatistics | None,
    data: Data | None,
    recipe: Recipe,
    budget: Mapping[str, float | str],
    *,
    track: Track = silent,
) -> Cut:
    """Score, plan, cut and recover once."""
    clock = _Clock()
    importance = score(structure, statistics, model=subject.model, scoring=scoring_of(recipe))
    clock.lap("score")
    made = plan(subject, structure, importance, recipe, budget)
    clock.lap("plan")
    pruned = prune(subject.model, made, subject.example())
    clock.lap("prune")
    recovered = recover(subject, pruned, made, data, recipe, track=track)
    clock.lap("recover")
    architecture = subject.architecture.cut(made)
    return Cut(structure, importance, made, pruned, recovered, architecture, clock.laps)


def recover(
    subject: Subject,
    pruned: nn.Module,
    made: PruningPlan,
    data: Data | None,
    recipe: Recipe,
    *,
    track: Track = silent,
) -> nn.Module:
    """The pruned network as `prune.recover` wants it."""
    how = recipe.prune.recover
    if how == "none" or data is None:
        return pruned
    loader = data.calibration(recipe.collect.images, seed=recipe.seed)
    if how == "bn":
        return recalibrate(pruned, loader, device=recipe.device, track=track)
    options = RefitOptions(images=recipe.collect.images, device=recipe.device)
    return refit(subject.model, pruned, made, loader, options=options, track=track).model


def cut_in_steps(
    subject: Subject,
    structure: Structure,
    statistics: GateStatistics | None,
    data: Data,
    recipe: Recipe,
    budget: Mapping[str, float | str],
    *,
    track: Track = silent,
) -> Cut:
    """`cut` in `plan.steps` cuts of equal proportion, with fresh statistics before each."""
    steps, at = recipe.plan.steps, subject
    final = resolve(structure, budget)
    whole = {"macs": structure.macs_at(structure.whole()),
             "params": structure.params_at(structure.whole())}  # fmt: skip
    seconds: dict[str, float] = {}
    for step in range(1, steps + 1):
        if step > 1:
            structure = cuttable(at.model, at.example())
            if needs_statistics(recipe):
                statistics = collect(at, structure, data, recipe, track=track)
        part = {n: int(whole[n] * (t / whole[n]) ** (step / steps)) for n, t in final.items()}
        share = {**budget, **final} if step == steps else part
        made = cut(at, structure, statistics, data, recipe, share, track=track)
        for name, value in made.seconds.items():
            seconds[name] = seconds.get(name, 0.0) + value
        at = replace(at, model=made.recovered, architecture=made.architecture)
    return replace(made, seconds=seconds)


def settings_of(section: Train, recipe: Recipe) -> FineTuneSettings:
    """A training section as `finetune` takes it."""
    given = section.model_dump(exclude={"distill", "precision", "channels_last"})
    on_gpu = _device(recipe).startswith("cuda")
    precision = ("bf16" if on_gpu else "no") if section.precision == "auto" else section.precision
    last = on_gpu if section.channels_last == "auto" else section.channels_last
    distill = section.distill
    return FineTuneSettings(
        **given,
        precision=precision,
        channels_last=last,
        distill_alpha=distill.weight if distill else 0.0,
        distill_temperature=distill.temperature if distill else 1.0,
        device=recipe.device,
        seed=recipe.seed,
    )


def measured(
    model: nn.Module, subject: Subject, data: Data, recipe: Recipe, *, track: Track = silent
) -> dict[str, Any]:
    """The numbers of a `Measurement` but its stage, budget, size and latency."""
    found: Evaluation = evaluate(model, data.reporting(), device=recipe.device, track=track)
    cost = count(model.cpu(), subject.example(1))
    return {
        "top1": found.top1,
        "top5": found.top5,
        "loss": found.loss if found.loss == found.loss else None,
        "count": found.count,
        "nonfinite": found.nonfinite,
        "macs": cost.macs,
        "params": cost.params,
    }


def with_latency(
    measurements: Sequence[Measurement],
    networks: Mapping[tuple[str, str | None], nn.Module],
    subject: Subject,
    recipe: Recipe,
) -> list[Measurement]:
    """The measurements with latencies; all networks take turns in one process."""
    names = {f"{stage} {budget or ''}".strip(): (stage, budget) for stage, budget in networks}
    times = latency(
        {name: networks[key] for name, key in names.items()},
        subject.shape,
        batch_sizes=recipe.report.batch_sizes,
        device=_device(recipe),
    )
    return [
        replace(m, latency=[t for t in times if names[t.name] == (m.stage, m.budget)])
        for m in measurements
    ]


def _device(recipe: Recipe) -> str:
    from seprune.processes import resolve_device

    return str(resolve_device(recipe.device))


class _Clock:
    """Seconds between laps."""

    def __init__(self) -> None:
        self.laps: dict[str, float] = {}
        self.last = time.monotonic()

    def lap(self, name: str) -> None:
        now = time.monotonic()
        self.laps[name] = now - self.last
        self.last = now
