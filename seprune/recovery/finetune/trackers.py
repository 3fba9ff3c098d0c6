"""Trackers: where an epoch's numbers go besides `metrics.jsonl`.

Each keeps to its own settings of where it writes (`WANDB_MODE=offline`, `MLFLOW_TRACKING_URI`,
`TRACKIO_DIR`); a training that is resumed goes on in its own record. What fails on the way is a
warning: no training ends because a tracker does.
"""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from seprune.errors import first_line
from seprune.recovery.finetune.settings import Epoch, FineTuneSettings
from seprune.runtime.extras import require
from seprune.runtime.text import null_for_nan

PROJECT = "seprune"


class Tracker(Protocol):
    """One open record."""

    def log(self, numbers: Mapping[str, float], step: int) -> None:
        """Add one epoch's numbers."""

    def close(self) -> None:
        """Write what is still waiting."""


@dataclass(frozen=True)
class Subject:
    """Which training a record is of.

    Attributes:
        folder: what it writes in.
        key: the same for a training that is resumed, and for no other.
        settings: as JSON types.
    """

    folder: Path
    key: str
    settings: Mapping[str, Any]

    @classmethod
    def of(cls, folder: Path, identity: Mapping[str, str], settings: FineTuneSettings) -> Subject:
        """The training with this identity in this folder."""
        text = json.dumps([str(folder.absolute()), identity], sort_keys=True)
        plain = {n: v for n, v in vars(settings).items() if isinstance(v, str | int | float)}
        return cls(folder, hashlib.sha256(text.encode()).hexdigest()[:16], plain)

    @property
    def name(self) -> str:
        """As people look for it."""
        return f"{self.folder.absolute().name}-{self.key[:6]}"


class _TensorBoard:
    def __init__(self, module: Any, subject: Subject) -> None:
        self.writer = module.SummaryWriter(str(subject.folder / "tensorboard"))

    def log(self, numbers: Mapping[str, float], step: int) -> None:
        for name, value in numbers.items():
            self.writer.add_scalar(name, value, step)
        self.writer.flush()

    def close(self) -> None:
        self.writer.close()


class _Wandb:
    def __init__(self, module: Any, subject: Subject) -> None:
        self.run = module.init(
            project=PROJECT,
            name=subject.name,
            id=subject.key,
            resume="allow",
            config=dict(subject.settings),
            dir=str(subject.folder),
        )

    def log(self, numbers: Mapping[str, float], step: int) -> None:
        self.run.log(dict(numbers), step=step)

    def close(self) -> None:
        self.run.finish()


class _Mlflow:
    TAG = "seprune.key"

    def __init__(self, module: Any, subject: Subject) -> None:
        self.client = module.MlflowClient()
        known = self.client.get_experiment_by_name(PROJECT)
        home = known.experiment_id if known else self.client.create_experiment(PROJECT)
        found = self.client.search_runs([home], f"tags.`{self.TAG}` = '{subject.key}'")
        if found:
            self.run = found[0].info.run_id
            self.client.update_run(self.run, status="RUNNING")
            return
        tags = {self.TAG: subject.key}
        self.run = self.client.create_run(home, tags=tags, run_name=subject.name).info.run_id
        for name, value in subject.settings.items():
            self.client.log_param(self.run, name, value)

    def log(self, numbers: Mapping[str, float], step: int) -> None:
        for name, value in numbers.items():
            self.client.log_metric(self.run, name.replace("@", " at "), value, step=step)

    def close(self) -> None:
        self.client.set_terminated(self.run)


class _Trackio:
    def __init__(self, module: Any, subject: Subject) -> None:
        self.module = module
        module.init(
            project=PROJECT,
            name=subject.name,
            resume="allow",
            config=dict(subject.settings),
            embed=False,
            auto_log_cpu=False,
            auto_log_gpu=False,
        )

    def log(self, numbers: Mapping[str, float], step: int) -> None:
        self.module.log(dict(numbers), step=step)

    def close(self) -> None:
        self.module.finish()


_KINDS: dict[str, tuple[str, Callable[[Any, Subject], Tracker]]] = {
    "tensorboard": ("torch.utils.tensorboard", _TensorBoard),
    "wandb": ("wandb", _Wandb),
    "mlflow": ("mlflow", _Mlflow),
    "trackio": ("trackio", _Trackio),
}


@dataclass
class Trackers:
    """The trackers of one training, opened at its first epoch."""

    names: Sequence[str]
    modules: Mapping[str, Any]
    opened: dict[str, Tracker] = field(default_factory=dict)

    @classmethod
    def of(cls, names: Sequence[str]) -> Trackers:
        """Import them now, so that a missing one does not show after the first epoch.

        Raises:
            EnvironmentFault: an extra is not installed.
        """
        found = {}
        for name in names:
            what = f"finetune.trackers={name} needs the package {name}"
            found[name] = require(_KINDS[name][0], extra=name, what=what)
        return cls(names, found)

    def epoch(self, row: Epoch, subject: Callable[[], Subject]) -> None:
        """Log an epoch with every tracker."""
        known = {n: v for n, v in null_for_nan(row.plain()).items() if v is not None}
        numbers = {n: float(v) for n, v in known.items() if n not in ("epoch", "step")}
        for name in self.names:
            if name not in self.opened:
                self._try(name, partial(self._open, name, subject))
            if name in self.opened:
                self._try(name, partial(self.opened[name].log, numbers, row.epoch))

    def _open(self, name: str, subject: Callable[[], Subject]) -> None:
        self.opened[name] = _KINDS[name][1](self.modules[name], subject())

    def close(self) -> None:
        """End the records of this process."""
        for name in list(self.opened):
            self._try(name, self.opened.pop(name).close)

    @staticmethod
    def _try(name: str, work: Callable[[], object]) -> None:
        try:
            work()
        except Exception as error:  # of a library, its server or the way there
            text = f"{type(error).__name__}: {first_line(error)}"
            warnings.warn(f"{name} did not take this epoch's numbers: {text}", stacklevel=2)
