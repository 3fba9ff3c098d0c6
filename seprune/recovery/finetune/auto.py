"""What `auto` means: optimizer, schedule, norms, rate and distillation that fit the steps.

A calibration set is not a training set: in some hundred steps BatchNorm cannot find new statistics
and momentum carries weights away from where a refit has put them. Such a training leaves the
statistics alone and takes small steps.
"""

from __future__ import annotations

import itertools
import math
import random
from dataclasses import dataclass, replace

import numpy as np
import torch

from seprune.data import Loader
from seprune.data.augment import seed_of
from seprune.data.placement import Batches, Placed
from seprune.measure.metrics import evaluate
from seprune.recovery.finetune.loss import rate
from seprune.recovery.finetune.settings import FineTuneSettings
from seprune.recovery.finetune.step import TrainState
from seprune.runtime.progress import Track
from seprune.tasks import Classification

SHORT = 1000  # optimizer steps below which a training is short
WARMUP = 0.2  # of all steps, at most
TRIAL_COST = 0.05  # of the schedule, for all trials together
TRIAL_STEPS = 8  # fewer do not tell rates apart
FORWARD = 1 / 3  # what judging an image costs, beside training on it
# optimizer -> rates over two decades, and the one that is taken where no trials can be paid for
RATES = {
    "sgd": ((0.1, 0.03, 0.01, 0.003, 0.001), 0.01),
    "adamw": ((1e-2, 3e-3, 1e-3, 3e-4, 1e-4), 1e-3),
}
# AdamW's rate was measured with 10 epochs of 2,048 images (docs/finetuning.md)
REFERENCE_STEPS, REFERENCE_IMAGES = 160, 2048
# the teacher's part of the loss: of few images its answers say more than their labels do; masks
# have labels enough (0.8 cost segmentation half a point, benchmarks/tasks.py)
ALPHA, ALPHA_SHORT = 0.5, 0.8


def settle(settings: FineTuneSettings, steps: int) -> FineTuneSettings:
    """Settings without `auto`, but for the rate, for a schedule of `steps` optimizer steps.

    Where a rate is given, `auto` is the optimizer that such numbers are usually meant for: SGD.
    """
    short = steps < SHORT
    optimizer, schedule, norms = settings.optimizer, settings.schedule, settings.norms
    if optimizer == "auto":
        optimizer = "adamw" if short and settings.lr == "auto" else "sgd"
    if schedule == "auto":
        schedule = "onecycle" if optimizer == "adamw" else "cosine"
    if norms == "auto":
        # momentum without the batch to normalise by carries weights away: 83 % became 25 %
        norms = "eval" if short and optimizer == "adamw" else "train"
    alpha = settings.distill_alpha
    if alpha == "auto":
        classes = settings.task is None or isinstance(settings.task, Classification)
        alpha = ALPHA_SHORT if short and classes else ALPHA
    return replace(
        settings, optimizer=optimizer, schedule=schedule, norms=norms, distill_alpha=alpha
    )


def warmup_steps(settings: FineTuneSettings, steps: int) -> int:
    """Steps of the linear warm-up; one-cycle has its own, and no schedule is all warm-up."""
    if settings.schedule == "onecycle":
        return 0
    per_epoch = steps / max(settings.epochs, 1)
    return round(min(settings.warmup_epochs * per_epoch, WARMUP * steps))


def default_rate(settings: FineTuneSettings, steps: int, images: int) -> float:
    """The rate where no trials can be paid for.

    With fewer steps or fewer images AdamW's is lower by the square root: what few images say about
    a gradient is mostly noise.
    """
    found = RATES[settings.optimizer][1]
    if settings.optimizer == "adamw":
        found *= min(1.0, steps / REFERENCE_STEPS) ** 0.5
        found *= min(1.0, images / REFERENCE_IMAGES) ** 0.5
    return found


@dataclass(frozen=True)
class Trials:
    """Short trainings from the same start, one for each rate.

    Attributes:
        steps: of each.
        images: of the validation split that judge each.
    """

    rates: tuple[float, ...]
    steps: int
    images: int


def plan_trials(settings: FineTuneSettings, steps: int, batch_size: int) -> Trials | None:
    """Trials that cost at most 5 % of `steps` steps; None where that buys too few steps.

    Half of the cost is training, half is judging.
    """
    rates = RATES[settings.optimizer][0]
    each = TRIAL_COST * steps / len(rates) / 2  # in optimizer steps
    if each < TRIAL_STEPS:
        return None
    return Trials(rates, int(each), int(each * batch_size / FORWARD))


def try_rates(
    state: TrainState, loader: Loader | Placed, trials: Trials, judges: Batches, *, track: Track
) -> list[dict[str, float]]:
    """`lr`, and `loss` and the metric on `judges` after each trial; `state` is as before.

    Every trial is a whole schedule in a few steps, on the images that the first epoch starts with.
    """
    settings, start, facts = state.settings, state.snapshot(), state.facts()
    tried = []
    for lr in track(trials.rates, label="trying learning rates", total=len(trials.rates)):
        seed_everything(settings.seed, 0)
        loader.set_epoch(0, 0)
        batches = itertools.chain.from_iterable(itertools.repeat(loader))
        for step, batch in enumerate(itertools.islice(batches, trials.steps)):
            warmup = trials.steps // 5
            factor = rate(step, steps=trials.steps, warmup=warmup, schedule=settings.schedule)
            seed = seed_of(settings.seed, 0, step, loader.rank)
            weight = state.task.size(batch) * loader.world / loader.batch_size
            state.step(batch, lr=lr * factor, seed=seed, weight=weight)
        score = evaluate(state.judged, judges, task=state.task, device=str(state.device))
        loss = math.inf if score.nonfinite else score.loss
        tried.append({"lr": lr, "loss": loss, score.metric: score.value})
        state.restore(start, facts)
    return tried


def best_rate(tried: list[dict[str, float]]) -> float:
    """The rate whose trial ends with the least loss on the split; the lowest where none is finite.

    Args:
        tried: `lr` and `loss` of each.
    """
    finite = [row for row in tried if math.isfinite(row["loss"])]
    if not finite:
        return min(row["lr"] for row in tried)
    return min(finite, key=lambda row: row["loss"])["lr"]


def seed_everything(*key: int) -> None:
    """The global generators, for loaders and data sets that are not seprune's."""
    seed = seed_of(*key)
    torch.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed % 2**32)
