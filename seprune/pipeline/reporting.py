"""What a run found, put together as a Report and written in its folder."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from torch import nn

from seprune import report as reports
from seprune.errors import InputError
from seprune.export import pruned_model
from seprune.graph.groups import NetworkStructure
from seprune.importance import Importance
from seprune.importance.ablation import Sensitivity
from seprune.measure.flops import not_counted
from seprune.models import ModelLoader
from seprune.pipeline import timing
from seprune.pipeline.context import Context
from seprune.pipeline.inputs import data_digests
from seprune.pipeline.stages import Cut, distils
from seprune.pruning.plan import PruningPlan
from seprune.recipe import Recipe, dump_recipe
from seprune.recovery.finetune import METRICS
from seprune.report import GateSummary, GroupCut, Measurement, Report, TrainingCurve, words
from seprune.report.training import read_training
from seprune.runtime.distributed import first
from seprune.runtime.environment import environment
from seprune.runtime.files import CARD, write_text
from seprune.runtime.reading import read_json, read_text
from seprune.runtime.text import csv_text, from_csv_cell, shell_word
from seprune.statistics import GateStatistics

SHOWN_CLASSES = 10
_COLUMNS = ("group", "unit", "score", "kept")


@dataclass(frozen=True)
class BudgetResult:
    """One budget of a run: where its files are, the numbers of its prune stage and its tuning."""

    label: str
    home: Path
    facts: Mapping[str, Any]
    tuning: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class RunResult:
    """All that a finished run hands to its report."""

    recipe: Recipe
    command: str
    context: Context
    statistics: GateStatistics | None
    measurements: tuple[Measurement, ...]
    budgets: tuple[BudgetResult, ...]
    sensitivity: Sensitivity | None = None
    seconds: Mapping[str, float] = field(default_factory=dict)
    slow: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


def finished(result: RunResult, seconds: Mapping[str, float], notes: Sequence[str]) -> RunResult:
    """The result with the seconds of its stages and the notes on them."""
    return replace(result, seconds=dict(seconds), notes=tuple(notes))


def with_latency(result: RunResult, loader: ModelLoader) -> RunResult:
    """The result with the latency of the dense network and of the last one of each budget."""
    networks: dict[timing.Key, nn.Module] = {("baseline", None): result.context.network.model}
    for budget in result.budgets:
        tuned = (budget.home / "finetuned" / pruned_model.CONFIG).is_file()
        stage, name = ("fine-tuned", "finetuned") if tuned else ("pruned", "pruned")
        networks[stage, budget.label] = pruned_model.load(budget.home / name, loader=loader)
    plan, section, before = result.recipe.plan, result.recipe.report, result.measurements
    timed = plan.latency is not None
    sizes = {*section.batch_sizes, *((plan.batch,) if timed else ())}
    setup = timing.TimingSetup.of(result.context, tuple(sorted(sizes)))
    runtimes = timing.runtimes(section, setup, *((plan.runtime,) if timed else ()))
    measurements = first(lambda: timing.with_latency(before, networks, setup, runtimes=runtimes))
    gates = {layer for g in result.context.structure.gates for layer in g.excitation}
    slow = first(lambda: timing.slow(measurements, networks, setup, excitations=gates))
    return replace(result, measurements=tuple(measurements), slow=tuple(slow))


def write(result: RunResult, out: Path) -> list[Path]:
    """Write report.json, report.csv, report.html and the models' cards; returns their paths."""
    from seprune.report import html, measurement, table

    report = compose(result, out)
    made = [out / "report.json", out / "report.csv"]
    measurement.write(report, made[0])
    table.write_csv(report, made[1])
    if result.recipe.report.html:
        made.append(out / "report.html")
        html.write_html(report, made[-1])
    return made + [card for budget in result.budgets for card in _write_cards(report, budget)]


def compose(result: RunResult, out: Path) -> Report:
    """The report of the run in the folder `out`."""
    info = result.context.images().info
    rows = shown_classes(info.classes, result.recipe.report.classes)
    network = result.context.network
    return Report(
        name=result.recipe.name,
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        command=result.command,
        seed=result.recipe.seed,
        model={
            "name": network.architecture.name,
            "input": list(network.shape),
            "classes": network.architecture.classes,
            "checkpoint": network.checkpoint,
            "sha256": network.digest,
            "base_model": network.trained_for.base_model,
            "notes": list(network.notes),
        },
        data={
            "source": info.source,
            "counts": {
                "training": info.training,
                "validation": info.validation,
                "reporting": info.reporting,
            },
            "classes": [info.classes[row] for row in rows],
            "preprocessing": info.preprocessing.plain(),
            "task": info.task,
            "skipped": list(info.skipped),
            "notes": [*info.notes, *result.notes],
        },
        environment=environment(),
        hashes=data_digests(result.context.images()),
        recipe=dump_recipe(result.recipe),
        measurements=list(result.measurements),
        budgets=[_budget(result, budget) for budget in result.budgets],
        gates=gate_summaries(result.context.structure, result.statistics, classes=rows),
        warnings=_warnings(result),
        not_pruned=_not_pruned(result),
        seconds=dict(result.seconds),
        runtime=_runtime_asked_for(result.recipe),
        training=list(_trainings(result, out)),
        sensitivity=result.sensitivity.plain() if result.sensitivity else {},
        not_counted=not_counted(network.model, network.example(1)),
    )


def _runtime_asked_for(recipe: Recipe) -> str:
    """That of a latency budget, else the first that the report lists."""
    listed = recipe.report.latency
    if recipe.plan.latency is None and not isinstance(listed, bool) and listed:
        return str(listed[0])
    return recipe.plan.runtime


def shown_classes(known: Sequence[str], chosen: Sequence[str]) -> list[int]:
    """Rows of the classes that were chosen; else all, or ten evenly spread over many."""
    rows = [known.index(name) for name in chosen if name in known]
    step = max(1.0, (len(known) - 1) / (SHOWN_CLASSES - 1))
    return rows or [round(n * step) for n in range(min(len(known), SHOWN_CLASSES))]


def gate_summaries(
    structure: NetworkStructure, statistics: GateStatistics | None, *, classes: Sequence[int] = ()
) -> list[GateSummary]:
    """Every gate with its statistics and the means of these classes."""
    owners: dict[str, list[str]] = {}
    for group in structure.groups:
        for link in group.gates:
            owners.setdefault(link.gate, []).append(group.name)
    values = statistics.values if statistics is not None else {}
    return [
        GateSummary.of(g, values.get(g.name, {}), groups=owners.get(g.name, ()), classes=classes)
        for g in structure.gates
    ]


def write_importance(cut: Cut, path: Path) -> None:
    """One row a unit: group, unit, score, kept."""
    rows: list[list[Any]] = [list(_COLUMNS)]
    for group in cut.plan.groups:
        kept = set(group.keep)
        scores = cut.importance.scores.get(group.name)
        for unit in range(group.units):
            score = "" if scores is None else repr(float(scores[unit]))
            rows.append([group.name, unit, score, int(unit in kept)])
    write_text(path, csv_text(rows))


def read_importance(path: Path, criterion: str) -> Importance:
    """The scores that `write_importance` wrote.

    Raises:
        InputError: it is not such a table.
    """
    scores: dict[str, list[float]] = {}
    try:
        for row in csv.DictReader(io.StringIO(read_text(path))):
            if row["score"]:
                scores.setdefault(from_csv_cell(row["group"]), []).append(float(row["score"]))
    except (KeyError, TypeError, ValueError, csv.Error) as error:
        raise InputError(
            f"{path}: not a table of scores",
            why=f"it needs UTF-8 text with the columns {', '.join(_COLUMNS)} ({error})",
            fix=f"remove {shell_word(path)} and give the same command again",
            code="damaged",
        ) from error
    import torch

    tensors = {n: torch.tensor(v, dtype=torch.float64) for n, v in scores.items()}
    return Importance(criterion, tensors)


def size_of(model: nn.Module) -> int:
    """Bytes of the weights as a file holds them."""
    return sum(t.numel() * t.element_size() for t in model.state_dict().values())


def _budget(result: RunResult, budget: BudgetResult) -> reports.BudgetReport:
    plan = PruningPlan.loads(read_json(budget.home / "plan.json"), path=budget.home)
    facts = budget.facts["plan"]
    scores = read_importance(budget.home / "importance.csv", facts["criterion"]).scores
    prunable = {g.name: g.prunable for g in result.context.structure.groups}
    layers = {g.name: list(g.layers) for g in result.context.structure.groups}
    groups = [
        GroupCut(
            name=g.name,
            before=g.units,
            after=len(g.keep),
            prunable=prunable.get(g.name, True),
            reason=g.reason,
            layers=layers.get(g.name, []),
            scores=[float(s) for s in scores[g.name]] if g.name in scores else [],
            keep=list(g.keep),
        )
        for g in plan.groups
    ]
    dense = result.context.structure.macs_at(result.context.structure.full_widths())
    reached = budget.facts["pruned"]["macs"] / dense
    target = facts["targets"].get("macs", dense * reached) / dense
    return reports.BudgetReport(
        label=budget.label,
        target=float(target),
        reached=float(reached),
        criterion=facts["criterion"],
        allocation=facts["allocation"],
        seconds={k: float(v) for k, v in budget.facts["laps"].items()},
        groups=groups,
        history=[dict(t) for t in plan.history],
        tuning=dict(budget.tuning),
        choice=dict(facts.get("candidates", {})),
        removed=plan.removed.names(),
    )


def _trainings(result: RunResult, out: Path) -> Iterator[TrainingCurve]:
    """Every training of the run that left its metrics."""
    metric = result.measurements[0].metric if result.measurements else "top1"
    places: list[tuple[str, str | None, Path]] = [("baseline", None, out / "trained")]
    places += [("fine-tuned", b.label, b.home / "finetuned") for b in result.budgets]
    for stage, budget, folder in places:
        if (path := folder / METRICS).is_file():
            yield read_training(path, stage=stage, budget=budget, metric=metric)


def _not_pruned(result: RunResult) -> list[dict[str, str]]:
    if not result.budgets:
        return [
            {"group": g.name, "reason": g.reason or ""}
            for g in result.context.structure.groups
            if not g.prunable
        ]
    budget = _budget(result, result.budgets[-1])
    return [{"group": g.name, "reason": g.reason} for g in budget.groups if g.reason]


def _warnings(result: RunResult) -> list[str]:
    notes = list(result.statistics.warnings) if result.statistics is not None else []
    idle = [g.name for g in result.context.structure.gates if not g.runs]
    if idle:
        notes.append(f"gates that never run: {', '.join(idle)}")
    notes += across_channels(result.context.structure)
    if result.context.network.digest is None:
        notes.append("the weights are random: costs are meaningful, accuracies are not")
    found = result.measurements[0].metrics if result.measurements else {}
    notes += words.published(result.context.network.published, words.finite(found))
    unknown = set(result.recipe.report.classes) - set(result.context.images().info.classes)
    if unknown:
        notes.append(f"report.classes: no class is called {', '.join(sorted(unknown))}")
    if result.context.runtime.shared_machine and result.recipe.report.latency:
        notes.append("latencies were not measured: other runs worked on this machine")
    tuning = result.recipe.finetune
    if tuning.epochs and tuning.distill and not distils(result.context):
        notes.append("a detector in training gives losses, so it was tuned without a teacher")
    timed = (budget.facts["plan"].get("latency") or {} for budget in result.budgets)
    notes += list(dict.fromkeys(facts["note"] for facts in timed if facts.get("note")))
    return [*notes, *result.slow]


def across_channels(structure: NetworkStructure) -> list[str]:
    """A note on the operators that look across channels of groups that can be cut."""
    places = sorted({g.caveat.partition(" looks")[0] for g in structure.groups if g.caveat})
    if not places:
        return []
    more = f" and {len(places) - 3} more" if len(places) > 3 else ""
    verb = "looks" if len(places) == 1 else "look"
    return [
        f"{', '.join(places[:3])}{more} {verb} across channels, so that a cut network is not its "
        "parent without them: recalibrate, refit or tune it"
    ]


def _write_cards(report: Report, budget: BudgetResult) -> list[Path]:
    """A model card beside every saved model."""
    from seprune.report.card import model_card

    made = []
    for m in report.measurements:
        name = {"fine-tuned": "finetuned", "pruned": "pruned"}.get(m.stage)
        folder = budget.home / (name or "")
        if m.budget == budget.label and name and folder.is_dir():
            made.append(folder / CARD)
            write_text(made[-1], model_card(report, m))
    return made
