"""Fine-tuning that chooses its epoch on a validation split and survives being killed."""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Iterator, Sized
from contextlib import closing, contextmanager
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from seprune.data import Data
from seprune.data.placement import Batches
from seprune.errors import InputError
from seprune.recovery.finetune.auto import seed_everything
from seprune.recovery.finetune.batches import FirstBatches, task_of
from seprune.recovery.finetune.features import Teacher
from seprune.recovery.finetune.progress import DivergedError
from seprune.recovery.finetune.settings import RUNTIME, FineTuned, FineTuneSettings
from seprune.recovery.finetune.trainer import Trainer
from seprune.runtime.distributed import united
from seprune.runtime.progress import Track, silent
from seprune.statistics import fingerprint


def finetune(
    model: nn.Module,
    data: Data | Batches | tuple[Batches, Batches],
    settings: FineTuneSettings | None = None,
    *,
    teacher: nn.Module | Teacher | None = None,
    folder: Path | None = None,
    track: Track = silent,
) -> FineTuned:
    """Train a copy of `model`; the same call in the same `folder` goes on where it was stopped.

    What is returned is the best on the validation split, the network given among the candidates.
    Without a split the last epoch is returned, judged by nothing.
    Every random number is a function of (seed, epoch, step, process), so that a resumed run equals
    an unbroken one; on a CPU bit for bit. With a loader that is not seprune's, state is saved only
    after each epoch.

    Args:
        data: a `Data`; a loader of whatever the task takes apart, with a length; or two of them,
            of which the second, for validation, chooses the epoch.
        teacher: a dense parent to distil from; with its plans, if features are to be matched.
        folder: holds the saved state and `metrics.jsonl`.

    Raises:
        InputError: the loss became NaN twice, or `folder` belongs to another fine-tuning.
        EnvironmentFault: out of memory with single images.
    """
    settings = settings or FineTuneSettings()
    data, validation = data if isinstance(data, tuple) else (data, None)
    loader, calibration, validation = _loaders(data, settings, validation)
    teacher = Teacher(teacher) if isinstance(teacher, nn.Module) else teacher
    with united(), _own_random(settings.seed):
        settings = replace(settings, task=task_of(settings.task, loader))
        trainer = Trainer(
            model, settings, teacher=teacher, loader=loader, folder=folder, track=track
        )
        if not trainer.resume(_identity(model, teacher, settings, data)):
            trainer.begin(calibration, validation)
        with closing(trainer.trackers):
            while trainer.at.epoch < settings.epochs:
                try:
                    trainer.epoch(validation)
                except DivergedError:
                    trainer.roll_back()
    return trainer.result()


def _loaders(
    data: Data | Batches, settings: FineTuneSettings, validation: Batches | None
) -> tuple[Any, Batches, Batches | None]:
    """The loaders for training, for calibration, and for validation if there is any."""
    if isinstance(data, Data):
        loader: Any = data.training(
            settings.batch_size, seed=settings.seed, randaugment=settings.randaugment
        )
        if validation is None and data.info.validation:
            validation = data.validation()
        calibration: Batches = data.calibration(max(settings.recalibrate, 1))
        return loader, calibration, validation
    if not isinstance(data, Sized) or not len(data):
        raise InputError(
            "the training loader has no batches"
            if isinstance(data, Sized)
            else "the training loader has no length",
            why="the schedule needs the number of steps",
            fix="give a DataLoader over a data set with a length",
        )
    return data, FirstBatches(data, settings.recalibrate, task=settings.task), validation


def _identity(
    model: nn.Module, teacher: Teacher | None, settings: FineTuneSettings, data: Any
) -> dict[str, str]:
    """Digests of all that makes this fine-tuning what it is, but not of where and how it runs."""
    numbers = {f.name: getattr(settings, f.name) for f in fields(settings) if f.name not in RUNTIME}
    about = f"{len(data)} batches" if not isinstance(data, Data) else _about(data)
    return {
        "settings": json.dumps(numbers),
        "task": repr(settings.task),
        "model": fingerprint(model),
        "teacher": fingerprint(teacher.model) if teacher else "",
        "data": hashlib.sha256(about.encode()).hexdigest(),
    }


def _about(data: Data) -> str:
    info = data.info
    return f"{info.fingerprint} {info.training} {replace(info.preprocessing, source='')!r}"


@contextmanager
def _own_random(seed: int) -> Iterator[None]:
    """Seeded global generators inside, the caller's again afterwards."""
    python, array = random.getstate(), np.random.get_state()
    devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    with torch.random.fork_rng(devices):
        seed_everything(seed)
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(array)
