"""What a run measured and decided, as plain data: exact inside, pretty only on output."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, is_dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from seprune.errors import InputError
from seprune.measure.latency import Latency
from seprune.report import facts
from seprune.report.artefacts import ArtefactReport, read_artefacts
from seprune.runtime.checksums import ARTEFACTS, REPORT
from seprune.runtime.files import write_text
from seprune.runtime.reading import read_json
from seprune.runtime.text import null_for_nan
from seprune.runtime.typed import typed

FORMAT = 1
_GATE_FACTS = ("name", "channels", "squeeze", "activation", "placement", "runs")
_BOUNDED = ("sigmoid", "hardsigmoid", "softmax")  # where 0.05 and 0.95 are near an end
_NOT_CHANNELS = ("class_count",)  # may be as long as the gate is wide
STAGES = (
    "baseline", "pruned", "recalibrated", "refitted", "reconstructed",
    "drawn anew", "last epoch", "fine-tuned",
)  # fmt: skip


@dataclass(frozen=True)
class Measurement:
    """One network measured on the reporting set; fractions, bytes and milliseconds."""

    stage: str  # one of STAGES
    budget: str | None  # label of the BudgetReport that it was cut to; None: the baseline
    metrics: dict[str, float | None]
    loss: float | None
    count: int
    nonfinite: int
    macs: int
    params: int
    bytes: int | None = None
    latency: list[Latency] = field(default_factory=list)
    metric: str = "top1"  # the one that decides
    higher_is_better: bool = True
    by_class: dict[str, float | None] = field(default_factory=dict)  # the deciding metric

    def __post_init__(self) -> None:
        if self.stage not in STAGES:
            raise ValueError(f"stage {self.stage!r} is none of {', '.join(STAGES)}")

    @property
    def value(self) -> float | None:
        """The metric that decides; None where it was not measured."""
        return self.metrics.get(self.metric)


@dataclass(frozen=True)
class GroupCut:
    """What one budget left of one dependency group; `keep` are unit indices, ascending."""

    name: str
    before: int
    after: int
    prunable: bool = True
    reason: str | None = None  # why it was not pruned
    layers: list[str] = field(default_factory=list)
    scores: list[float | None] = field(default_factory=list)  # one a unit, higher = keep
    keep: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        if any(not 0 <= unit < self.before for unit in self.keep):
            raise ValueError(f"{self.name}: keeps a unit outside of 0..{self.before - 1}")
        if len(self.scores) not in (0, self.before):
            raise ValueError(f"{self.name}: {len(self.scores)} scores for {self.before} units")


@dataclass(frozen=True)
class BudgetReport:
    """One target (`macs 0.5`) and the plan that met it; target and reached are fractions kept."""

    label: str
    target: float
    reached: float
    criterion: str
    allocation: str
    seconds: dict[str, float] = field(default_factory=dict)
    groups: list[GroupCut] = field(default_factory=list)
    history: list[dict[str, Any]] = field(default_factory=list)
    tuning: dict[str, Any] = field(default_factory=dict)  # `FineTuned.numbers`
    choice: dict[str, Any] = field(default_factory=dict)  # `PlanChoice.facts`
    removed: dict[str, list[str]] = field(default_factory=dict)  # modules: `gates`, `blocks`


@dataclass(frozen=True)
class GateSummary:
    """A gate and its statistics: lists with one value a channel, by statistic."""

    name: str
    channels: int
    squeeze: str
    activation: str
    placement: str
    runs: bool = True
    groups: list[str] = field(default_factory=list)
    scales: list[str] = field(default_factory=list)
    statistics: dict[str, list[float | None]] = field(default_factory=dict)  # docs/importance.md
    class_mean: list[list[float | None]] = field(default_factory=list)  # a row for each class shown
    rank_agreement: float | None = None
    saturated: float | None = None  # fraction of (image, channel) pairs below 0.05 or above 0.95

    def __post_init__(self) -> None:
        for values in (*self.statistics.values(), *self.class_mean):
            if len(values) != self.channels:
                raise ValueError(f"{self.name}: {len(values)} values for {self.channels} channels")

    @property
    def spread(self) -> float | None:
        """Standard deviation over images, averaged over the channels; None where unknown."""
        known = [v for v in self.statistics.get("variance", []) if v is not None]
        return sum(math.sqrt(max(v, 0.0)) for v in known) / len(known) if known else None

    @classmethod
    def of(
        cls, gate: Any, values: Mapping[str, Any], *, groups: Sequence[str] = (), classes: Any = ()
    ) -> GateSummary:
        """From a `Gate` and its tensors in `GateStatistics.values`; `classes` are rows to keep."""
        columns = {
            key: plain(value.tolist())
            for key, value in values.items()
            if tuple(value.shape) == (gate.channels,) and key not in _NOT_CHANNELS
        }
        by_class = np.asarray(values["class_mean"]) if "class_mean" in values else None
        if by_class is not None:  # classes without images have no value
            seen = np.asarray(values.get("class_count", np.ones(len(by_class)))) > 0
            if seen.any():
                columns["class_average"] = by_class[seen].mean(0).tolist()
        agreement = values.get("rank_agreement")
        idle = [*columns.get("low", ()), *columns.get("high", ())]
        bounded = gate.activation in _BOUNDED and idle and None not in idle
        return cls(
            **{key: getattr(gate, key) for key in _GATE_FACTS},
            groups=list(groups),
            scales=list(gate.scales),
            statistics=columns,
            class_mean=[]
            if by_class is None
            else [plain(by_class[row].tolist()) for row in classes if row < len(by_class)],
            rank_agreement=None if agreement is None else float(agreement),
            saturated=sum(idle) / gate.channels if bounded else None,
        )


@dataclass(frozen=True)
class ClassExamples:
    """Images of the class whose mean excitation in a gate is the lowest or the highest."""

    gate: str
    end: str  # lowest or highest
    name: str  # of the class
    excitation: float  # mean over its images and the channels
    images: list[str]  # JPEG in base64


@dataclass(frozen=True)
class TrainedEpoch:
    """One line of `metrics.jsonl`; None where it was not measured."""

    epoch: int  # from 1
    loss: float | None  # mean over the images trained on
    validation_loss: float | None
    value: float | None  # the deciding metric on the validation split
    lr: float | None  # at the end of the epoch


@dataclass(frozen=True)
class TrainingCurve:
    """How one network was trained, epoch by epoch."""

    stage: str  # of the measurement that came of it
    budget: str | None
    metric: str
    epochs: list[TrainedEpoch] = field(default_factory=list)


@dataclass(frozen=True)
class Report:
    """Everything that a reader of the run may ask for; an unfinished run fills less of it."""

    name: str
    created: str
    command: str
    seed: int
    model: dict[str, Any]  # name, input, classes, checkpoint, sha256
    data: dict[str, Any]  # source, counts, skipped, classes: names of the rows of class_mean
    environment: dict[str, Any] = field(default_factory=dict)
    hashes: dict[str, str] = field(default_factory=dict)
    recipe: str = ""  # the resolved YAML
    measurements: list[Measurement] = field(default_factory=list)
    budgets: list[BudgetReport] = field(default_factory=list)
    gates: list[GateSummary] = field(default_factory=list)
    examples: list[ClassExamples] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    training: list[TrainingCurve] = field(default_factory=list)  # the dense network's, the budgets'
    sensitivity: dict[str, Any] = field(default_factory=dict)  # report/sensitivity.py
    not_pruned: list[dict[str, str]] = field(default_factory=list)  # group, reason
    seconds: dict[str, float] = field(default_factory=dict)  # by stage
    runtime: str = "eager"  # that speed was asked for on
    not_counted: list[str] = field(default_factory=list)  # operators without a MAC formula
    artefacts: list[ArtefactReport] = field(default_factory=list)  # files that it was exported to
    format: int = FORMAT

    @property
    def baseline(self) -> Measurement | None:
        """The dense network's measurement, None where the run did not come so far."""
        return next((m for m in self.measurements if m.stage == "baseline"), None)

    @property
    def metrics(self) -> list[str]:
        """Names of what was measured; the one that decides comes first."""
        names = [self.metric, *(name for m in self.measurements for name in m.metrics)]
        return list(dict.fromkeys(names))

    @property
    def metric(self) -> str:
        """The metric that decides."""
        return self.measurements[0].metric if self.measurements else "top1"

    def budget(self, label: str | None) -> BudgetReport | None:
        """The budget with this label."""
        return next((b for b in self.budgets if b.label == label), None)


def to_json(report: Report) -> dict[str, Any]:
    """The report as one JSON document; NaN and infinities become null."""
    document = plain(report)
    assert isinstance(document, dict)
    return document


def from_json(document: Any, *, source: str = "report.json") -> Report:
    """The report in a JSON document.

    Raises:
        InputError: another format version, or a value that does not belong; names the place.
    """
    if not isinstance(document, dict) or not isinstance(document.get("format"), int):
        raise InputError(
            f"{source}: not a report of seprune",
            why="it has no format number",
            fix="give a run folder or its report.json",
        )
    if document["format"] > FORMAT:
        raise InputError(
            f"{source}: report format {document['format']}, this seprune reads up to {FORMAT}",
            why="a newer version of seprune wrote it",
            fix="pip install --upgrade seprune",
        )
    fix = "restore it, or give the same `seprune run` command again"
    report = typed(Report, document, source=source, fix=fix)
    for place, kind, value in _facts(report):
        if value:
            typed(kind, value, source=f"{source}: {place}", fix=fix)
    _require_few(report, source, fix)
    return report


def _require_few(report: Report, source: str, fix: str) -> None:
    """Each row takes its time in a table and in a figure; a file may hold millions of them."""
    groups, epochs = ([b.groups for b in report.budgets], [t.epochs for t in report.training])
    for what, rows, limit in (
        ("measurements", len(report.measurements), 2_000),
        ("budgets", len(report.budgets), 300),
        ("groups", sum(map(len, groups)), 20_000),
        ("gates", len(report.gates), 5_000),
        ("trainings", len(report.training), 1_000),
        ("epochs", sum(map(len, epochs)), 20_000),
        ("examples", len(report.examples), 5_000),
        ("exported files", len(report.artefacts), 1_000),
        ("notes", len(report.warnings) + len(report.not_pruned), 20_000),
    ):
        if rows > limit:
            raise InputError(
                f"{source}: {rows:,} {what}, more than a report can show",
                why=f"it shows {limit:,} at most",
                fix=fix,
            )


def _facts(report: Report) -> Iterator[tuple[str, type[Any], Mapping[str, Any]]]:
    """The parts of a report that are plain dicts: where, what they should be, what they are."""
    yield "model", facts.ModelFacts, report.model
    yield "data", facts.DataFacts, report.data
    yield "environment", facts.Environment, report.environment
    yield "sensitivity", facts.SensitivityTable, report.sensitivity
    for number, budget in enumerate(report.budgets):
        yield f"budgets[{number}].tuning", facts.TuningFacts, budget.tuning
        yield f"budgets[{number}].choice", facts.ChoiceFacts, budget.choice


def write(report: Report, path: Path) -> None:
    """Write `report.json`."""
    write_text(path, dumps(report))


def dumps(report: Report) -> str:
    """The report as JSON, a line for each top-level key, so that it can be looked at."""
    lines = (
        f" {json.dumps(key)}: {json.dumps(value, allow_nan=False)}"
        for key, value in to_json(report).items()
    )
    return "{\n" + ",\n".join(lines) + "\n}\n"


def read(path: Path) -> Report:
    """The report in a file, or in the `report.json` of a folder, with what was exported from it."""
    path = path / REPORT if path.is_dir() else path
    found = from_json(read_json(path), source=str(path))
    exported = read_artefacts(path.parent)
    if exported:
        found = replace(found, artefacts=exported)
        _require_few(found, str(path.parent / ARTEFACTS), "remove it, and export again")
    return found


def plain(value: Any) -> Any:
    """Dataclasses as dicts, NaN and infinities as null: what JSON can hold."""
    if is_dataclass(value):
        return {f.name: plain(getattr(value, f.name)) for f in fields(value)}
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    return null_for_nan(value)
