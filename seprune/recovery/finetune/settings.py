"""Settings and results of fine-tuning."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn

from seprune.measure.metrics import Evaluation
from seprune.runtime.short_table import ShortTable, Tabular
from seprune.tasks import Task

TrackerName = Literal["tensorboard", "wandb", "mlflow", "trackio"]
# where and how it runs, not what comes out
RUNTIME = {"device", "channels_last", "compile", "accumulate", "save_steps", "trackers", "task"}


@dataclass(frozen=True)
class FineTuneSettings:
    """How a network is trained.

    `batch_size`: images per optimizer step over all processes, worked off in `accumulate` parts.
    `recalibrate`: images for BatchNorm before the first epoch, 0 = leave it. `distill_...` counts
    where a teacher is given: `alpha` of its soft targets at `temperature`, `features` times the
    distance of group outputs (docs/finetuning.md), `precision` of its forward. `ema`: decay of the
    weight average, which then is what is judged and returned. `save_steps`: also save within an
    epoch, every so many steps; 0 = only after each epoch. `norms`: BatchNorm normalises by the
    batch (`train`) or by its running statistics (`eval`). `auto` values fit the number of steps;
    `lr: auto` is found by short trials on the validation split. `warmup_epochs`: at most a fifth
    of all steps; one-cycle has its own. `trackers`: get the numbers of every epoch, if there is a
    folder. `task`: by default what the targets look like.
    """

    epochs: int = 10
    batch_size: int = 128
    optimizer: Literal["auto", "sgd", "adamw"] = "auto"
    lr: float | Literal["auto"] = "auto"
    momentum: float = 0.9
    nesterov: bool = True
    weight_decay: float = 5e-4
    schedule: Literal["auto", "cosine", "step", "onecycle", "constant"] = "auto"
    norms: Literal["auto", "train", "eval"] = "auto"
    warmup_epochs: float = 0.0
    label_smoothing: float = 0.0
    mixup: float = 0.0
    cutmix: float = 0.0
    randaugment: bool = False
    ema: float | None = None
    clip: float | None = None
    accumulate: int = 1
    precision: Literal["no", "bf16", "fp16"] = "no"
    channels_last: bool = False
    compile: bool = False
    distill_alpha: float | Literal["auto"] = "auto"
    distill_temperature: float = 4.0
    distill_features: float = 0.0
    distill_precision: Literal["as training", "no", "bf16"] = "as training"
    recalibrate: int = 2048
    save_steps: int = 1000
    trackers: tuple[TrackerName, ...] = ()
    device: str | torch.device = "auto"
    seed: int = 0
    task: Task | None = None


@dataclass(frozen=True)
class Epoch:
    """One epoch: mean training loss, last learning rate, validation, training speed.

    Attributes:
        metrics: of the task on the validation split, by name; none without a split.
    """

    epoch: int
    step: int
    loss: float
    lr: float
    metrics: Mapping[str, float]
    validation_loss: float | None
    images_per_second: float

    @property
    def top1(self) -> float | None:
        """Of a classifier that is judged on a split."""
        return self.metrics.get("top1")

    def plain(self) -> dict[str, float | None]:
        """One line of `metrics.jsonl`: the metrics beside the other numbers."""
        row = {**vars(self), **self.metrics}
        return {name: value for name, value in row.items() if name != "metrics"}


@dataclass(frozen=True, repr=False)
class FineTuned(Tabular):
    """The best candidate on the validation split; without a split the last epoch.

    Candidates are the network as given (`start`), with its BatchNorm statistics measured anew
    (`recalibrated`), and every epoch (`epoch N`, from 1); `chosen` names the one that `model` is.
    `last` has the weights of the last epoch; it is `model` itself where that was chosen.

    `before` and `recalibrated` are validation scores of the first two. `best_epoch` counts from 0,
    -1 where no epoch was chosen. `settings` are those that `auto` came to; `trials`: `lr`, `loss`
    and the deciding metric of each trial. `task`: as given, or as the first batch looks like.
    `accumulate`: parts per step at the end; it grew if memory ran out. `rollbacks`: 1 if the loss
    diverged once.
    """

    model: nn.Module
    last: nn.Module
    history: tuple[Epoch, ...]
    best_epoch: int
    chosen: str
    settings: FineTuneSettings
    trials: tuple[Mapping[str, float], ...]
    task: Task
    before: Evaluation | None
    recalibrated: Evaluation | None
    accumulate: int
    rollbacks: int

    def _short_table(self) -> ShortTable:
        judged = [("start", self.before), ("recalibrated", self.recalibrated)]
        rows = [
            (name, f"{score.value:.4f}", f"{score.loss:.4f}") for name, score in judged if score
        ]
        metric = self.task.metric
        rows += [
            (f"epoch {row.epoch + 1}", _shown(row.metrics.get(metric)), _shown(row.validation_loss))
            for row in self.history
        ]
        title = f"chosen: {self.chosen or 'the last epoch'}"
        return ShortTable.of(title, ("validation", metric, "loss"), rows)

    def numbers(self) -> dict[str, float | str | None]:
        """For reports: what was chosen, by which value of `metric` on the split, how trained."""
        metrics = self.history[self.best_epoch].metrics if self.best_epoch >= 0 else {}
        settings = self.settings
        return {
            "epochs": len(self.history),
            "best_epoch": self.best_epoch,
            "metric": self.task.metric,
            "validation_before": self.before.value if self.before else None,
            "validation_recalibrated": self.recalibrated.value if self.recalibrated else None,
            "validation_best": metrics.get(self.task.metric),
            "chosen": self.chosen,
            "optimizer": settings.optimizer,
            "lr": settings.lr,
            "norms": settings.norms,
            "trials": len(self.trials),
            "accumulate": self.accumulate,
            "rollbacks": self.rollbacks,
        }


def _shown(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"
