"""The steps of a run, each on plain objects: no folder, no journal, no printing."""

from __future__ import annotations

import time
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn

from seprune.data import in_turn
from seprune.export.architecture import Architecture, rebuilt
from seprune.graph.groups import NetworkStructure
from seprune.importance import Importance, Scoring, score
from seprune.importance.ablation import (
    Sensitivity,
    SensitivityOptions,
    measure_sensitivity,
    weighed,
)
from seprune.measure.flops import count
from seprune.measure.metrics import evaluate
from seprune.models.preprocessing import remember_training
from seprune.pipeline.collection import collect, scored_structure
from seprune.pipeline.context import Context
from seprune.pipeline.network_timer import latency_of
from seprune.pipeline.parts import removable_parts
from seprune.pipeline.settings import CutSettings
from seprune.pruning.constraints import Allocation
from seprune.pruning.limits import Budget, limits
from seprune.pruning.plan import PruningPlan, plan_of, with_facts
from seprune.pruning.prune import prune
from seprune.pruning.removals import Part
from seprune.pruning.rules import rules_to_try
from seprune.pruning.search import plan_within
from seprune.recipe.sections import PlanSection
from seprune.recovery.candidates import TrialOptions, choose_plan
from seprune.recovery.recalibrate import recalibrate
from seprune.recovery.reconstruct import ReconstructOptions, reconstruct
from seprune.recovery.refit import RefitOptions, refit
from seprune.report.measurement import plain
from seprune.runtime.distributed import first
from seprune.runtime.random_state import cpu_random
from seprune.statistics import GateStatistics


@dataclass(frozen=True)
class Recovered:
    """A recovered network, and what whoever asked for it should know."""

    model: nn.Module
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Cut:
    """What a budget made of a network, before and after it was recovered.

    Attributes:
        notes: of the recovery.
    """

    importance: Importance
    plan: PruningPlan
    pruned: nn.Module
    recovered: nn.Module
    architecture: Architecture
    seconds: Mapping[str, float]
    notes: tuple[str, ...] = ()


def rank(
    context: Context,
    settings: CutSettings,
    statistics: GateStatistics | None,
    *,
    scoring: Scoring | None = None,
    scored: NetworkStructure | None = None,
) -> Importance:
    """Scores by the recipe's criterion, or by another one.

    Args:
        scored: the structure that the statistics are of, where it is known.
    """
    made = score(
        scored or scored_structure(context, settings),
        statistics,
        model=context.network.model,
        scoring=scoring or settings.scoring,
    )
    names = {g.name for g in context.structure.groups}
    return replace(made, scores={n: s for n, s in made.scores.items() if n in names})


def sensitivity(context: Context, settings: CutSettings, importance: Importance) -> Sensitivity:
    """What the network loses without a part of one group, on validation images."""
    section, data = settings.sensitivity, context.images(settings.needs_images_for)
    loader = data.validation()
    rows = in_turn(loader.store.labels, loader.rows, seed=settings.seed)
    loader.rows = rows[: section.images or 512]
    return measure_sensitivity(
        context.network.model,
        context.structure,
        importance,
        loader,
        options=SensitivityOptions(section.shares, context.runtime.device),
        track=context.runtime.track,
    )


def allocation_of(
    context: Context, settings: CutSettings, parts: tuple[Part, ...] = ()
) -> Allocation:
    """Where channels may be removed; `parts`: gates and blocks that may be taken out."""
    section = settings.plan
    return Allocation(
        section.allocation,
        section.floor,
        section.min_channels,
        section.round_to or (8 if context.runtime.cuda else None),
        section.protect,
        section.bottleneck,
        parts,
    )


def plan(
    context: Context,
    settings: CutSettings,
    importance: Importance,
    budget: Budget,
    known: Sensitivity | None = None,
    allocation: Allocation | None = None,
) -> PruningPlan:
    """The plan for one budget.

    Args:
        known: sensitivities that were measured before.
        allocation: by default that of the settings.
    """
    section, allocation = settings.plan, allocation or allocation_of(context, settings)
    if section.allocation == "sensitivity":
        importance = weighed(importance, known or sensitivity(context, settings, importance))
    if section.steps > 1:
        budget = left(context, budget)
        if budget == Budget():  # an earlier cut had to go further than its share
            about = {"criterion": importance.criterion, "allocation": section.allocation}
            facts = {"targets": {}, **about, **uncut(context)}
            return plan_of(context.structure.groups, {}, facts)
    within = partial(plan_within, context.structure, importance, budget, allocation=allocation)
    if budget.latency is None:
        return within()
    with ExitStack() as stack:
        measure, times = latency_of(context, section, stack)
        return within(measure=measure, times=times)


def planned(
    context: Context,
    settings: CutSettings,
    statistics: GateStatistics | None,
    budget: Budget,
    known: Sensitivity | None = None,
) -> tuple[Importance, PruningPlan]:
    """Scores and the plan made of them; with `plan.candidates` the best of several rules'."""
    ways = ways_to_plan(context, settings, statistics, budget)
    scored = scored_structure(context, settings)
    scores, plans = dict[str, Importance](), dict[str, PruningPlan]()
    for name, (scoring, allocation) in ways.items():
        work = partial(rank, context, settings, statistics, scoring=scoring, scored=scored)
        importance = first(work)
        losses = known
        if losses is None and settings.plan.allocation == "sensitivity":
            losses = sensitivity(context, settings, importance)
        scores[name] = importance
        plans[name] = first(
            partial(plan, context, settings, importance, budget, losses, allocation)
        )
    if len(ways) == 1:
        return next(iter(scores.values())), next(iter(plans.values()))
    data, runtime = context.images(settings.needs_images_for), context.runtime
    loader = data.calibration(settings.collect.images, seed=settings.seed)
    options = TrialOptions.before(
        settings.prune.recover, device=runtime.device, memory=runtime.memory
    )
    choice = choose_plan(context.network.model, plans, loader, options=options, track=runtime.track)
    return scores[choice.name], with_facts(choice.plan, candidates=choice.facts())


def ways_to_plan(
    context: Context, settings: CutSettings, statistics: GateStatistics | None, budget: Budget
) -> dict[str, tuple[Scoring, Allocation]]:
    """Scorings and allocations by name; one alone where no plans are compared.

    A cut that nothing recovers needs no images, and without them plans cannot be judged.
    """
    parts = first(partial(removable_parts, context, settings, budget))
    allocation = allocation_of(context, settings, parts)
    unseen = settings.prune.recover == "none" and context.data is None
    if unseen or not settings.tries_several_plans:
        return {"": (settings.scoring, allocation)}
    refits = settings.prune.recover in ("refit", "reconstruct") or budget.latency is not None
    return rules_to_try(settings.scoring, statistics, allocation, refits=refits)


def cut(
    context: Context,
    settings: CutSettings,
    statistics: GateStatistics | None,
    budget: Budget,
    *,
    known: Sensitivity | None = None,
    folder: Path | None = None,
) -> Cut:
    """Plan, cut and recover once; `folder`: for what an interrupted recovery has done."""
    network, clock = context.network, _LapClock()
    importance, made = planned(context, settings, statistics, budget, known)
    clock.lap("plan")
    pruned = prune(network.model, made, network.example())
    clock.lap("prune")
    recovered = recover(context, settings, pruned, made, folder)
    clock.lap("recover")
    return Cut(
        importance,
        made,
        pruned,
        recovered.model,
        network.architecture.cut(made),
        clock.laps,
        recovered.notes,
    )


def recover(
    context: Context,
    settings: CutSettings,
    pruned: nn.Module,
    made: PruningPlan,
    folder: Path | None = None,
) -> Recovered:
    """The pruned network as `prune.recover` wants it."""
    how, network, seed = settings.prune.recover, context.network, settings.seed
    device, track = context.runtime.device, context.runtime.track
    if how == "none":
        return Recovered(pruned)
    if how == "scratch":
        with cpu_random(seed):
            drawn = rebuilt(network.architecture.cut(made), device="cpu")
        return Recovered(remember_training(drawn, network.trained_for))
    images = settings.collect.images
    loader = context.images(settings.needs_images_for).calibration(images, seed=seed)
    if how == "bn":
        return Recovered(recalibrate(pruned, loader, device=device, track=track))
    images = min(images, len(loader.rows))
    options = RefitOptions(images=images, device=device, memory=context.runtime.memory)
    parent = network.model
    fitted = refit(parent, pruned, made, loader, options=options, track=track)
    if how == "refit":
        return Recovered(fitted.model, fitted.notes())
    training = ReconstructOptions(
        images=images, epochs=settings.prune.epochs, device=device, folder=folder, seed=seed
    )
    small = fitted.model
    trained = reconstruct(parent, small, made, loader, options=training, track=track)
    return Recovered(trained.model, fitted.notes())


def cut_in_steps(
    context: Context,
    settings: CutSettings,
    statistics: GateStatistics | None,
    budget: Budget,
) -> Cut:
    """`cut` in `plan.steps` cuts, with fresh statistics before each."""
    seconds, notes = dict[str, float](), dict[str, None]()
    *early, last = parts(context, settings.plan, budget)
    for part in early:
        made = cut(context, settings, statistics, part)
        for name, value in made.seconds.items():
            seconds[name] = seconds.get(name, 0.0) + value
        notes |= dict.fromkeys(made.notes)
        context = context.after(made.recovered, made.architecture)
        statistics = collect(context, settings) if settings.needs_statistics else None
    made = cut(context, settings, statistics, last)
    total = {n: v + seconds.get(n, 0.0) for n, v in made.seconds.items()}
    return replace(made, seconds=total, notes=tuple(notes | dict.fromkeys(made.notes)))


def parts(context: Context, section: PlanSection, budget: Budget) -> list[Budget]:
    """The budgets of `plan.steps` cuts: equal proportions on the way to the final budget.

    Latency is a fraction of the network that a cut finds, so each takes the same one.
    """
    number, final = section.steps, limits(context.structure, budget)
    costs = context.structure.costs()
    share: dict[str, float | str] = {}
    if budget.latency is not None:
        limit = budget.latency
        each = limit.written if limit.milliseconds else limit.value ** (1 / number)
        share = {"latency": each}
    amounts = [
        {n: int(costs[n] * (t / costs[n]) ** (step / number)) for n, t in final.items()}
        for step in range(1, number)
    ]
    return [Budget.parse(**part, **share) for part in [*amounts, final]]


def left(context: Context, budget: Budget) -> Budget:
    """What of a budget an earlier cut has not met already."""
    costs = context.structure.costs()
    return Budget(**{n: t for n, t in budget if n not in costs or t.value < costs[n]})


def uncut(context: Context) -> dict[str, Any]:
    """The facts of a plan that removes nothing."""
    return {name: [cost, cost] for name, cost in context.structure.costs().items()}


def distils(context: Context) -> bool:
    """Whether a network of this task can learn from its parent; a detector in training cannot."""
    return context.images().info.task != "detection"


def measured(context: Context, model: nn.Module) -> dict[str, Any]:
    """The numbers of a `Measurement` but its stage, budget, size and latency."""
    runtime, reporting = context.runtime, context.images().reporting()
    found = evaluate(model, reporting, device=runtime.device, track=runtime.track)
    cost = count(model.cpu(), context.network.example(1))
    deciding = {"metric": found.metric, "higher_is_better": found.higher_is_better}
    scores: dict[str, Any] = plain(found.plain())
    names = context.images().info.classes
    scores["by_class"] = {n: plain(v) for n, v in zip(names, found.by_class)}  # shorter if unseen
    return scores | deciding | {"macs": cost.macs, "params": cost.params}


class _LapClock:
    """Seconds between laps."""

    def __init__(self) -> None:
        self.laps: dict[str, float] = {}
        self.last = time.monotonic()

    def lap(self, name: str) -> None:
        now = time.monotonic()
        self.laps[name] = now - self.last
        self.last = now
