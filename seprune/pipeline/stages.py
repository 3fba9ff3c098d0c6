"""The steps of a run, each on plain objects: no folder, no journal, no printing."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from seprune.data import in_turn
from seprune.export.architecture import Architecture, rebuilt
from seprune.importance import Importance, Scoring, score
from seprune.importance.ablation import (
    Sensitivity,
    SensitivityOptions,
    measure_sensitivity,
    weighed,
)
from seprune.importance.alternatives import alternatives
from seprune.measure.flops import count
from seprune.measure.metrics import evaluate
from seprune.pipeline.collection import collect
from seprune.pipeline.context import Bench
from seprune.pipeline.network_timer import fast_multiple, latency_of
from seprune.pruning.budget import Budget, limits
from seprune.pruning.constraints import Allocation
from seprune.pruning.plan import PruningPlan, plan_of, with_facts
from seprune.pruning.prune import prune
from seprune.pruning.search import plan_within
from seprune.recovery.candidates import TrialOptions, choose_plan
from seprune.recovery.recalibrate import recalibrate
from seprune.recovery.reconstruct import ReconstructOptions, reconstruct
from seprune.recovery.refit import RefitOptions, refit
from seprune.runtime.distributed import first
from seprune.statistics import GateStatistics


@dataclass(frozen=True)
class Cut:
    """What a budget made of a network, before and after it was recovered."""

    importance: Importance
    plan: PruningPlan
    pruned: nn.Module
    recovered: nn.Module
    architecture: Architecture
    seconds: Mapping[str, float]


def rank(
    bench: Bench, statistics: GateStatistics | None, scoring: Scoring | None = None
) -> Importance:
    """Scores by the recipe's criterion, or by another one."""
    scoring = scoring or bench.scoring
    made = score(bench.scored, statistics, model=bench.subject.model, scoring=scoring)
    names = {g.name for g in bench.structure.groups}
    return replace(made, scores={n: s for n, s in made.scores.items() if n in names})


def sensitivity(bench: Bench, importance: Importance) -> Sensitivity:
    """What the network loses without a part of one group, on validation images."""
    section, data = bench.recipe.sensitivity, bench.images()
    loader = data.validation()
    rows = in_turn(loader.store.labels, loader.rows, seed=bench.recipe.seed)
    loader.rows = rows[: section.images or 512]
    return measure_sensitivity(
        bench.subject.model,
        bench.structure,
        importance,
        loader,
        options=SensitivityOptions(section.shares, bench.recipe.device),
        track=bench.track,
    )


def plan(
    bench: Bench, importance: Importance, budget: Budget, known: Sensitivity | None = None
) -> PruningPlan:
    """The plan for one budget; `known`: sensitivities that were measured before."""
    if bench.recipe.plan.allocation == "sensitivity":
        importance = weighed(importance, known or sensitivity(bench, importance))
    said = bench.recipe.plan
    allocation = Allocation(
        said.allocation,
        said.floor,
        said.min_channels,
        said.round_to or fast_multiple(bench, budget),
        said.protect,
        said.bottleneck,
    )
    if bench.recipe.plan.steps > 1:
        budget = left(bench, budget)
        if (
            budget == Budget()
        ):  # an earlier cut could only go so far that nothing is left for this one
            return plan_of(bench.structure.groups, {}, uncut(bench))
    measure, times = latency_of(bench) if budget.latency is not None else (None, None)
    return plan_within(
        bench.structure, importance, budget, allocation=allocation, measure=measure, times=times
    )


def planned(
    bench: Bench,
    statistics: GateStatistics | None,
    budget: Budget,
    known: Sensitivity | None = None,
) -> tuple[Importance, PruningPlan]:
    """Scores and the plan made of them; with `plan.candidates` the best of several rules'."""
    rules = {"": bench.scoring}
    if bench.chooses:
        rules = alternatives(bench.scoring, statistics)
    scores, plans = dict[str, Importance](), dict[str, PruningPlan]()
    for name, scoring in rules.items():
        scores[name], plans[name] = _by_one_rule(bench, statistics, budget, scoring, known)
    if len(rules) == 1:
        return next(iter(scores.values())), next(iter(plans.values()))
    loader = bench.images().calibration(bench.recipe.collect.images, seed=bench.recipe.seed)
    options = TrialOptions(device=bench.recipe.device)
    choice = choose_plan(bench.subject.model, plans, loader, options=options, track=bench.track)
    return scores[choice.name], with_facts(choice.plan, candidates=choice.facts())


def _by_one_rule(
    bench: Bench,
    statistics: GateStatistics | None,
    budget: Budget,
    scoring: Scoring,
    known: Sensitivity | None,
) -> tuple[Importance, PruningPlan]:
    importance = first(lambda: rank(bench, statistics, scoring))
    if known is None and bench.recipe.plan.allocation == "sensitivity":
        known = sensitivity(bench, importance)
    return importance, first(lambda: plan(bench, importance, budget, known))


def cut(
    bench: Bench,
    statistics: GateStatistics | None,
    budget: Budget,
    known: Sensitivity | None = None,
    folder: Path | None = None,
) -> Cut:
    """Plan, cut and recover once; `folder`: for what an interrupted recovery has done."""
    clock = _Clock()
    importance, made = planned(bench, statistics, budget, known)
    clock.lap("plan")
    pruned = prune(bench.subject.model, made, bench.subject.example())
    clock.lap("prune")
    recovered = recover(bench, pruned, made, folder)
    clock.lap("recover")
    architecture = bench.subject.architecture.cut(made)
    return Cut(importance, made, pruned, recovered, architecture, clock.laps)


def recover(
    bench: Bench, pruned: nn.Module, made: PruningPlan, folder: Path | None = None
) -> nn.Module:
    """The pruned network as `prune.recover` wants it."""
    how, recipe = bench.recipe.prune.recover, bench.recipe
    if how == "none":
        return pruned
    if how == "scratch":
        with torch.random.fork_rng([]):
            torch.manual_seed(recipe.seed)
            return rebuilt(bench.subject.architecture.cut(made), device="cpu")
    loader = bench.images().calibration(recipe.collect.images, seed=recipe.seed)
    if how == "bn":
        return recalibrate(pruned, loader, device=recipe.device, track=bench.track)
    options = RefitOptions(images=recipe.collect.images, device=recipe.device)
    parent = bench.subject.model
    small = refit(parent, pruned, made, loader, options=options, track=bench.track).model
    if how == "refit":
        return small
    training = ReconstructOptions(
        images=recipe.collect.images,
        epochs=recipe.prune.epochs,
        device=recipe.device,
        folder=folder,
        seed=recipe.seed,
    )
    return reconstruct(parent, small, made, loader, options=training, track=bench.track).model


def cut_in_steps(bench: Bench, statistics: GateStatistics | None, budget: Budget) -> Cut:
    """`cut` in `plan.steps` cuts, with fresh statistics before each."""
    seconds = dict[str, float]()
    *early, last = parts(bench, budget)
    for part in early:
        made = cut(bench, statistics, part)
        for name, value in made.seconds.items():
            seconds[name] = seconds.get(name, 0.0) + value
        bench = bench.after(made.recovered, made.architecture)
        statistics = collect(bench) if bench.needs_statistics else None
    made = cut(bench, statistics, last)
    total = {n: v + seconds.get(n, 0.0) for n, v in made.seconds.items()}
    return replace(made, seconds=total)


def parts(bench: Bench, budget: Budget) -> list[Budget]:
    """The budgets of `plan.steps` cuts: equal proportions on the way to the whole budget.

    Latency is a fraction of the network that a cut finds, so each takes the same one.
    """
    number, final = bench.recipe.plan.steps, limits(bench.structure, budget)
    costs = bench.structure.costs()
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


def left(bench: Bench, budget: Budget) -> Budget:
    """What of a budget an earlier cut has not met already."""
    costs = bench.structure.costs()
    return Budget(**{n: t for n, t in budget if n not in costs or t.value < costs[n]})


def uncut(bench: Bench) -> dict[str, Any]:
    """The facts of a plan that removes nothing."""
    return {name: [cost, cost] for name, cost in bench.structure.costs().items()}


def measured(bench: Bench, model: nn.Module) -> dict[str, Any]:
    """The numbers of a `Measurement` but its stage, budget, size and latency."""
    reporting = bench.images().reporting()
    found = evaluate(model, reporting, device=bench.recipe.device, track=bench.track)
    cost = count(model.cpu(), bench.subject.example(1))
    scores = {key: getattr(found, key) for key in ("top1", "top5", "loss", "count", "nonfinite")}
    numbers = scores | {"macs": cost.macs, "params": cost.params}
    return numbers | {"loss": found.loss if math.isfinite(found.loss) else None}


class _Clock:
    """Seconds between laps."""

    def __init__(self) -> None:
        self.laps: dict[str, float] = {}
        self.last = time.monotonic()

    def lap(self, name: str) -> None:
        now = time.monotonic()
        self.laps[name] = now - self.last
        self.last = now
