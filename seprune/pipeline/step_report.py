"""The report that a command leaves in the folder of the network that it saved."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from torch import nn

from seprune.checkpoint import is_pruned_folder
from seprune.export import pruned_model
from seprune.measure.flops import count
from seprune.models import ModelLoader
from seprune.pipeline import reporting, stages
from seprune.pipeline.budget_result import BudgetResult, as_lists
from seprune.pipeline.context import Context
from seprune.pipeline.inputs import data_digests
from seprune.pipeline.reporting import RunResult, measurement
from seprune.recipe import CommandRecipe, dump_recipe
from seprune.recovery.finetune import METRICS
from seprune.report import Report
from seprune.report import measurement as reports
from seprune.report.training import read_training
from seprune.runtime.checksums import REPORT, sha256
from seprune.runtime.files import Fill, bytes_of, write_together
from seprune.statistics import GateStatistics

_WEIGHTS = "weights"  # among the hashes of a report: which weights it ends with


@dataclass(frozen=True)
class Step:
    """A command that saves a network: what it was asked, what it works with, where it writes."""

    recipe: CommandRecipe
    context: Context
    out: Path
    command: str


def of_cut(
    step: Step, cut: stages.Cut, label: str, statistics: GateStatistics | None
) -> tuple[Report, RunResult]:
    """What a cut came to before anything is measured on images: costs, plan and gates."""
    context = step.context
    stage = reporting.RECOVERED.get(step.recipe.prune.recover, "pruned")
    dense, small = (
        measurement(name, at, _costs(context, model))
        for name, at, model in (
            ("baseline", None, context.network.model),
            (stage, label, cut.recovered),
        )
    )
    budget = BudgetResult(
        label,
        cut.plan,
        as_lists(cut.importance),
        small.macs,
        cut.seconds,
        {stage: step.out},
        notes=cut.notes,
    )
    result = RunResult(
        recipe=step.recipe,
        command=step.command,
        context=context,
        statistics=statistics,
        measurements=(dense, small),
        budgets=(budget,),
        seconds=cut.seconds,
    )
    return _named(reporting.compose(result, step.out), step.out), result


def measured(step: Step, found: RunResult, small: nn.Module, loader: ModelLoader) -> Report:
    """The report of a cut with the metrics of both networks, and their latencies if wanted."""
    models = (step.context.network.model, small)
    both = tuple(
        measurement(m.stage, m.budget, {**stages.measured(step.context, model), "bytes": m.bytes})
        for m, model in zip(found.measurements, models, strict=True)
    )
    result = replace(found, measurements=both)
    if step.recipe.report.latency:
        result = reporting.with_latency(result, loader)
    return _named(reporting.compose(result, step.out), step.out)


def before_tuning(step: Step) -> Report:
    """What is known of a network that is to be tuned: its own report, or what it is measured at."""
    network, data = step.context.network, step.context.images()
    place = Path(network.checkpoint or "")
    if network.checkpoint and is_pruned_folder(place) and (place / REPORT).is_file():
        found = reports.read(place)
        own = {**data_digests(data), _WEIGHTS: network.digest}
        if found.hashes == own and found.measurements and found.measurements[-1].metrics:
            return found
    given = stages.measured(step.context, network.model)
    size = {"bytes": reporting.size_of(network.model)}
    result = RunResult(
        recipe=step.recipe,
        command=step.command,
        context=step.context,
        statistics=None,
        measurements=(measurement("baseline", None, {**given, **size}),),
        budgets=(),
    )
    return reporting.compose(result, step.out)


def of_tuning(
    step: Step, before: Report, found: Mapping[str, Any], numbers: Mapping[str, Any]
) -> Report:
    """The report of a network that was tuned.

    Args:
        before: of `before_tuning`.
        found: what the tuned network was measured at.
        numbers: `FineTuned.numbers`.
    """
    last = before.measurements[-1]
    tuned = replace(measurement("fine-tuned", last.budget, found), latency=last.latency)
    path = step.out / METRICS
    curves = [
        read_training(path, stage=tuned.stage, budget=tuned.budget, metric=tuned.metric)
        for _ in range(path.is_file())
    ]
    budgets = [
        replace(b, tuning=dict(numbers)) if b.label == last.budget else b for b in before.budgets
    ]
    report = replace(
        before,
        command=step.command,
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        seed=step.recipe.seed,
        recipe=_with_section(before.recipe, dump_recipe(step.recipe), "finetune"),
        measurements=[*before.measurements, tuned],
        budgets=budgets,
        training=[*before.training, *curves],
    )
    return _named(report, step.out)


def write(report: Report, folder: Path) -> Report:
    """Keep a report in the folder of the network that it ends with, beside a model card."""
    weights = folder / pruned_model.WEIGHTS
    *before, last = report.measurements
    known = replace(
        report,
        hashes={**report.hashes, _WEIGHTS: sha256(weights)},
        measurements=[*before, replace(last, bytes=weights.stat().st_size)],
    )
    write_together(folder, beside(known))
    return known


def beside(report: Report) -> dict[str, Fill]:
    """A report and a card as files of the folder of the network that it ends with."""
    text = reports.dumps(report).encode(errors="backslashreplace")
    files = {REPORT: text, **reporting.card_files(report, report.measurements[-1])}
    return {name: bytes_of(content) for name, content in files.items()}


def _named(report: Report, folder: Path) -> Report:
    return replace(report, name=folder.absolute().name)


def _costs(context: Context, model: nn.Module) -> dict[str, Any]:
    """A measurement without images."""
    cost = count(model.cpu(), context.network.example(1))
    metric = context.data.task.metric if context.data is not None else "top1"
    return {"metrics": {}, "loss": None, "count": 0, "nonfinite": 0, "macs": cost.macs,
            "params": cost.params, "bytes": reporting.size_of(model), "metric": metric,
            "higher_is_better": True}  # fmt: skip


def _with_section(text: str, other: str, name: str) -> str:
    """A dumped recipe with one section of another one."""
    return "".join({**_sections(text), name: _sections(other)[name]}.values())


def _sections(text: str) -> dict[str, str]:
    """The top-level keys of a dumped recipe, each with its lines."""
    found = re.finditer(r"^(\w+):.*\n(?: .*\n)*", text, flags=re.MULTILINE)
    return {match[1]: match[0] for match in found}
