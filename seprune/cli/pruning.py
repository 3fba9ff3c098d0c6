"""What `seprune prune` and `seprune finetune` write and say."""

from __future__ import annotations

import time
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from seprune.cli import console
from seprune.cli.tables import widths
from seprune.errors import UsageError
from seprune.export import pruned_model
from seprune.measure.flops import count
from seprune.pipeline import stages
from seprune.pipeline.collection import collect
from seprune.pipeline.context import Bench
from seprune.pruning.budget import Budget
from seprune.pruning.plan import PruningPlan, with_facts
from seprune.pruning.prune import prune
from seprune.report import words
from seprune.runtime.distributed import first, join, resolve_device
from seprune.runtime.lock import hold

if TYPE_CHECKING:
    from seprune.recovery.finetune import Teacher
    from seprune.statistics import GateStatistics


@dataclass
class Job:
    """One `seprune prune`."""

    bench: Bench
    statistics: GateStatistics | None
    out: Path

    def prepare(self) -> dict[str, float]:
        """Find what can be cut, and the statistics that the criterion needs; seconds."""
        start = time.monotonic()
        groups = self.bench.structure.groups
        seconds = {"analyse": time.monotonic() - start}
        if not any(g.prunable for g in groups):
            console.tell("note: no group of this network can be cut")
        if self.bench.needs_statistics and self.statistics is None:
            start = time.monotonic()
            self.statistics = collect(self.bench)
            seconds["collect"] = time.monotonic() - start
        for warning in self.statistics.warnings if self.statistics is not None else ():
            console.tell(f"note: {warning}")
        return seconds

    def plan_only(self) -> dict[str, Any]:
        """`--dry-run`: the plan and what it would give."""
        seconds = self.prepare()
        plan = stages.plan(self.bench, stages.rank(self.bench, self.statistics), self.budget())
        first(lambda: plan.save(self.out / pruned_model.PLANS))
        console.tell(f"plan: {self.out / pruned_model.PLANS} (nothing else was written)")
        return told(plan, seconds)

    def prune(self) -> dict[str, Any]:
        """Cut, recover, save."""
        seconds = self.prepare()
        cut = stages.cut_in_steps(self.bench, self.statistics, self.budget())
        kept = {} if self.statistics is None else {"statistics.safetensors": self.statistics.save}
        first(
            lambda: pruned_model.save(cut.recovered.cpu(), self.out, cut.architecture, beside=kept)
        )
        console.tell(f"pruned network: {self.out}")
        return told(cut.plan, {**seconds, **cut.seconds})

    def budget(self) -> Budget:
        """The one budget of this command."""
        budgets = self.bench.recipe.plan.budgets()
        if len(budgets) > 1:
            raise UsageError(
                "one budget at a time", why="prune writes one network", fix="seprune run RECIPE"
            )
        return budgets[0]


def replay(bench: Bench, path: Path, out: Path) -> dict[str, Any]:
    """`--plan F`: carry out what the file says, recover, save; costs are counted, not read."""
    start = time.monotonic()
    subject, read = bench.subject, PruningPlan.load(path)
    pruned = prune(subject.model, read, subject.example())
    before, after = (count(m, subject.example(1)) for m in (subject.model, pruned))
    costs = {"macs": [before.macs, after.macs], "params": [before.params, after.params]}
    plan = with_facts(read, **costs)
    seconds = {"prune": time.monotonic() - start}
    recovered = stages.recover(bench, pruned, plan)
    seconds["recover"] = time.monotonic() - start - seconds["prune"]
    first(lambda: pruned_model.save(recovered.cpu(), out, subject.architecture.cut(plan)))
    console.tell(f"pruned network: {out}")
    return told(plan, seconds)


def refuse_beside_plan(given: Mapping[str, object]) -> None:
    """A plan has its budget in it."""
    if named := [name for name, value in given.items() if value]:
        raise UsageError(
            f"--plan and --{named[0]} do not go together",
            why="a plan says itself what is removed",
            fix=f"leave out --{named[0]}, or leave out --plan to make a new plan",
        )


def told(plan: PruningPlan, seconds: dict[str, float]) -> dict[str, Any]:
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


def tune(bench: Bench, teacher: Teacher | None, out: Path) -> dict[str, Any]:
    """`seprune finetune`: train, save, score; nobody else works in the same folder meanwhile."""
    join(resolve_device(bench.recipe.device))
    with ExitStack() as stack:
        first(lambda: stack.enter_context(hold(out)))
        return _tune(bench, teacher, out)


def _tune(bench: Bench, teacher: Teacher | None, out: Path) -> dict[str, Any]:
    from seprune.recovery.finetune import finetune

    subject = bench.subject
    tuned = finetune(
        subject.model,
        bench.images(),
        bench.settings(bench.recipe.finetune),
        teacher=teacher,
        folder=out,
        track=console.track,
    )
    first(lambda: pruned_model.save(tuned.model.cpu(), out, subject.architecture))
    result, numbers = stages.measured(bench, tuned.model), tuned.numbers()
    for line in words.tuning(numbers):
        console.tell(line)
    console.tell(f"top-1 {result['top1']:.4f} on {result['count']:,} images: {out}")
    return {**result, **numbers}
