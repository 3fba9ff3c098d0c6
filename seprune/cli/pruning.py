"""What `seprune prune` and `seprune finetune` write and say."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from seprune import saved
from seprune.cli import console
from seprune.cli.tables import widths
from seprune.errors import UsageError
from seprune.importance import score
from seprune.pipeline import steps
from seprune.plan import PruningPlan
from seprune.prune import cuttable

if TYPE_CHECKING:
    from torch import nn

    from seprune.data import Data
    from seprune.groups import Structure
    from seprune.pipeline.subject import Subject
    from seprune.recipe import Recipe
    from seprune.statistics import GateStatistics


@dataclass
class Job:
    """One `seprune prune`."""

    recipe: Recipe
    subject: Subject
    data: Data | None
    statistics: GateStatistics | None
    out: Path

    def prepare(self) -> tuple[Structure, dict[str, float]]:
        """Find what can be cut, and the statistics that the criterion needs."""
        seconds = {}
        start = time.monotonic()
        structure = cuttable(self.subject.model, self.subject.example())
        seconds["analyse"] = time.monotonic() - start
        needed = steps.needs_statistics(self.recipe)
        if needed and self.statistics is None:
            if self.data is None:
                raise UsageError(
                    f"criterion '{self.recipe.importance.criterion}' needs calibration images",
                    why="neither --data nor --statistics is given",
                    fix="--data FOLDER, or --importance l2",
                )
            start = time.monotonic()
            self.statistics = steps.collect(
                self.subject, structure, self.data, self.recipe, track=console.track
            )
            seconds["collect"] = time.monotonic() - start
        return structure, seconds

    def plan_only(self) -> dict[str, Any]:
        """`--dry-run`: the plan and what it would give."""
        structure, seconds = self.prepare()
        scoring = steps.scoring_of(self.recipe)
        importance = score(structure, self.statistics, model=self.subject.model, scoring=scoring)
        plan = steps.plan(self.subject, structure, importance, self.recipe, self.budget())
        plan.save(self.out / saved.PLANS)
        console.tell(f"plan: {self.out / saved.PLANS} (nothing else was written)")
        return self.told(plan, seconds)

    def prune(self) -> dict[str, Any]:
        """Cut, recover, save."""
        structure, seconds = self.prepare()
        if self.recipe.prune.recover != "none" and self.data is None:
            raise UsageError(
                f"--recover {self.recipe.prune.recover} needs calibration images",
                why="--data is not given",
                fix="--data FOLDER, or --recover none",
            )
        subject = self.subject
        if self.data is not None:
            cut = steps.cut_in_steps(subject, structure, self.statistics, self.data, self.recipe,
                                     self.budget(), track=console.track)  # fmt: skip
        else:
            cut = steps.cut(subject, structure, self.statistics, None, self.recipe, self.budget())
        saved.save(cut.recovered.cpu(), self.out, cut.architecture)
        if self.statistics is not None:
            self.statistics.save(self.out / "statistics.safetensors")
            saved.write_sums(self.out)
        console.tell(f"pruned network: {self.out}")
        return self.told(cut.plan, {**seconds, **cut.seconds})

    def budget(self) -> dict[str, float | str]:
        """The one budget of this command."""
        budgets = self.recipe.plan.budgets()
        if len(budgets) > 1:
            raise UsageError(
                "one budget at a time", why="prune writes one network", fix="seprune run RECIPE"
            )
        return budgets[0]

    def told(self, plan: PruningPlan, seconds: dict[str, float]) -> dict[str, Any]:
        """The contract's JSON; the table goes to people."""
        facts = plan.facts
        console.stderr().print(widths(plan))
        return {
            "macs_before": facts["macs"][0],
            "macs_after": facts["macs"][1],
            "params_before": facts["params"][0],
            "params_after": facts["params"][1],
            "groups": plan.widths(),
            "left_whole": {g.name: g.reason for g in plan.groups if g.reason},
            "seconds": seconds,
        }


def tune(
    recipe: Recipe, subject: Subject, data: Data, teacher: nn.Module | None, out: Path
) -> dict[str, Any]:
    """`seprune finetune`: train, save, score."""
    from seprune.finetune import finetune

    settings = steps.settings_of(recipe.finetune, recipe)
    tuned = finetune(
        subject.model, data, settings, teacher=teacher, folder=out, track=console.track
    )
    saved.save(tuned.model.cpu(), out, subject.architecture)
    after = replace(subject, model=tuned.model)
    result = steps.measured(tuned.model, after, data, recipe, track=console.track)
    chosen = tuned.history[tuned.best_epoch].top1 if tuned.best_epoch >= 0 else None
    console.tell(f"top-1 {result['top1']:.4f} on {result['count']:,} images: {out}")
    before = {
        "before": tuned.before.top1 if tuned.before else None,
        "recalibrated": tuned.recalibrated.top1 if tuned.recalibrated else None,
    }
    return {**result, "best_epoch": tuned.best_epoch, "validation_top1": chosen, **before}
