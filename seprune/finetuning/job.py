"""One fine-tuning from its start, or from where it was stopped, to its best weights."""

from __future__ import annotations

import copy
import json
import math
import random
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from seprune.data import Loader
from seprune.data.augment import seed_of
from seprune.errors import EnvironmentFault, InputError
from seprune.evaluation import Batches, Evaluation, evaluate, recalibrate, share
from seprune.files import write_text
from seprune.finetuning.generations import (
    Generation,
    has_generation,
    load_generation,
    save_generation,
)
from seprune.finetuning.learner import Learner, detach, part
from seprune.finetuning.objective import rate
from seprune.finetuning.settings import Epoch, FineTuned, FineTuneSettings
from seprune.processes import first, join, resolve_device, sum_over_processes
from seprune.progress import Track

METRICS = "metrics.jsonl"
CHECK_STEPS = 50  # how often the loss is read back to see whether it is still a number


@dataclass
class Progress:
    """Where training stands; with the learner's snapshot, all that a resumed run needs."""

    epoch: int = 0
    step: int = 0
    loss: float = 0.0
    lr_scale: float = 1.0
    rollbacks: int = 0
    best_epoch: int = -1
    best: tuple[float, float] = (-1.0, 0.0)
    history: list[dict[str, Any]] = field(default_factory=list)
    before: dict[str, Any] | None = None
    recalibrated: dict[str, Any] | None = None


class DivergedError(Exception):
    """The loss, or an output on the validation images, is no number any more."""


class Job:
    def __init__(
        self,
        model: nn.Module,
        settings: FineTuneSettings,
        *,
        teacher: nn.Module | None,
        loader: Any,
        folder: Path | None,
        track: Track,
    ):
        self.given, self.settings, self.track = model, settings, track
        self.device = resolve_device(settings.device)
        self.learner = Learner(model, settings, teacher=teacher, device=self.device)
        self.rank, self.world = join(self.device)
        self.loader = share(loader, self.device, self.rank, self.world, training=True)
        self.steps = len(loader)
        self.folder = folder
        self.at = Progress()
        self.best: dict[str, Tensor] = {}
        self.last = Generation({}, {})
        self.identity: dict[str, str] = {}

    def resume(self, identity: dict[str, str]) -> bool:
        """Take up the newest saved generation; False where there is none."""
        self.identity = identity
        state = self.folder / "state" if self.folder else None
        if state is None or not first(lambda: has_generation(state)):
            return False
        found = load_generation(state)
        assert found is not None
        other = [
            name for name, value in identity.items() if found.facts["identity"].get(name) != value
        ]
        if other:
            raise InputError(
                f"{self.folder}: holds the state of another fine-tuning",
                why=f"it differs in: {', '.join(other)}",
                fix=f"choose another folder, or delete {self.folder}/state to start again",
            )
        self._restore(found)
        self._report()
        return True

    def begin(self, calibration: Batches, validation: Batches | None) -> None:
        """Recalibrate BatchNorm, and keep the starting point."""
        device = str(self.device)
        judge = self.learner.judged
        if validation is not None:
            self.at.before = asdict(evaluate(judge, validation, device=device, track=self.track))
        if self.settings.recalibrate:
            fresh = recalibrate(self.given, calibration, device=device, track=self.track)
            self.learner.raw.load_state_dict(fresh.state_dict())
            if self.learner.average is not None:
                self.learner.average.load_state_dict(fresh.state_dict())
            if validation is not None:
                score = evaluate(judge, validation, device=device, track=self.track)
                self.at.recalibrated = asdict(score)
        self._keep_best()
        self._save()

    def epoch(self, validation: Batches | None) -> None:
        """The rest of one epoch, its validation, and the commit."""
        at, settings = self.at, self.settings
        seed_everything(settings.seed, at.epoch)
        self.loader.set_epoch(at.epoch, at.step)
        total = torch.tensor(at.loss, dtype=torch.float64, device=self.device)
        images_seen, start, lr = 0, time.perf_counter(), 0.0
        batches = self.track(
            self.loader, label=self._label(), total=self.steps - at.step, unit="batches"
        )
        for images, labels in batches:
            lr = self._rate()
            seed = seed_of(settings.seed, at.epoch, at.step, self.rank)
            weight = self._weight(len(images))
            total += self.learner.step(images, labels, lr=lr, seed=seed, weight=weight)
            images_seen += len(images) * self.world
            at.step += 1
            if at.step < self.steps:
                self._within(total)
        at.loss = self._mean(total)
        speed = images_seen / max(time.perf_counter() - start, 1e-9)
        self._close(validation, lr, speed)

    def _within(self, total: Tensor) -> None:
        every = self.settings.save_steps if isinstance(self.loader, Loader) else 0
        save = every and self.at.step % every == 0
        if save or self.at.step % CHECK_STEPS == 0:
            self.at.loss = self._mean(total)
            total.fill_(self.at.loss)
            if save:
                self._save()

    def _mean(self, total: Tensor) -> float:
        mean = float(sum_over_processes(total) / self.world)
        if not math.isfinite(mean):
            raise DivergedError
        return mean

    def _close(self, validation: Batches | None, lr: float, speed: float) -> None:
        at = self.at
        score = None
        if validation is not None:
            score = evaluate(
                self.learner.judged,
                validation,
                device=str(self.device),
                precision=self.settings.precision,
                track=self.track,
            )
            if score.nonfinite:
                raise DivergedError
        row = Epoch(
            epoch=at.epoch,
            step=(at.epoch + 1) * self.steps,
            loss=at.loss / self.steps,
            lr=lr,
            top1=score.top1 if score else None,
            validation_loss=score.loss if score else None,
            images_per_second=speed,
        )
        at.history.append(asdict(row))
        rank = (score.top1, -score.loss) if score else (0.0, float(at.epoch))
        if rank > tuple(at.best):
            at.best, at.best_epoch = rank, at.epoch
            self._keep_best()
        at.epoch, at.step, at.loss = at.epoch + 1, 0, 0.0
        self._save()
        self._report()
        self._plot(row)

    def roll_back(self) -> None:
        """Back to the last good generation at half the learning rate; the second time, give up."""
        where, lr = f"epoch {self.at.epoch}, step {self.at.step}", self._rate()
        if self.at.rollbacks:
            raise InputError(
                f"the training loss became NaN or infinite again in {where}",
                why=f"it was rolled back once and went on at half the learning rate, {lr:.3g}",
                fix="check images and weights, or set a smaller finetune.lr or finetune.clip=1"
                + (f"; the best weights so far are in {self.folder}/state" if self.folder else ""),
            )
        self._restore(self.last)
        self.at.rollbacks += 1
        self.at.lr_scale /= 2
        self._save()

    def result(self) -> FineTuned:
        """Copies of the model that was given, with the best and with the last weights."""
        at = self.at
        tuned = last = copy.deepcopy(self.given)
        tuned.load_state_dict(self.best)
        if at.best_epoch != at.epoch - 1:
            last = copy.deepcopy(self.given)
            last.load_state_dict(self.learner.judged.state_dict())
        return FineTuned(
            model=tuned,
            last=last,
            history=tuple(Epoch(**row) for row in at.history),
            best_epoch=at.best_epoch,
            before=Evaluation(**at.before) if at.before else None,
            recalibrated=Evaluation(**at.recalibrated) if at.recalibrated else None,
            accumulate=self.learner.parts,
            rollbacks=at.rollbacks,
        )

    def _rate(self) -> float:
        settings, at = self.settings, self.at
        factor = rate(
            at.epoch * self.steps + at.step,
            steps=settings.epochs * self.steps,
            warmup=round(settings.warmup_epochs * self.steps),
            schedule=settings.schedule,
        )
        return settings.lr * factor * at.lr_scale

    def _weight(self, mine: int) -> float:
        """DDP averages over processes; their parts of a batch may differ by one image."""
        return mine * self.loader.world / self.loader.batch_size

    def _label(self) -> str:
        label = f"epoch {self.at.epoch + 1}/{self.settings.epochs}"
        if self.at.history:
            last = self.at.history[-1]
            label += f" loss {last['loss']:.3f}"
            label += f" top-1 {last['top1']:.2%}" if last["top1"] is not None else ""
            label += f" {last['images_per_second']:.0f} images/s"
        return f"{label} lr {self._rate():.2g}"

    def _keep_best(self) -> None:
        self.best = {n: detach(t) for n, t in self.learner.judged.state_dict().items()}

    def _save(self) -> None:
        tensors = self.learner.snapshot() | {f"best.{n}": t for n, t in self.best.items()}
        at = copy.deepcopy(vars(self.at))
        facts = {"at": at, "learner": self.learner.facts(), "identity": self.identity}
        self.last = Generation(tensors, facts)
        if self.folder and self.rank == 0:
            save_generation(self.folder / "state", self.last)

    def _restore(self, generation: Generation) -> None:
        self.learner.restore(generation.tensors, generation.facts["learner"])
        self.best = part(generation.tensors, "best.")
        self.at = Progress(**copy.deepcopy(generation.facts["at"]))
        self.last = generation

    def _report(self) -> None:
        """One line an epoch, written anew: what follows a kill repeats no line."""
        if self.folder and self.rank == 0:
            rows = [_finite(row) for row in self.at.history]
            lines = "".join(json.dumps(row, allow_nan=False) + "\n" for row in rows)
            write_text(self.folder / METRICS, lines)

    def _plot(self, row: Epoch) -> None:
        if self.folder and self.rank == 0 and self.settings.tensorboard:
            with _tensorboard(self.folder / "tensorboard") as board:
                for name, value in _finite(asdict(row)).items():
                    if value is not None and name not in ("epoch", "step"):
                        board.add_scalar(name, value, row.step)


def _finite(row: dict[str, Any]) -> dict[str, Any]:
    return {n: None if v != v else v for n, v in row.items()}


def seed_everything(*key: int) -> None:
    """The global generators, for loaders and data sets that are not seprune's."""
    seed = seed_of(*key)
    torch.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed % 2**32)


def _tensorboard(folder: Path) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise EnvironmentFault(
            "finetune.tensorboard needs the package tensorboard",
            why=str(error),
            fix='pip install "seprune[tensorboard]"',
        ) from error
    return SummaryWriter(str(folder))
