"""The sections of a recipe as the stages take them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from seprune.importance import Scoring, criterion
from seprune.importance.probes import ProbeSettings
from seprune.pipeline.context import Runtime
from seprune.recipe import sections
from seprune.recovery.finetune import FineTuneSettings
from seprune.statistics.gate_gradients import Gradients


@dataclass(frozen=True)
class CutSettings:
    """What decides which channels go and what happens to the weights after the cut."""

    collect: sections.CollectSection
    importance: sections.ImportanceSection
    sensitivity: sections.SensitivitySection
    plan: sections.PlanSection
    prune: sections.PruneSection
    seed: int

    @classmethod
    def of(cls, recipe: sections.CommandRecipe) -> CutSettings:
        """The sections of a recipe."""
        return cls(
            recipe.collect,
            recipe.importance,
            recipe.sensitivity,
            recipe.plan,
            recipe.prune,
            recipe.seed,
        )

    @property
    def scoring(self) -> Scoring:
        """The importance section as `score` takes it."""
        section = self.importance
        normalize = None if section.normalize == "auto" else section.normalize
        return Scoring(section.criterion, section.combine, section.ungated, normalize, self.seed)

    @property
    def needs_statistics(self) -> bool:
        """Whether the criterion looks at gates at all."""
        return criterion(self.importance.criterion).family != "weights"

    @property
    def gradients(self) -> Gradients:
        """The gradients to collect statistics with: as given, or what the criterion needs."""
        given = self.collect.gradients
        return criterion(self.importance.criterion).gradients if given == "auto" else given

    @property
    def needs_labels(self) -> bool:
        """Whether the targets of the data are looked at before the network is saved."""
        labelled = self.gradients in ("labels", "smoothed", "weights")
        measured = self.importance.probe is not None or self.needs_sensitivity
        return labelled or measured or self.prune.recover == "scratch"

    @property
    def tries_several_plans(self) -> bool:
        """Whether several plans are tried: not where weights are drawn anew."""
        wanted = self.plan.candidates and self.plan.allocation != "sensitivity"
        return wanted and self.prune.recover != "scratch"

    @property
    def needs_sensitivity(self) -> bool:
        """Whether losses by group are wanted in the report or to allocate by."""
        return self.plan.allocation == "sensitivity" or self.sensitivity.images > 0

    @property
    def needs_images_for(self) -> str:
        """What an error names where there are no images."""
        return f"criterion '{self.importance.criterion}' with recovery '{self.prune.recover}'"

    def probes(self, runtime: Runtime) -> ProbeSettings | None:
        """The probe section as `probed` takes it; None where no probes are wanted."""
        section = self.importance.probe
        if section is None:
            return None
        return ProbeSettings(
            section.epochs, section.lr, section.reduction, runtime.device, self.seed
        )


def finetune_settings(
    section: sections.TrainSection, runtime: Runtime, *, seed: int
) -> FineTuneSettings:
    """A training section as `finetune` takes it."""
    given = section.model_dump(exclude={"distill", "precision", "channels_last"})
    auto: Literal["bf16", "no"] = "bf16" if runtime.cuda else "no"
    distill = section.distill or sections.DistillSection(weight=0.0)
    return FineTuneSettings(
        **given,
        precision=auto if section.precision == "auto" else section.precision,
        channels_last=runtime.cuda if section.channels_last == "auto" else section.channels_last,
        distill_alpha=distill.weight,
        distill_temperature=distill.temperature,
        distill_features=distill.features,
        distill_precision=distill.precision,
        device=runtime.device,
        seed=seed,
    )
