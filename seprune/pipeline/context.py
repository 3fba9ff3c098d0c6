"""The bench of a run: a network under work, how its recipe wants it treated, by which images."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal

from torch import nn

from seprune.data import Data
from seprune.errors import UsageError
from seprune.export.architecture import Architecture
from seprune.graph.groups import NetworkStructure, find_structure
from seprune.importance import Scoring, criterion
from seprune.importance.probes import ProbeSettings, probed
from seprune.pipeline.inputs import Subject
from seprune.pruning.analyse import analyse
from seprune.recipe.sections import Distill, Recipe, Train
from seprune.recovery.finetune import FineTuneSettings
from seprune.runtime.distributed import resolve_device
from seprune.runtime.progress import Track, silent
from seprune.statistics.gate_gradients import Gradients


@dataclass(frozen=True)
class Bench:
    """A network under work: how it is to be treated, by which images, and who is told."""

    recipe: Recipe
    subject: Subject
    data: Data | None
    track: Track = silent

    @cached_property
    def structure(self) -> NetworkStructure:
        """Gates, groups and costs; what a trial cut proves impossible is left whole."""
        return analyse(self.subject.model, self.subject.example())

    @cached_property
    def scored(self) -> NetworkStructure:
        """The structure that statistics are of: with probes, where the recipe wants them."""
        if self.probes is None:
            return self.structure
        twin = probed(self.subject.model, self.structure, self.probes)
        return find_structure(twin, self.subject.example())

    @property
    def probes(self) -> ProbeSettings | None:
        """The recipe's probes as `probing` takes them."""
        said, recipe = self.recipe.importance.probe, self.recipe
        if said is None:
            return None
        return ProbeSettings(said.epochs, said.lr, said.reduction, recipe.device, recipe.seed)

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
    def chooses(self) -> bool:
        """Whether several plans are tried; only where they are refitted, which the trials need."""
        wanted = self.recipe.plan.candidates and self.recipe.plan.allocation != "sensitivity"
        return wanted and self.recipe.prune.recover in ("refit", "reconstruct")

    @property
    def needs_sensitivity(self) -> bool:
        """Whether losses by group are wanted in the report or to allocate by."""
        return self.recipe.plan.allocation == "sensitivity" or self.recipe.sensitivity.images > 0

    @property
    def gradients(self) -> Gradients:
        """The gradients that statistics are collected with: said, or what the criterion needs."""
        said = self.recipe.collect.gradients
        return criterion(self.recipe.importance.criterion).gradients if said == "auto" else said

    @property
    def device(self) -> str:
        """The device that the recipe's `device` means here."""
        return str(resolve_device(self.recipe.device))

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

    def after(self, model: nn.Module, architecture: Architecture) -> Bench:
        """The bench for the next cut: this network, as the last cut left it."""
        return replace(self, subject=replace(self.subject, model=model, architecture=architecture))

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
