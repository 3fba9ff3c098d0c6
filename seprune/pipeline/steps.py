"""The steps of a run, each on plain objects: no folder, no journal, no printing."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from seprune.allocation import Allocation
from seprune.budget import make_plan
from seprune.cost import count
from seprune.data import Data, in_turn
from seprune.errors import UsageError
from seprune.evaluation import evaluate, recalibrate
from seprune.finetuning import FineTuneSettings
from seprune.groups import Structure
from seprune.importance import Importance, Scoring, criterion, score
from seprune.latency import latency
from seprune.pipeline import collection
from seprune.pipeline.subject import Subject
from seprune.plan import PruningPlan, plan_of
from seprune.processes import first, resolve_device
from seprune.progress import Track, silent
from seprune.pruning import cuttable, prune
from seprune.recipe.sections import Distill, Recipe, Train
from seprune.refitting import RefitOptions, refit
from seprune.saved import Architecture, rebuilt
from seprune.sensitivity import (
    Sensitivity,
    SensitivityOptions,
    measure_sensitivity,
    weighed,
)
from seprune.statistics import GateStatistics
from seprune.statistics.sensitivity import Gradients
from seprune.targets import fraction, resolve

Budget = Mapping[str, float | str]


@dataclass(frozen=True)
class Cut:
    """What a budget made of a network, before and after it was recovered."""

    importance: Importance
    plan: PruningPlan
    pruned: nn.Module
    recovered: nn.Module
    architecture: Architecture
    seconds: Mapping[str, float]


@dataclass(frozen=True)
class Bench:
    """A network under work: how it is to be treated, by which images, and who is told."""

    recipe: Recipe
    subject: Subject
    data: Data | None
    track: Track = silent

    @cached_property
    def structure(self) -> Structure:
        """Gates, groups and costs; what a trial cut proves impossible is left whole."""
        return cuttable(self.subject.model, self.subject.example())

    @cached_property
    def scored(self) -> Structure:
        """The structure that statistics are of: with probes, where the recipe wants them."""
        return collection.structure_of(self)

    @property
    def scoring(self) -> Scoring:
        """The recipe's importance section as `score` takes it."""
        said = self.recipe.importance
        normalize = None if said.normalize == "auto" else said.normalize
        return Scoring(said.criterion, said.combine, said.ungated, normalize, self.recipe.seed)

    @property
    def needs_statistics(self) -> bool:
        """Whether the recipe's criterion looks at gates at all."""
        return criterion(self.recipe.importance.criterion).family != "weights"

    @property
    def gradients(self) -> Gradients:
        """The gradients that statistics are collected with: said, or what the criterion needs."""
        said = self.recipe.collect.gradients
        return criterion(self.recipe.importance.criterion).gradients if said == "auto" else said

    def images(self) -> Data:
        """The data.

        Raises:
            UsageError: there are none, and this step needs them.
        """
        if self.data is None:
            raise UsageError(
                f"criterion '{self.recipe.importance.criterion}' with recovery "
                f"'{self.recipe.prune.recover}' needs calibration images",
                why="no data are given",
                fix="--data FOLDER, or --importance l2 --recover none",
            )
        return self.data

    def collect(
        self, folder: Path | None = None, *, per_sample: Path | None = None
    ) -> GateStatistics:
        """Statistics for the recipe's criterion over the calibration set.

        Args:
            folder: where an interrupted collection keeps its state.
            per_sample: .npy file for the gates of every image; such a collection starts anew.
        """
        return collection.collect(self, folder, per_sample=per_sample)

    def rank(self, statistics: GateStatistics | None) -> Importance:
        """Scores by the recipe's criterion."""
        made = score(self.scored, statistics, model=self.subject.model, scoring=self.scoring)
        names = {g.name for g in self.structure.groups}
        return replace(made, scores={n: s for n, s in made.scores.items() if n in names})

    @property
    def needs_sensitivity(self) -> bool:
        """Whether losses by group are wanted in the report or to allocate by."""
        return self.recipe.plan.allocation == "sensitivity" or self.recipe.sensitivity.images > 0

    def sensitivity(self, importance: Importance) -> Sensitivity:
        """What the network loses without a part of one group, on validation images."""
        section, data = self.recipe.sensitivity, self.images()
        loader = data.validation()
        rows = in_turn(loader.store.labels, loader.rows, seed=self.recipe.seed)
        loader.rows = rows[: section.images or 512]
        return measure_sensitivity(
            self.subject.model,
            self.structure,
            importance,
            loader,
            options=SensitivityOptions(section.shares, self.recipe.device),
            track=self.track,
        )

    def plan(
        self, importance: Importance, budget: Budget, known: Sensitivity | None = None
    ) -> PruningPlan:
        """The plan for one budget; `known`: sensitivities that were measured before."""
        if self.recipe.plan.allocation == "sensitivity":
            importance = weighed(importance, known or self.sensitivity(importance))
        said = self.recipe.plan
        allocation = Allocation(
            said.allocation,
            said.floor,
            said.min_channels,
            said.round_to or (8 if self.device.startswith("cuda") else 1),
            said.protect,
            said.bottleneck,
        )
        if self.recipe.plan.steps > 1:
            budget = self.left(budget)
            if not budget:  # an earlier cut could only go so far that nothing is left for this one
                return plan_of(self.structure.groups, {}, self.uncut())
        return make_plan(
            self.structure,
            importance,
            allocation=allocation,
            measure=self.milliseconds,
            **dict(budget),
        )

    def left(self, budget: Budget) -> Budget:
        """What of a budget an earlier cut has not met already."""
        costs = self.structure.costs()
        return {n: t for n, t in budget.items() if n not in costs or float(t) < costs[n]}

    def uncut(self) -> dict[str, Any]:
        """The facts of a plan that removes nothing."""
        return {name: [cost, cost] for name, cost in self.structure.costs().items()}

    def milliseconds(self, plan: PruningPlan) -> float:
        """Latency of one image through the network that `plan` makes."""
        small = prune(self.subject.model, plan)
        timed = latency({"it": small}, self.subject.shape, batch_sizes=(1,), device=self.device)
        return float(timed[0].median_ms or 0.0)

    def cut(
        self,
        statistics: GateStatistics | None,
        budget: Budget,
        known: Sensitivity | None = None,
    ) -> Cut:
        """Score, plan, cut and recover once."""
        clock = _Clock()
        importance = first(lambda: self.rank(statistics))
        clock.lap("score")
        if known is None and self.recipe.plan.allocation == "sensitivity":
            known = self.sensitivity(importance)
        made = first(lambda: self.plan(importance, budget, known))
        clock.lap("plan")
        pruned = prune(self.subject.model, made, self.subject.example())
        clock.lap("prune")
        recovered = self.recover(pruned, made)
        clock.lap("recover")
        architecture = self.subject.architecture.cut(made)
        return Cut(importance, made, pruned, recovered, architecture, clock.laps)

    def recover(self, pruned: nn.Module, made: PruningPlan) -> nn.Module:
        """The pruned network as `prune.recover` wants it."""
        how, recipe = self.recipe.prune.recover, self.recipe
        if how == "none":
            return pruned
        if how == "scratch":
            with torch.random.fork_rng([]):
                torch.manual_seed(recipe.seed)
                return rebuilt(self.subject.architecture.cut(made), device="cpu")
        loader = self.images().calibration(recipe.collect.images, seed=recipe.seed)
        if how == "bn":
            return recalibrate(pruned, loader, device=recipe.device, track=self.track)
        options = RefitOptions(images=recipe.collect.images, device=recipe.device)
        parent = self.subject.model
        return refit(parent, pruned, made, loader, options=options, track=self.track).model

    def parts(self, budget: Budget) -> list[Budget]:
        """The budgets of `plan.steps` cuts: equal proportions on the way to the whole budget.

        Latency is a fraction of the network that a cut finds, so each takes the same one.
        """
        steps, final = self.recipe.plan.steps, resolve(self.structure, budget)
        whole = self.structure.costs()
        share: Budget = {}
        if "latency" in budget:
            share = {"latency": fraction("latency", budget["latency"]) ** (1 / steps)}
        parts: list[Budget] = [
            {n: int(whole[n] * (t / whole[n]) ** (step / steps)) for n, t in final.items()}
            for step in range(1, steps)
        ]
        return [{**part, **share} for part in [*parts, final]]

    def after(self, model: nn.Module, architecture: Architecture) -> Bench:
        """The bench for the next cut: this network, as the last cut left it."""
        return replace(self, subject=replace(self.subject, model=model, architecture=architecture))

    def cut_in_steps(self, statistics: GateStatistics | None, budget: Budget) -> Cut:
        """`cut` in `plan.steps` cuts, with fresh statistics before each."""
        bench, seconds = self, dict[str, float]()
        *early, last = self.parts(budget)
        for part in early:
            made = bench.cut(statistics, part)
            for name, value in made.seconds.items():
                seconds[name] = seconds.get(name, 0.0) + value
            bench = bench.after(made.recovered, made.architecture)
            statistics = bench.collect() if bench.needs_statistics else None
        made = bench.cut(statistics, last)
        total = {n: v + seconds.get(n, 0.0) for n, v in made.seconds.items()}
        return replace(made, seconds=total)

    def settings(self, section: Train) -> FineTuneSettings:
        """A training section as `finetune` takes it."""
        given = section.model_dump(exclude={"distill", "precision", "channels_last"})
        on_gpu = self.device.startswith("cuda")
        auto: Literal["bf16", "no"] = "bf16" if on_gpu else "no"
        distill = section.distill or Distill(weight=0.0)
        return FineTuneSettings(
            **given,
            precision=auto if section.precision == "auto" else section.precision,
            channels_last=on_gpu if section.channels_last == "auto" else section.channels_last,
            distill_alpha=distill.weight,
            distill_temperature=distill.temperature,
            distill_features=distill.features,
            distill_precision=distill.precision,
            device=self.recipe.device,
            seed=self.recipe.seed,
        )

    def measured(self, model: nn.Module) -> dict[str, Any]:
        """The numbers of a `Measurement` but its stage, budget, size and latency."""
        reporting = self.images().reporting()
        found = evaluate(model, reporting, device=self.recipe.device, track=self.track)
        cost = count(model.cpu(), self.subject.example(1))
        numbers = asdict(found) | {"macs": cost.macs, "params": cost.params}
        return numbers | {"loss": found.loss if math.isfinite(found.loss) else None}

    @property
    def device(self) -> str:
        """The device that the recipe's `device` means here."""
        return str(resolve_device(self.recipe.device))


class _Clock:
    """Seconds between laps."""

    def __init__(self) -> None:
        self.laps: dict[str, float] = {}
        self.last = time.monotonic()

    def lap(self, name: str) -> None:
        now = time.monotonic()
        self.laps[name] = now - self.last
        self.last = now
