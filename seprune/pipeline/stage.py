"""Stages as values: what one depends on, what it does, and what its record in the journal holds."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NotRequired, TypedDict

from seprune.pipeline.journal import stage_key
from seprune.report.facts import ChoiceFacts, TuningFacts


@dataclass(frozen=True)
class Output:
    """What a stage wrote, relative to the run folder, and its numbers."""

    files: Sequence[str | Path]
    facts: Mapping[str, Any]


class StageFacts(TypedDict):
    """The numbers that every record has."""

    seconds: float


class Measured(TypedDict):
    """What `stages.measured` gives."""

    loss: float | None
    count: int
    nonfinite: int
    macs: int
    params: int
    metrics: dict[str, float | None]
    metric: str
    higher_is_better: bool
    bytes: NotRequired[int | None]


class BaselineFacts(StageFacts, Measured):
    """Of `baseline`."""


class PlannedFacts(TypedDict):
    """The facts of a plan that reports show."""

    criterion: str
    allocation: str
    targets: dict[str, float]
    candidates: NotRequired[ChoiceFacts]


class PruneFacts(StageFacts):
    """Of a `prune` stage that ends a budget."""

    pruned: Measured
    recovered: Measured
    plan: PlannedFacts
    laps: dict[str, float]
    notes: NotRequired[list[str]]


class FinetuneFacts(StageFacts, Measured):
    """Of `finetune`."""

    tuning: TuningFacts
    last: NotRequired[Measured]


@dataclass(frozen=True)
class Stage:
    """One step of a run.

    Attributes:
        name: as the journal has it, such as `prune/macs 0.5`.
        inputs: all that its result depends on, as plain data; what its key is the hash of.
        run: does the work and writes its files.
        shared: its files lie at the same place in every run, so that runs can take them over from
            each other.
        facts: what the numbers of its record have to be; a record with others was not ours.
    """

    name: str
    inputs: Mapping[str, Any]
    run: Callable[[], Output]
    shared: bool = False
    facts: type[Any] = StageFacts

    @property
    def key(self) -> str:
        """The hash of the inputs."""
        return stage_key(**self.inputs)
