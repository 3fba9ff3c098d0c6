"""What a run found, put together as a Report and written in its folder."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from torch import nn

from seprune.data import DataInfo
from seprune.export import pruned_model
from seprune.graph.groups import NetworkStructure
from seprune.importance.ablation import Sensitivity
from seprune.measure.flops import not_counted
from seprune.models import ModelLoader
from seprune.pipeline import timing
from seprune.pipeline.budget_result import BudgetResult
from seprune.pipeline.class_examples import class_examples
from seprune.pipeline.context import Context
from seprune.pipeline.inputs import data_digests
from seprune.pipeline.stages import distils
from seprune.recipe import CommandRecipe, dump_recipe
from seprune.recovery.finetune import METRICS
from seprune.report import ClassExamples, GateSummary, Measurement, Report, TrainingCurve, words
from seprune.report.training import read_training
from seprune.runtime.checksums import CARD, PICTURE
from seprune.runtime.distributed import first
from seprune.runtime.environment import environment
from seprune.runtime.files import bytes_of, write_together
from seprune.statistics import GateStatistics

SHOWN_CLASSES = 10
RECOVERED = {
    "bn": "recalibrated",
    "refit": "refitted",
    "reconstruct": "reconstructed",
    "scratch": "drawn anew",
}
"""Name of the measurement after each way to recover; `none` has none."""


@dataclass(frozen=True)
class RunResult:
    """All that a finished run, or a step of one, hands to its report."""

    recipe: CommandRecipe
    command: str
    context: Context
    statistics: GateStatistics | None
    measurements: tuple[Measurement, ...]
    budgets: tuple[BudgetResult, ...]
    sensitivity: Sensitivity | None = None
    seconds: Mapping[str, float] = field(default_factory=dict)
    slow: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


def measurement(stage: str, budget: str | None, facts: Mapping[str, Any]) -> Measurement:
    """One network's numbers as the report has them; those that were not taken are missing."""
    names = ("loss", "count", "nonfinite", "macs", "params", "bytes", "metrics", "metric")
    numbers = {name: facts.get(name) for name in (*names, "higher_is_better")}
    numbers["by_class"] = facts.get("by_class", {})
    return Measurement(stage=stage, budget=budget, **numbers)  # type: ignore[arg-type]


def finished(result: RunResult, seconds: Mapping[str, float], notes: Sequence[str]) -> RunResult:
    """The result with the seconds of its stages and the notes on them."""
    return replace(result, seconds=dict(seconds), notes=tuple(notes))


def with_latency(result: RunResult, loader: ModelLoader) -> RunResult:
    """The result with the latency of the dense network and of the last one of each budget."""
    networks: dict[timing.Key, nn.Module] = {("baseline", None): result.context.network.model}
    for budget in result.budgets:
        stage, folder = list(budget.networks.items())[-1]
        networks[stage, budget.label] = pruned_model.load(folder, loader=loader)
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
    network, data = result.context.network, result.context.data
    classes = data.info.classes if data else network.trained_for.labels
    rows = shown_classes(classes, result.recipe.report.classes)
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
        data={} if data is None else _about(data.info, rows, result.notes),
        environment=environment(),
        hashes={} if data is None else data_digests(data),
        recipe=dump_recipe(result.recipe),
        measurements=list(result.measurements),
        budgets=[budget.report(result.context.structure) for budget in result.budgets],
        gates=(gates := _gates(result, rows)),
        examples=_examples(result, gates),
        warnings=_warnings(result),
        not_pruned=_not_pruned(result),
        seconds=dict(result.seconds),
        runtime=_runtime_asked_for(result.recipe),
        training=list(_trainings(result, out)),
        sensitivity=result.sensitivity.plain() if result.sensitivity else {},
        not_counted=not_counted(network.model, network.example(1)),
    )


def _about(info: DataInfo, rows: Sequence[int], notes: Sequence[str]) -> dict[str, Any]:
    """What a report says of the images; `rows` are the classes whose gates it shows."""
    counts = {name: getattr(info, name) for name in ("training", "validation", "reporting")}
    return {
        "source": info.source,
        "counts": counts,
        "classes": [info.classes[row] for row in rows],
        "preprocessing": info.preprocessing.plain(),
        "task": info.task,
        "skipped": list(info.skipped),
        "notes": [*info.notes, *notes],
    }


def _runtime_asked_for(recipe: CommandRecipe) -> str:
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


def _gates(result: RunResult, rows: Sequence[int]) -> list[GateSummary]:
    """The gates of a network that was cut; another one is not looked at for its report."""
    if not result.budgets:
        return []
    return gate_summaries(result.context.structure, result.statistics, classes=rows)


def _examples(result: RunResult, gates: Sequence[GateSummary]) -> list[ClassExamples]:
    """Of classes; other tasks have none."""
    data, recipe, statistics = result.context.data, result.recipe, result.statistics
    count = recipe.report.examples
    if data is None or statistics is None or data.info.task != "classification" or not count:
        return []
    loader = data.calibration(recipe.collect.images, seed=recipe.seed)
    return class_examples(loader, data.info.classes, statistics.values, gates, count=count)


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


def size_of(model: nn.Module) -> int:
    """Bytes of the weights as a file holds them."""
    return sum(t.numel() * t.element_size() for t in model.state_dict().values())


def _trainings(result: RunResult, out: Path) -> Iterator[TrainingCurve]:
    """Every training of the run that left its metrics."""
    metric = result.measurements[0].metric if result.measurements else "top1"
    places: list[tuple[str, str | None, Path]] = [("baseline", None, out / "trained")]
    places += [(s, b.label, home) for b in result.budgets for s, home in b.networks.items()]
    for stage, budget, folder in places:
        if (path := folder / METRICS).is_file():
            yield read_training(path, stage=stage, budget=budget, metric=metric)


def _not_pruned(result: RunResult) -> list[dict[str, str]]:
    groups = result.budgets[-1].plan.groups if result.budgets else ()
    return [{"group": g.name, "reason": g.reason} for g in groups if g.reason]


def _warnings(result: RunResult) -> list[str]:
    notes = list(result.statistics.warnings) if result.statistics is not None else []
    if result.budgets:
        structure = result.context.structure
        idle = [g.name for g in structure.gates if not g.runs]
        notes += [f"gates that never run: {', '.join(idle)}"] if idle else []
        notes += across_channels(structure)
    if result.context.network.digest is None:
        notes.append("the weights are random: costs are meaningful, accuracies are not")
    found = result.measurements[0].metrics if result.measurements else {}
    notes += words.published(result.context.network.published, words.finite(found))
    data = result.context.data
    unknown = set(result.recipe.report.classes) - set(data.info.classes if data else ())
    if unknown:
        notes.append(f"report.classes: no class is called {', '.join(sorted(unknown))}")
    if result.context.runtime.shared_machine and result.recipe.report.latency:
        notes.append("latencies were not measured: other runs worked on this machine")
    tuning = result.recipe.finetune
    if data and tuning.epochs and tuning.distill and not distils(result.context):
        notes.append("a detector in training gives losses, so it was tuned without a teacher")
    timed = (budget.plan.facts.get("latency") or {} for budget in result.budgets)
    notes += list(dict.fromkeys(facts["note"] for facts in timed if facts.get("note")))
    for budget in result.budgets:
        at = f"{budget.label}: " if len(result.budgets) > 1 else ""
        notes += [at + note for note in budget.notes]
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
    made = []
    for m in report.measurements:
        folder = budget.networks.get(m.stage)
        if m.budget == budget.label and folder is not None:
            files = card_files(report, m)
            write_together(folder, {name: bytes_of(c) for name, c in files.items()})
            made += [folder / name for name in files]
    return made


def card_files(report: Report, m: Measurement) -> dict[str, bytes]:
    """The model card of one network of a report, and its picture if there is one."""
    from seprune.report.card import model_card
    from seprune.report.picture import accuracy_picture

    picture = accuracy_picture(report, m)
    card = model_card(report, m, picture=PICTURE if picture else None)
    found = {CARD: card.encode(errors="backslashreplace")}
    return found | ({PICTURE: picture} if picture else {})
