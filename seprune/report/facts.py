"""What the freer parts of a report hold: the keys that pages and terminals look at."""

from __future__ import annotations

from typing import Any, TypedDict


class ModelFacts(TypedDict, total=False):
    """Which network a report is of."""

    name: str | None
    input: list[int] | None
    classes: int | None
    checkpoint: str | None
    sha256: str | None
    notes: list[str]


class DataFacts(TypedDict, total=False):
    """Which images."""

    source: str | None
    counts: dict[str, int | None]
    classes: list[str] | None
    skipped: Any  # counts or paths, of one part or by part
    notes: list[str]


class DeviceFacts(TypedDict, total=False):
    """One device of `Environment`."""

    device: str
    name: str
    memory: int
    threads: int


class ExtraFacts(TypedDict, total=False):
    """One extra of `Environment`."""

    present: bool
    packages: dict[str, str | None] | None


class Environment(TypedDict, total=False):
    """What a run ran on."""

    disk_free: int | None
    devices: list[DeviceFacts]
    extras: dict[str, ExtraFacts]
    pair: dict[str, Any]


class SensitivityRow(TypedDict):
    """One dependency group of a `SensitivityTable`."""

    group: str
    units: int
    macs: int
    removed: list[int]
    value: list[float]
    loss: list[float | None]


class SensitivityTable(TypedDict):
    """What `Sensitivity.plain` gives."""

    criterion: str
    shares: list[float]
    images: int
    metric: str
    value: float
    loss: float
    groups: list[SensitivityRow]


class TuningFacts(TypedDict):
    """What `FineTuned.numbers` gives."""

    epochs: int
    best_epoch: int
    metric: str
    validation_before: float | None
    validation_recalibrated: float | None
    validation_best: float | None
    chosen: str
    optimizer: str
    lr: float
    norms: str
    trials: int
    accumulate: int
    rollbacks: int


class TrialFacts(TypedDict):
    """One candidate of `ChoiceFacts`."""

    name: str
    error: float | None
    same_as: str | None


class ChoiceFacts(TypedDict):
    """What `PlanChoice.facts` gives."""

    chosen: str
    close: list[str]
    trials: list[TrialFacts]
