"""What a run found, put together as a Report and written in its folder."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from torch import nn

from seprune import report as reports
from seprune.data import Data
from seprune.graph.groups import NetworkStructure
from seprune.importance import Importance
from seprune.importance.ablation import Sensitivity
from seprune.measure.flops import not_counted
from seprune.pipeline.inputs import Subject, data_digests
from seprune.pipeline.stages import Cut
from seprune.pruning.plan import PruningPlan
from seprune.recipe import Recipe, dump_recipe
from seprune.report import GateSummary, GroupCut, Measurement, Report
from seprune.runtime.environment import environment
from seprune.runtime.files import CARD, write_text
from seprune.runtime.reading import read_json, read_text
from seprune.runtime.text import csv_text, from_csv_cell
from seprune.statistics import GateStatistics

SHOWN_CLASSES = 10


@dataclass(frozen=True)
class Chapter:
    """One budget of a run: where its files are, what its prune stage and its tuning said."""

    label: str
    home: Path
    facts: Mapping[str, Any]
    tuning: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Told:
    """All that a finished run hands to its report."""

    recipe: Recipe
    command: str
    subject: Subject
    structure: NetworkStructure
    data: Data
    statistics: GateStatistics | None
    measurements: tuple[Measurement, ...]
    chapters: tuple[Chapter, ...]
    seconds: dict[str, float]
    slow: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    crowded: bool = False
    sensitivity: Sensitivity | None = None


def write(told: Told, out: Path) -> list[Path]:
    """Write report.json, report.csv, report.html and the models' cards; returns their paths."""
    from seprune.report import html, measurement, table

    report = compose(told)
    made = [out / "report.json", out / "report.csv"]
    measurement.write(report, made[0])
    table.write_csv(report, made[1])
    if told.recipe.report.html:
        made.append(out / "report.html")
        html.write_html(report, made[-1])
    return made + [card for chapter in told.chapters for card in _write_cards(report, chapter)]


def compose(told: Told) -> Report:
    """The report of a run."""
    info = told.data.info
    rows = shown_classes(info.classes, told.recipe.report.classes)
    subject = told.subject
    return Report(
        name=told.recipe.name,
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        command=told.command,
        seed=told.recipe.seed,
        model={
            "name": subject.architecture.name,
            "input": list(subject.shape),
            "classes": subject.architecture.classes,
            "checkpoint": subject.checkpoint,
            "sha256": subject.digest,
            "notes": list(subject.notes),
        },
        data={
            "source": info.source,
            "counts": {
                "training": info.training,
                "validation": info.validation,
                "reporting": info.reporting,
            },
            "classes": [info.classes[row] for row in rows],
            "skipped": list(info.skipped),
            "notes": [*info.notes, *told.notes],
        },
        environment=environment(),
        hashes=data_digests(told.data),
        recipe=dump_recipe(told.recipe),
        measurements=list(told.measurements),
        budgets=[_budget(told, chapter) for chapter in told.chapters],
        gates=gate_summaries(told.structure, told.statistics, classes=rows),
        warnings=_warnings(told),
        left_whole=_left_whole(told),
        seconds=told.seconds,
        sensitivity=told.sensitivity.plain() if told.sensitivity else {},
        not_counted=not_counted(subject.model, subject.example(1)),
    )


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
    rows: list[list[Any]] = [["group", "unit", "score", "kept"]]
    for group in cut.plan.groups:
        kept = set(group.keep)
        scores = cut.importance.scores.get(group.name)
        for unit in range(group.units):
            score = "" if scores is None else repr(float(scores[unit]))
            rows.append([group.name, unit, score, int(unit in kept)])
    write_text(path, csv_text(rows))


def read_importance(path: Path, criterion: str) -> Importance:
    """The scores that `write_importance` wrote."""
    scores: dict[str, list[float]] = {}
    for row in csv.DictReader(io.StringIO(read_text(path))):
        if row["score"]:
            scores.setdefault(from_csv_cell(row["group"]), []).append(float(row["score"]))
    import torch

    tensors = {n: torch.tensor(v, dtype=torch.float64) for n, v in scores.items()}
    return Importance(criterion, tensors)


def size_of(model: nn.Module) -> int:
    """Bytes of the weights as a file holds them."""
    return sum(t.numel() * t.element_size() for t in model.state_dict().values())


def _budget(told: Told, chapter: Chapter) -> reports.BudgetReport:
    plan = PruningPlan.loads(read_json(chapter.home / "plan.json"), path=chapter.home)
    facts = chapter.facts["plan"]
    scores = read_importance(chapter.home / "importance.csv", facts["criterion"]).scores
    prunable = {g.name: g.prunable for g in told.structure.groups}
    layers = {g.name: list(g.layers) for g in told.structure.groups}
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
    whole = told.structure.macs_at(told.structure.whole())
    reached = chapter.facts["pruned"]["macs"] / whole
    target = facts["targets"].get("macs", whole * reached) / whole
    return reports.BudgetReport(
        label=chapter.label,
        target=float(target),
        reached=float(reached),
        criterion=facts["criterion"],
        allocation=facts["allocation"],
        seconds={k: float(v) for k, v in chapter.facts["laps"].items()},
        groups=groups,
        trace=[dict(t) for t in plan.trace],
        tuning=dict(chapter.tuning),
        choice=dict(facts.get("candidates", {})),
    )


def _left_whole(told: Told) -> list[dict[str, str]]:
    if not told.chapters:
        return [
            {"group": g.name, "reason": g.reason or ""}
            for g in told.structure.groups
            if not g.prunable
        ]
    budget = _budget(told, told.chapters[-1])
    return [{"group": g.name, "reason": g.reason} for g in budget.groups if g.reason]


def _warnings(told: Told) -> list[str]:
    said = list(told.statistics.warnings) if told.statistics is not None else []
    idle = [g.name for g in told.structure.gates if not g.runs]
    if idle:
        said.append(f"gates that never run: {', '.join(idle)}")
    said += across_channels(told.structure)
    if told.subject.digest is None:
        said.append("the weights are random: accuracies say nothing, costs do")
    unknown = set(told.recipe.report.classes) - set(told.data.info.classes)
    if unknown:
        said.append(f"report.classes: no class is called {', '.join(sorted(unknown))}")
    if told.crowded and told.recipe.report.latency:
        said.append("latencies were not measured: other runs worked on this machine")
    return [*said, *told.slow]


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


def _write_cards(report: Report, chapter: Chapter) -> list[Path]:
    """A model card beside every saved model."""
    from seprune.report.card import model_card

    made = []
    for m in report.measurements:
        name = {"fine-tuned": "finetuned", "pruned": "pruned"}.get(m.stage)
        folder = chapter.home / (name or "")
        if m.budget == chapter.label and name and folder.is_dir():
            made.append(folder / CARD)
            write_text(made[-1], model_card(report, m))
    return made
