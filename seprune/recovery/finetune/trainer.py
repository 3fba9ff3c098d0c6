"""One fine-tuning from its start, or from where it was stopped, to its best weights."""

from __future__ import annotations

import copy
import math
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from seprune.data import Loader
from seprune.data.augment import seed_of
from seprune.data.placement import Batches, share
from seprune.errors import InputError, StoppedError, UsageError
from seprune.measure.metrics import Evaluation, evaluate
from seprune.recovery.finetune.auto import (
    best_rate,
    default_rate,
    plan_trials,
    seed_everything,
    settle,
    try_rates,
    warmup_steps,
)
from seprune.recovery.finetune.batches import some_of
from seprune.recovery.finetune.checkpoints import (
    Generation,
    has_generation,
    load_generation,
    save_generation,
    start_again,
)
from seprune.recovery.finetune.features import Teacher
from seprune.recovery.finetune.loss import rate
from seprune.recovery.finetune.metrics_log import LiveMetrics, write_metrics
from seprune.recovery.finetune.progress import MANY, DivergedError, Progress, SavedFacts, rank_of
from seprune.recovery.finetune.settings import Epoch, FineTuned, FineTuneSettings
from seprune.recovery.finetune.significance import PairedTest
from seprune.recovery.finetune.step import TrainState, detach, part
from seprune.recovery.finetune.trackers import Subject, Trackers
from seprune.recovery.recalibrate import recalibrate
from seprune.runtime.distributed import first, join, resolve_device, sum_over_processes
from seprune.runtime.interrupts import unbroken
from seprune.runtime.progress import Track
from seprune.runtime.typed import require_like

CHECK_STEPS = 50  # how often the loss is read back to see whether it is still a number


class Trainer:
    def __init__(
        self,
        model: nn.Module,
        settings: FineTuneSettings,
        *,
        teacher: Teacher | None,
        loader: Any,
        folder: Path | None,
        track: Track,
    ):
        self.given, self.track = model, track
        self.steps = len(loader)
        self.total = self.steps * settings.epochs
        self.settings = settings = settle(settings, self.total)
        self.device = resolve_device(settings.device)
        self.rank, self.world = join(self.device)  # before Accelerate does, which waits longer
        self.state = TrainState(model, settings, teacher=teacher, device=self.device)
        self.task = self.state.task
        self.loader = share(
            loader, self.device, self.rank, self.world, training=True, task=self.task
        )
        self.steady = isinstance(self.loader, Loader)  # goes on in the middle of an epoch
        if self.steady and loader.batch_size < self.world:
            raise UsageError(
                f"batches of {loader.batch_size} images for {self.world} processes",
                why="every process needs an image of every batch",
                fix=f"finetune.batch_size={self.world}, or fewer processes",
            )
        self.trackers = Trackers.of(settings.trackers)
        self.folder = folder
        self.at = Progress()
        self.stepping = False  # in the middle of a step, weights fit no step number
        self.best: dict[str, Tensor] = {}
        self.last = Generation({}, {})
        self.paired_test = PairedTest(model, self.task, self.state.teacher, self.device)
        self.identity: dict[str, str] = {}

    def resume(self, identity: dict[str, str]) -> bool:
        """Take up the newest saved generation; False where there is none."""
        self.identity = identity
        state = self.folder / "state" if self.folder else None
        if state is None or not first(lambda: has_generation(state)):
            return False
        found = load_generation(state)
        assert found is not None
        known = SavedFacts.of(found.facts, str(state)).identity
        other = [name for name, value in identity.items() if known.get(name) != value]
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
        """Judge the candidates that need no training, find the rate, keep the starting point."""
        at = self.at
        judged_on = calibration if validation is None else validation
        if validation is not None or self.settings.recalibrate:
            score = self._judge(judged_on)
            if validation is not None:
                at.before, at.best = score, rank_of(score)
            if self.settings.recalibrate:
                self._recalibrate(calibration, judged_on, score)
                if validation is None:
                    at.recalibrated = None  # scores of training images are not for reports
        self._keep_best()
        at.lr = self._find_rate(validation) if self.settings.lr == "auto" else self.settings.lr
        self._save()

    def _recalibrate(self, calibration: Batches, judged_on: Batches, before: Evaluation) -> None:
        """BatchNorm statistics measured anew; taken back where the network was better without."""
        at, state = self.at, self.state
        given = {name: detach(tensor) for name, tensor in state.judged.state_dict().items()}
        fresh = recalibrate(
            self.given, calibration, task=self.task, device=str(self.device), track=self.track
        )
        state.load(fresh.state_dict())
        score = self._judge(judged_on)
        at.recalibrated = score
        if rank_of(score) > rank_of(before) and self._clearly_better(score, judged_on):
            at.best, at.chosen = (rank_of(score) if at.before else at.best), "recalibrated"
        else:
            state.load(given)

    def _find_rate(self, validation: Batches | None) -> float:
        """The learning rate by trials on the split, or by rule where they would cost too much."""
        batch = getattr(self.loader, "batch_size", 0) or self.settings.batch_size
        planned = plan_trials(self.settings, self.total, batch)
        if validation is None or planned is None:
            return default_rate(self.settings, self.total, batch * self.steps)
        tried = try_rates(
            self.state,
            self.loader,
            planned,
            some_of(validation, planned.images, seed=self.settings.seed),
            track=self.track,
        )
        self.at.trials = tried
        return best_rate(tried)

    def _judge(self, images: Batches, precision: str = "no") -> Evaluation:
        found = evaluate(
            self.state.judged,
            images,
            task=self.task,
            device=str(self.device),
            precision=precision,
            track=self.track,
        )
        return replace(found, by_class=())  # nothing is chosen by it

    def epoch(self, validation: Batches | None) -> None:
        """The rest of one epoch, its validation, and the commit."""
        at, settings = self.at, self.settings
        seed_everything(settings.seed, at.epoch)
        self.loader.set_epoch(at.epoch, at.step)
        total = torch.tensor(at.loss, dtype=torch.float64, device=self.device)
        now = self._now()
        batches = self.track(
            self.loader,
            label=f"epoch {at.epoch + 1}/{settings.epochs}",
            total=self.steps - at.step,
            unit="batches",
            live=now,
        )
        try:
            for batch in batches:
                with unbroken():  # a signal waits for the end of the step
                    self._step(batch, total, now)
        except StoppedError:
            self._save_stopped(total)
            raise
        at.loss = self._mean(total)
        self._close(validation, now)

    def _step(self, batch: Any, total: Tensor, now: LiveMetrics) -> None:
        at, lr, self.stepping = self.at, self._rate(), True
        seed = seed_of(self.settings.seed, at.epoch, at.step, self.rank)
        size = self.task.size(batch)
        total += self.state.step(batch, lr=lr, seed=seed, weight=self._weight(size))
        now.step(size * self.world, lr)
        at.step, self.stepping = at.step + 1, False
        every = self.settings.save_steps if self.steady else 0
        save = every and at.step % every == 0
        if at.step < self.steps and (save or at.step % CHECK_STEPS == 0):
            at.loss = self._mean(total)
            total.fill_(at.loss)
            now.loss = at.loss / at.step
            if save:
                self._save()

    def _save_stopped(self, total: Tensor) -> None:
        """Keep the steps of the epoch that a signal broke off.

        Several processes may have come to different steps: they go on from the last save. So does
        one whose step a second signal broke off in the middle.
        """
        if (
            self.steady
            and not self.stepping
            and self.world == 1
            and math.isfinite(loss := float(total))
        ):
            self.at.loss = loss
            self._save()

    def _now(self) -> LiveMetrics:
        at = self.at
        now = LiveMetrics((self.settings.epochs - at.epoch) * self.steps - at.step, lr=self._rate())
        if at.history:
            now.loss, now.metric = at.history[-1].loss, self.task.metric
            now.value = at.history[-1].metrics.get(now.metric)
        return now

    def _mean(self, total: Tensor) -> float:
        mean = float(sum_over_processes(total) / self.world)
        if not math.isfinite(mean):
            raise DivergedError
        return mean

    def _close(self, validation: Batches | None, now: LiveMetrics) -> None:
        at, speed = self.at, now.speed
        score = None if validation is None else self._judge(validation, self.settings.precision)
        if score is not None and score.nonfinite:
            raise DivergedError
        row = Epoch(
            epoch=at.epoch,
            step=(at.epoch + 1) * self.steps,
            loss=at.loss / self.steps,
            lr=self._rate(self.steps - 1),
            metrics=dict(score.metrics) if score else {},
            validation_loss=score.loss if score else None,
            images_per_second=speed,
        )
        at.history.append(row)
        rank = rank_of(score) if score else (0.0, float(at.epoch))
        if rank > tuple(at.best) and (score is None or self._clearly_better(score, validation)):
            at.best, at.best_epoch, at.chosen = rank, at.epoch, f"epoch {at.epoch + 1}"
            self._keep_best()
        at.epoch, at.step, at.loss = at.epoch + 1, 0, 0.0
        self._save()
        self._report()
        if self.folder and self.rank == 0:
            self.trackers.epoch(row, partial(Subject.of, self.folder, self.identity, self.settings))

    def _clearly_better(self, score: Evaluation, validation: Batches | None) -> bool:
        """Few images say that a candidate beats the network given only if it is beyond chance."""
        if score.count >= MANY or validation is None:
            return True
        return self.paired_test.clearly_better(self.state.judged, validation)

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
            (last := copy.deepcopy(self.given)).load_state_dict(self.state.judged.state_dict())
        return FineTuned(
            model=tuned,
            last=last,
            history=tuple(at.history),
            best_epoch=at.best_epoch,
            chosen=at.chosen,
            settings=replace(self.settings, lr=at.lr),
            trials=tuple(at.trials),
            task=self.task,
            before=at.before,
            recalibrated=at.recalibrated,
            accumulate=self.state.parts,
            rollbacks=at.rollbacks,
        )

    def _rate(self, step: int | None = None) -> float:
        """Of a step of this epoch; default: the next one."""
        settings, at = self.settings, self.at
        factor = rate(
            at.epoch * self.steps + (at.step if step is None else step),
            steps=self.total,
            warmup=warmup_steps(settings, self.total),
            schedule=settings.schedule,
        )
        return at.lr * factor * at.lr_scale

    def _weight(self, mine: int) -> float:
        """DDP averages over processes; their parts of a batch may differ by one image."""
        return mine * self.loader.world / self.loader.batch_size

    def _keep_best(self) -> None:
        self.best = {n: detach(t) for n, t in self.state.judged.state_dict().items()}

    def _save(self) -> None:
        tensors = self.state.snapshot() | {f"best.{n}": t for n, t in self.best.items()}
        facts = SavedFacts(self.at, self.state.facts(), self.identity)
        self.last = Generation(tensors, asdict(facts))
        if self.folder and self.rank == 0:
            save_generation(self.folder / "state", self.last)

    def _restore(self, generation: Generation) -> None:
        source = f"{self.folder}/state"
        facts = SavedFacts.of(generation.facts, source)
        self.state.restore(generation.tensors, facts.state, source=source)
        self.best = part(generation.tensors, "best.")
        judged = self.state.judged.state_dict()
        require_like(self.best, judged, source=source, fix=start_again(source))
        self.at, self.last = facts.at, generation

    def _report(self) -> None:
        if self.folder and self.rank == 0:
            write_metrics(self.folder, self.at.history)
