"""Fine-tuning: closed forms, resumption bit for bit, real processes, real kills."""

import copy
import json
import math
import operator
import os
import signal
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import finetune_worker
import numpy as np
import pytest
import torch
from finetune_worker import tiny
from safetensors.torch import load_file
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from seprune.data import DataSettings, open_data
from seprune.errors import EnvironmentFault, InputError, StoppedError, UsageError
from seprune.graph.groups import Member
from seprune.measure.metrics import Evaluation, evaluate
from seprune.pruning.plan import PlannedGroup, PruningPlan
from seprune.recovery.finetune import FineTuneSettings, Teacher, finetune
from seprune.recovery.finetune.auto import (
    FORWARD,
    best_rate,
    default_rate,
    plan_trials,
    settle,
    warmup_steps,
)
from seprune.recovery.finetune.checkpoints import Generation, load_generation, save_generation
from seprune.recovery.finetune.features import Features, shared_features
from seprune.recovery.finetune.loss import decay_groups, loss_of, mix, rate
from seprune.recovery.finetune.metrics_log import LiveMetrics
from seprune.recovery.finetune.progress import rank_of
from seprune.recovery.finetune.significance import PairedTest, clearly_lower, image_losses
from seprune.recovery.finetune.step import TrainState
from seprune.runtime.interrupts import interrupts
from seprune.tasks import Classification, Segmentation


@pytest.fixture(autouse=True)
def one_thread():
    """Tiny networks are slower on many threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def noise(count=64, **options) -> DataLoader:
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(count, 1, 8, 8, generator=generator)
    labels = torch.randint(0, 10, (count,), generator=generator)
    return DataLoader(TensorDataset(images, labels), batch_size=16, **options)


def same(a: nn.Module, b: nn.Module) -> bool:
    pairs = zip(a.state_dict().items(), b.state_dict().items(), strict=True)
    return all(n == m and torch.equal(t, u) for (n, t), (m, u) in pairs)


class StopError(Exception):
    pass


def stop_at(label: str, batch: int):
    """A track that raises before it gives batch number `batch` of what starts with `label`."""

    def track(iterable, *, label, **_):
        for number, item in enumerate(iterable):
            if label.startswith(wanted) and number == batch:
                raise StopError
            yield item

    wanted = label
    return track


# closed forms


def test_the_loss_is_cross_entropy_with_smoothed_labels():
    torch.manual_seed(0)
    logits, labels = torch.randn(6, 4), torch.tensor([0, 1, 2, 3, 0, 1])
    target = F.one_hot(labels, 4) * 0.9 + 0.1 / 4
    expected = -(target * logits.log_softmax(1)).sum(1).mean()
    assert torch.allclose(loss_of(logits, labels, smoothing=0.1), expected)


def test_distillation_against_its_formula():
    torch.manual_seed(0)
    logits, teacher = torch.randn(5, 3), torch.randn(5, 3)
    labels = torch.tensor([0, 1, 2, 0, 1])
    p, q = (teacher / 2).softmax(1), (logits / 2).softmax(1)
    divergence = (p * (p / q).log()).sum(1).mean()
    plain = -logits.log_softmax(1)[range(5), labels].mean()
    got = loss_of(logits, labels, teacher=teacher, alpha=0.7, temperature=2.0)
    assert torch.allclose(got, 0.3 * plain + 0.7 * 4 * divergence)
    nothing = loss_of(logits, labels, teacher=logits, alpha=1.0)
    assert nothing.abs() < 1e-6


def test_norms_and_biases_do_not_decay():
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Linear(2, 2))
    model[2].weight.requires_grad_(False)
    decayed, spared = decay_groups(model, 0.1)
    assert [tuple(p.shape) for p in decayed["params"]] == [(2, 1, 3, 3)]
    assert [tuple(p.shape) for p in spared["params"]] == [(2,), (2,), (2,), (2,)]
    assert (decayed["weight_decay"], spared["weight_decay"]) == (0.1, 0.0)


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ("constant", [0.5, 1, 1, 1, 1, 1, 1, 1, 1, 1]),
        ("step", [0.5, 1, 1, 1, 1, 1, 0.1, 0.1, 0.01, 0.01]),
        ("cosine", [0.5, 1] + [(1 + math.cos(math.pi * i / 8)) / 2 for i in range(8)]),
    ],
)
def test_schedules(schedule, expected):
    got = [rate(i, steps=10, warmup=2, schedule=schedule) for i in range(10)]
    assert got == pytest.approx(expected)


def test_onecycle_is_torchs():
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, max_lr=1.0, total_steps=1001, cycle_momentum=False
    )
    for step in range(1000):
        ours = rate(step, steps=1000, warmup=0, schedule="onecycle")
        assert ours == pytest.approx(optimizer.param_groups[0]["lr"], abs=3e-3)
        optimizer.step()
        scheduler.step()


def test_mixing_keeps_the_label_mass():
    torch.manual_seed(0)
    images, labels = torch.randn(8, 1, 6, 6), torch.arange(8) % 3
    for mixup, cutmix in ((1.0, 0.0), (0.0, 1.0), (0.5, 0.5)):
        mixed, soft = mix(images, labels, classes=3, mixup=mixup, cutmix=cutmix)
        assert mixed.shape == images.shape
        assert torch.allclose(soft.sum(1), torch.ones(8))
    assert mix(images, labels, classes=3, mixup=0, cutmix=0)[1] is labels


# one step


def learner(model, **settings) -> TrainState:
    cpu = torch.device("cpu")
    return TrainState(model, FineTuneSettings(**settings), teacher=None, device=cpu)


def test_a_step_equals_plain_torch():
    model = tiny()
    reference = copy.deepcopy(model).train()
    optimizer = torch.optim.SGD(decay_groups(reference, 0.01), lr=0.3, momentum=0.9, nesterov=True)
    ours = learner(model, weight_decay=0.01)
    for images, labels in noise():
        loss = F.cross_entropy(reference(images), labels)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        got = ours.step((images, labels), lr=0.3, seed=0, weight=1.0)
        assert got.item() == pytest.approx(loss.item(), rel=1e-6)
    for a, b in zip(ours.raw.parameters(), reference.parameters(), strict=True):
        assert torch.allclose(a, b, atol=1e-6)


def test_accumulated_parts_equal_the_whole_batch():
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    whole, parts = learner(model, clip=0.5), learner(model, clip=0.5, accumulate=3)
    for images, labels in noise():
        a = whole.step((images, labels), lr=0.1, seed=0, weight=1.0)
        b = parts.step((images, labels), lr=0.1, seed=0, weight=1.0)
        assert a.item() == pytest.approx(b.item(), rel=1e-6)
    assert torch.allclose(whole.raw[1].weight, parts.raw[1].weight, atol=1e-6)


class Hungry(nn.Module):
    """Runs out of memory with more than `room` images."""

    def __init__(self, room):
        super().__init__()
        self.layer, self.room, self.sizes = nn.Linear(64, 10), room, []

    def forward(self, x):
        self.sizes.append(len(x))
        if len(x) > self.room:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.")
        return self.layer(x.flatten(1))


def test_out_of_memory_halves_the_micro_batch_and_keeps_the_step():
    roomy = finetune(Hungry(99), noise(), FineTuneSettings(epochs=2, recalibrate=0))
    tight = finetune(Hungry(4), noise(), FineTuneSettings(epochs=0, recalibrate=0))
    ours = learner(Hungry(4))
    plain = learner(Hungry(99))
    plain.raw.load_state_dict(ours.raw.state_dict())
    images, labels = next(iter(noise()))
    a = ours.step((images, labels), lr=0.1, seed=0, weight=1.0)
    b = plain.step((images, labels), lr=0.1, seed=0, weight=1.0)
    assert ours.raw.sizes == [16, 8, 4, 4, 4, 4]
    assert ours.parts == 4
    assert a.item() == pytest.approx(b.item(), rel=1e-6)
    assert torch.allclose(ours.raw.layer.weight, plain.raw.layer.weight, atol=1e-6)
    assert (roomy.accumulate, tight.accumulate) == (1, 1)


def test_out_of_memory_with_single_images():
    settings = FineTuneSettings(epochs=1, recalibrate=0)
    with pytest.raises(EnvironmentFault) as caught:
        finetune(Hungry(0), noise(), settings)
    assert caught.value.what == "out of memory with micro-batches of 1 images"
    assert caught.value.why == "CUDA out of memory. Tried to allocate 2 GiB."
    assert "smaller batch size" in caught.value.fix


def test_the_average_follows_its_formula():
    ours = learner(tiny(), ema=0.2)
    mean = {n: t.clone().double() for n, t in ours.raw.state_dict().items()}
    for number, (images, labels) in enumerate(noise(), 1):
        ours.step((images, labels), lr=0.1, seed=0, weight=1.0)
        decay = min(0.2, (1 + number) / (10 + number))
        for name, value in ours.raw.state_dict().items():
            mean[name] = decay * mean[name] + (1 - decay) * value
    for name, value in ours.average.state_dict().items():
        if value.is_floating_point():
            assert torch.allclose(value.double(), mean[name], atol=1e-6), name
    assert ours.judged is ours.average


# a whole fine-tuning


def test_it_learns_and_leaves_the_model_alone():
    data = open_data("digits")
    model = tiny().eval()
    before = copy.deepcopy(model)
    state = torch.get_rng_state()
    tuned = finetune(model, data, FineTuneSettings(epochs=6, batch_size=64, lr=0.1))
    assert same(model, before)
    assert not model.training
    assert torch.equal(torch.get_rng_state(), state)
    assert evaluate(tuned.model, data.reporting()).top1 > 0.85
    assert [row.epoch for row in tuned.history] == list(range(6))
    assert tuned.history[-1].loss < tuned.history[0].loss
    losses = [row.validation_loss for row in tuned.history]
    assert losses[tuned.best_epoch] == min(losses)
    assert evaluate(tuned.model, data.validation()).loss == min(losses)
    assert tuned.before == evaluate(model, data.validation())


@pytest.mark.parametrize(
    "settings",
    [
        {"optimizer": "adamw", "lr": 0.003, "precision": "bf16", "channels_last": True},
        {"ema": 0.9, "mixup": 0.2, "cutmix": 1.0, "label_smoothing": 0.1, "warmup_epochs": 1},
        {"clip": 1.0, "accumulate": 2, "schedule": "onecycle"},
    ],
    ids=["adamw bf16", "ema mixing", "clip onecycle"],
)
def test_every_ingredient_learns(settings):
    data = open_data("digits")
    settings = {"epochs": 3, "batch_size": 64, "lr": 0.1, **settings}
    tuned = finetune(tiny(), data, FineTuneSettings(**settings))
    assert tuned.history[-1].validation_loss < tuned.recalibrated.loss - 0.3


def test_the_last_weights_are_there_beside_the_chosen_ones():
    settings = FineTuneSettings(epochs=3, lr=0.05, schedule="constant", recalibrate=0)
    one = finetune(tiny(), (noise(), noise()), replace(settings, epochs=1))
    found = finetune(tiny(), (noise(), noise()), settings)
    assert one.chosen == "epoch 1"
    assert one.last is one.model
    assert same(found.last, found.model) == (found.best_epoch == 2)
    alone = finetune(tiny(), noise(), settings)  # without validation the last one is the choice
    assert same(alone.model, found.last)


def test_no_epochs_only_recalibrates():
    data = open_data("digits")
    model = tiny()
    tuned = finetune(model, data, FineTuneSettings(epochs=0))
    assert tuned.history == ()
    assert tuned.best_epoch == -1
    assert torch.equal(tuned.model[0].weight, model[0].weight)
    better = tuned.recalibrated.loss < tuned.before.loss
    assert tuned.chosen == ("recalibrated" if better else "start")
    found = evaluate(tuned.model, data.validation())
    assert found == (tuned.recalibrated if better else tuned.before)


def threshold(mean: float) -> nn.Module:
    """Class 1 where an image of one pixel is above `mean`."""
    model = nn.Sequential(nn.BatchNorm2d(1), nn.Flatten(), nn.Linear(1, 2))
    model[0].running_mean.fill_(mean)
    model[2].weight.data = torch.tensor([[-1.0], [1.0]])
    model[2].bias.data.zero_()
    return model.eval()


def pixels(*values: float) -> DataLoader:
    """Images of one pixel; class 1 where it is above 0."""
    images = torch.tensor(values).reshape(-1, 1, 1, 1)
    return DataLoader(TensorDataset(images, (images.flatten() > 0).long()), batch_size=16)


@pytest.mark.parametrize(
    ("given", "calibration", "chosen", "mean", "top1"),
    [
        (0.0, (4.0, 6.0), "start", 0.0, (1.0, 0.125)),  # the images' mean is not the threshold
        (9.0, (-1.0, 1.0), "recalibrated", 0.0, (0.125, 1.0)),
    ],
)
def test_batchnorm_is_recalibrated_only_where_it_helps(given, calibration, chosen, mean, top1):
    validation = pixels(-1.0, *[1.0, 2.0] * 3, 1.0)
    settings = FineTuneSettings(epochs=0)
    tuned = finetune(threshold(given), (pixels(*calibration), validation), settings)
    assert tuned.chosen == chosen
    assert (tuned.before.top1, tuned.recalibrated.top1) == top1
    assert tuned.model[0].running_mean.item() == mean
    assert tuned.numbers()["chosen"] == chosen


def test_few_images_cannot_say_that_recalibration_helps():
    pair = pixels(-1.0, 1.0), pixels(-2.0, -1.0, 1.0, 2.0)
    tuned = finetune(threshold(9.0), pair, FineTuneSettings(epochs=0))
    assert (tuned.before.top1, tuned.recalibrated.top1) == (0.5, 1.0)
    assert tuned.chosen == "start"  # the loss fell by 7.4, but for two images of four
    assert tuned.model[0].running_mean.item() == 9.0


@pytest.mark.parametrize("norms", ["train", "eval"])
def test_what_is_returned_is_never_worse_than_what_was_given(norms):
    """Labels turned around: every epoch unlearns what the network knows."""
    model = threshold(0.0)
    model[0].requires_grad_(False)
    images = torch.tensor([-2.0, -1.0, 1.0, 2.0]).reshape(-1, 1, 1, 1)
    wrong = DataLoader(TensorDataset(images, (images.flatten() < 0).long()), batch_size=4)
    settings = FineTuneSettings(
        epochs=3, optimizer="sgd", lr=1.0, schedule="constant", norms=norms, recalibrate=0
    )
    tuned = finetune(model, (wrong, pixels(-2.0, -1.0, 1.0, 2.0)), settings)
    assert (tuned.chosen, tuned.best_epoch) == ("start", -1)
    assert same(tuned.model, model)
    assert not same(tuned.last, model)
    assert [row.top1 for row in tuned.history][-1] < tuned.before.top1 == 1.0
    assert tuned.last[0].running_mean.item() == 0 if norms == "eval" else tuned.last is not None
    unjudged = finetune(model, wrong, settings)
    assert (unjudged.chosen, unjudged.best_epoch) == ("epoch 3", 2)


@pytest.mark.parametrize(
    ("given", "steps", "expected"),
    [
        ({}, 999, ("adamw", "onecycle", "eval")),
        ({}, 1000, ("sgd", "cosine", "train")),
        ({"lr": 0.05}, 100, ("sgd", "cosine", "train")),
        ({"optimizer": "adamw", "norms": "train", "schedule": "step"}, 5000,
         ("adamw", "step", "train")),
    ],
)  # fmt: skip
def test_automatic_settings_fit_the_number_of_steps(given, steps, expected):
    settings = settle(FineTuneSettings(**given), steps)
    assert (settings.optimizer, settings.schedule, settings.norms) == expected


def test_the_warm_up_is_at_most_a_fifth_and_one_cycle_has_its_own():
    cosine = FineTuneSettings(epochs=10, warmup_epochs=1, schedule="cosine")
    assert warmup_steps(cosine, 1000) == 100
    assert warmup_steps(replace(cosine, epochs=1), 100) == 20
    assert warmup_steps(replace(cosine, schedule="onecycle"), 1000) == 0


def test_trials_cost_at_most_a_twentieth():
    settings = FineTuneSettings(optimizer="sgd")
    for steps in (1600, 3520, 100_000):
        planned = plan_trials(settings, steps, 128)
        assert max(planned.rates) / min(planned.rates) == pytest.approx(100)
        each = planned.steps + planned.images * FORWARD / 128
        assert planned.steps >= 8
        assert 0.04 * steps < each * len(planned.rates) <= 0.05 * steps
    assert plan_trials(settings, 1599, 128) is None


def test_few_steps_and_few_images_go_a_short_way():
    adamw, sgd = FineTuneSettings(optimizer="adamw"), FineTuneSettings(optimizer="sgd")
    rates = [default_rate(adamw, *at) for at in ((40, 2048), (160, 512), (160, 2048), (640, 9999))]
    assert rates == pytest.approx([5e-4, 5e-4, 1e-3, 1e-3])
    assert default_rate(sgd, 5000, 100) == 0.01


def test_top1_ranks_many_images_and_the_loss_few():
    def scores(count):
        right = Evaluation(0.5, count, 0, {"top1": 0.9})
        sure = Evaluation(0.4, count, 0, {"top1": 0.8})
        return rank_of(right), rank_of(sure)

    assert operator.gt(*scores(1000))
    assert operator.lt(*scores(999))
    assert rank_of(Evaluation(math.nan, 9, 9, {"top1": 0.0})) == (-math.inf, 0.0)


def test_the_best_rate_has_the_least_loss():
    tried = [{"lr": 0.1, "loss": math.inf}, {"lr": 0.01, "loss": 0.4}, {"lr": 0.001, "loss": 0.5}]
    assert best_rate(tried) == 0.01
    assert best_rate(tried[:1]) == 0.1


def test_a_gain_within_chance_is_no_gain():
    """Student's t of the paired differences against numpy; the threshold is 2."""
    generator = np.random.default_rng(0)
    verdicts = set()
    for shift in (0.0, 0.02, 0.05, 0.2, -0.2):
        gain = shift + 0.2 * generator.standard_normal(50)
        before = generator.random(50)
        t = gain.mean() / (gain.std(ddof=1) / 50**0.5)
        pair = torch.from_numpy(before - gain), torch.from_numpy(before)
        assert clearly_lower(*pair) == (t > 2)
        verdicts.add(t > 2)
    assert verdicts == {True, False}
    assert not clearly_lower(torch.zeros(1), torch.ones(1))
    model, images = threshold(0.0), pixels(-1.0, 2.0)
    (losses,) = image_losses(model, images, torch.device("cpu"))
    scale = 1 / (1 + model[0].eps) ** 0.5
    wanted = [math.log1p(math.exp(-2 * x * scale)) for x in (1, 2)]
    assert losses.tolist() == pytest.approx(wanted, rel=1e-5)


def test_a_teacher_tells_networks_apart_where_labels_cannot():
    """KL(teacher || model) image by image, against numpy; three labels in ten are wrong."""
    x = torch.linspace(-2, 2, 64)[:, None]
    labels = ((x[:, 0] < 0) ^ (torch.arange(64) % 10 > 6)).long()
    wide, narrow, teacher = (nn.Linear(1, 2, bias=False).double() for _ in range(3))
    for network, slope in ((wide, 0.8), (narrow, 0.3), (teacher, 0.0)):
        network.weight.data = torch.tensor([[slope], [-slope]], dtype=torch.float64)
    images = [(x.double(), labels)]
    cpu, task = torch.device("cpu"), Classification()
    measured = [image_losses(n, images, cpu, task=task, teacher=teacher) for n in (wide, narrow)]
    for slope, (_, losses) in zip((0.8, 0.3), measured):
        p = 1 / (1 + np.exp(-2 * slope * x[:, 0].numpy()))
        entropy = math.log(2)  # of the teacher, whose two answers are equally likely
        divergence = 0.5 * np.log(0.5 / p) + 0.5 * np.log(0.5 / (1 - p))
        assert losses.numpy() == pytest.approx(divergence + entropy, rel=1e-6)
    plain = [image_losses(n, images, cpu, task=task)[0] for n in (wide, narrow)]
    assert not clearly_lower(plain[1], plain[0])
    assert torch.equal(torch.stack(plain), torch.stack(measured)[:, 0])
    with pytest.raises(InputError, match="the teacher has 3 outputs, the model 2"):
        image_losses(wide, images, cpu, task=task, teacher=nn.Linear(1, 3).double())
    assert not PairedTest(wide, task, None, cpu).clearly_better(narrow, images)
    assert PairedTest(wide, task, teacher, cpu).clearly_better(narrow, images)
    assert not PairedTest(narrow, task, teacher, cpu).clearly_better(wide, images)


def test_few_steps_learn_more_from_the_teacher():
    asked = FineTuneSettings()
    assert [settle(asked, steps).distill_alpha for steps in (999, 1000)] == [0.8, 0.5]
    assert settle(replace(asked, distill_alpha=0.1), 9).distill_alpha == 0.1
    assert settle(replace(asked, task=Segmentation()), 9).distill_alpha == 0.5


def test_trials_leave_nothing_behind(monkeypatch):
    monkeypatch.setattr("seprune.recovery.finetune.auto.TRIAL_COST", 4.0)
    data = open_data("digits")
    settings = FineTuneSettings(epochs=2, batch_size=128, optimizer="sgd", ema=0.5, recalibrate=0)
    tuned = finetune(tiny(0.2), data, settings)
    assert [row["lr"] for row in tuned.trials] == [0.1, 0.03, 0.01, 0.003, 0.001]
    assert tuned.settings.lr == min(tuned.trials, key=lambda row: row["loss"])["lr"]
    assert tuned.numbers()["lr"] == tuned.settings.lr
    given = finetune(tiny(0.2), data, replace(settings, lr=tuned.settings.lr))
    assert same(given.model, tuned.model)
    assert [row.loss for row in given.history] == [row.loss for row in tuned.history]


def test_distillation_pulls_towards_the_teacher():
    loader = noise()
    teacher = tiny()
    nn.init.normal_(teacher[-1].weight)
    settings = FineTuneSettings(epochs=12, lr=0.1, distill_alpha=1.0, recalibrate=0)
    before = copy.deepcopy(teacher)
    tuned = finetune(tiny(), loader, settings, teacher=teacher)
    assert same(teacher, before)
    assert tuned.history[-1].loss < 0.3 * tuned.history[0].loss
    with pytest.raises(InputError) as caught:
        finetune(tiny(), loader, settings, teacher=nn.Sequential(nn.Flatten(), nn.Linear(64, 7)))
    assert caught.value.what == "the teacher has 7 outputs, the model 10"


def planned(keep: tuple[int, ...], width: int = 8) -> PruningPlan:
    """tiny() without some channels of its first convolution."""
    index = np.arange(width)[:, None]
    members = (Member("0", "out", index, width), Member("1", "out", index, width))
    return PruningPlan((PlannedGroup("0", width, width, keep, members),), {})


def test_shared_features_follow_the_plans_one_after_the_other():
    first, second = planned((1, 3, 4, 6)), planned((0, 2), width=4)
    assert shared_features(tiny(), [first])["1"].tolist() == [1, 3, 4, 6]
    assert shared_features(tiny(), [first, second])["1"].tolist() == [1, 4]
    assert shared_features(tiny(), [planned(tuple(range(8)))]) == {"1": None}
    with pytest.raises(InputError) as caught:
        shared_features(nn.Linear(2, 2), [first])
    assert "passes a BatchNorm" in caught.value.why
    with pytest.raises(InputError, match="no group outputs that could be matched") as caught:
        shared_features(tiny(), [])
    assert "finetune.distill.features=0" in caught.value.fix


def test_the_distance_of_features_is_its_formula():
    torch.manual_seed(0)
    student, teacher = nn.BatchNorm2d(2).eval(), nn.BatchNorm2d(3).eval()
    x = torch.randn(5, 3, 4, 4)
    features = Features(nn.Sequential(student), nn.Sequential(teacher), {"0": torch.tensor([0, 2])})
    teacher(x), student(x[:, [0, 2]] + 0.5)
    expected = 0.25 / x[:, [0, 2]].var(correction=0)
    assert features.distance().item() == pytest.approx(expected.item(), rel=1e-4)
    teacher(x), student(torch.randn(5, 2, 2, 2))
    with pytest.raises(InputError, match="0: teacher and student cannot be matched"):
        features.distance()


def test_matching_features_pulls_them_together():
    teacher, student = tiny(), tiny()
    nn.init.normal_(student[0].weight)
    settings = FineTuneSettings(
        epochs=8, lr=0.05, distill_alpha=0.0, recalibrate=0, distill_precision="bf16"
    )
    pair = Teacher(teacher, (planned(tuple(range(8))),))
    matched = finetune(student, noise(), replace(settings, distill_features=1.0), teacher=pair)
    plain = finetune(student, noise(), settings, teacher=pair)
    images = next(iter(noise()))[0]

    def apart(model: nn.Module) -> float:
        ours, theirs = (m.eval()[:2](images) for m in (model, teacher))
        return (ours - theirs).square().mean().item()

    assert apart(matched.model) < 0.5 * apart(plain.model)


def test_batches_smaller_than_the_processes_are_refused(monkeypatch):
    monkeypatch.setattr("seprune.recovery.finetune.trainer.join", lambda device: (0, 3))
    with pytest.raises(UsageError, match="batches of 2 images for 3 processes") as caught:
        finetune(tiny(), open_data("digits"), FineTuneSettings(batch_size=2, recalibrate=0))
    assert caught.value.fix == "finetune.batch_size=3, or fewer processes"


def test_the_words_beside_the_bar_are_the_newest_numbers():
    now = LiveMetrics(left=400, loss=0.5123, value=0.8321, lr=0.1)
    assert now() == "loss 0.512 top-1 83.21% 0 images/s lr 0.1"
    asked = []

    def track(iterable, *, live=None, **_):
        for item in iterable:
            yield item
            asked.append(live() if live else "")

    finetune(tiny(), noise(), FineTuneSettings(epochs=2, recalibrate=0), track=track)
    assert "loss" not in asked[0]
    assert asked[-1].startswith("loss ")
    assert asked[-1].endswith("0:00:00 left")
    assert "images/s lr " in asked[-1]


def test_half_floats_need_a_gpu():
    with pytest.raises(UsageError, match="precision fp16 on a CPU") as caught:
        learner(tiny(), precision="fp16")
    assert caught.value.fix == "use precision bf16 or no"


def test_a_loader_without_batches():
    with pytest.raises(InputError, match="the training loader has no batches"):
        finetune(tiny(), [])
    with pytest.raises(InputError, match="the training loader has no length"):
        finetune(tiny(), (batch for batch in noise()))


def test_metrics_are_lines_of_json(tmp_path):
    settings = FineTuneSettings(epochs=2, recalibrate=0)
    tuned = finetune(tiny(), noise(), settings, folder=tmp_path)
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [row["loss"] for row in rows] == [row.loss for row in tuned.history]
    assert "top1" not in rows[0]
    assert rows[1]["step"] == 8


# NaN


def poisoned(batch: int, epoch: int) -> list:
    """A training loader whose batch `batch` turns to NaN from its `epoch`-th iteration on."""

    class Poisoned(list):
        seen = 0

        def __iter__(self):
            for number, (images, labels) in enumerate(super().__iter__()):
                bad = self.seen >= epoch and number == batch
                yield (images * float("nan") if bad else images), labels
            self.seen += 1

    return Poisoned(noise())


def test_nan_rolls_back_once_then_stops(tmp_path):
    settings = FineTuneSettings(epochs=4, recalibrate=0, lr=0.1)
    with pytest.raises(InputError) as caught:
        finetune(tiny(), poisoned(2, epoch=2), settings, folder=tmp_path)
    assert caught.value.exit_status == 3
    assert caught.value.what == "the training loss became NaN or infinite again in epoch 2, step 4"
    assert "rolled back once and went on at half the learning rate" in caught.value.why
    assert f"the best weights so far are in {tmp_path}/state" in caught.value.fix
    kept = load_generation(tmp_path / "state")
    assert kept.facts["at"]["epoch"] == 2
    assert kept.facts["at"]["lr_scale"] == 0.5
    assert all(t.isfinite().all() for t in kept.tensors.values() if t.is_floating_point())


def test_one_nan_is_survived_at_half_the_learning_rate():
    class Once(list):
        seen = 0
        task = Classification()  # so that nothing looks at the first batch before

        def __iter__(self):
            self.seen += 1
            for images, labels in super().__iter__():
                yield images * (float("nan") if self.seen == 2 else 1), labels

    settings = FineTuneSettings(epochs=3, recalibrate=0, lr=0.1, schedule="constant")
    tuned = finetune(tiny(), Once(noise()), settings)
    assert tuned.rollbacks == 1
    assert [row.lr for row in tuned.history] == [0.1, 0.05, 0.05]
    assert all(t.isfinite().all() for t in tuned.model.state_dict().values())


# resuming


@pytest.mark.parametrize("batch", [0, 3, pytest.param(17, marks=pytest.mark.slow)])
def test_a_stopped_run_goes_on_bit_for_bit(tmp_path, batch):
    data = open_data("digits")
    settings = FineTuneSettings(epochs=3, batch_size=64, ema=0.9, mixup=0.2, save_steps=4)
    model = tiny(dropout=0.2)
    whole = finetune(model, data, settings)
    with pytest.raises(StopError):
        finetune(model, data, settings, folder=tmp_path, track=stop_at("epoch 2/3", batch))
    torch.rand(7)  # what happens in between must not matter
    resumed = finetune(model, data, settings, folder=tmp_path)
    assert same(whole.model, resumed.model)
    without = [{**vars(row), "images_per_second": 0} for row in whole.history]
    assert [{**vars(row), "images_per_second": 0} for row in resumed.history] == without
    assert (resumed.before, resumed.best_epoch) == (whole.before, whole.best_epoch)
    finished = finetune(model, data, settings, folder=tmp_path, track=stop_at("epoch", 0))
    assert same(finished.model, whole.model)


@pytest.mark.fault(29)
def test_a_signal_saves_the_steps_of_its_epoch(tmp_path):
    """SIGINT in mid-step: the step is finished and saved, and nothing of it is done again."""

    def press(iterable, *, label, **_):
        for number, item in enumerate(iterable):
            if label == "epoch 2/3" and number == 7:
                os.kill(os.getpid(), signal.SIGINT)
            yield item

    data, model = open_data("digits"), tiny(dropout=0.2)
    settings = FineTuneSettings(epochs=3, batch_size=64, ema=0.9, mixup=0.2, save_steps=0)
    whole = finetune(model, data, settings)
    with pytest.raises(StoppedError), interrupts("again"):
        finetune(model, data, settings, folder=tmp_path, track=press)
    at = load_generation(tmp_path / "state").facts["at"]
    assert at["epoch"] == 1
    assert at["step"] == 7
    assert same(finetune(model, data, settings, folder=tmp_path).model, whole.model)


@pytest.mark.fault(29)
@pytest.mark.parametrize("twice_in_mid_step", [False, True])
def test_a_signal_at_any_step_changes_no_number(tmp_path, monkeypatch, twice_in_mid_step):
    """After the last step of an epoch; and a second one in the middle of a step, whose weights
    fit neither the step before nor the one after."""
    data, model = open_data("digits"), tiny(dropout=0.2)
    settings = FineTuneSettings(epochs=2, batch_size=128, save_steps=0)
    whole = finetune(model, data, settings)
    steps, seen, step = whole.history[0].step, [], TrainState.step

    def pressed(self, *args, **kwargs):
        loss = step(self, *args, **kwargs)
        seen.append(1)
        if len(seen) == steps:
            os.kill(os.getpid(), signal.SIGINT)
            if twice_in_mid_step:
                os.kill(os.getpid(), signal.SIGINT)
        return loss

    monkeypatch.setattr(TrainState, "step", pressed)
    with pytest.raises(StoppedError), interrupts("again"):
        finetune(model, data, settings, folder=tmp_path)
    at = load_generation(tmp_path / "state").facts["at"]
    assert (at["epoch"], at["step"]) == (0, 0 if twice_in_mid_step else steps)
    resumed = finetune(model, data, settings, folder=tmp_path)
    assert same(resumed.model, whole.model)
    without = [replace(row, images_per_second=0) for row in whole.history]
    assert [replace(row, images_per_second=0) for row in resumed.history] == without


@pytest.mark.parametrize("seeded", [False, True])
def test_somebody_elses_loader_resumes_by_epoch(tmp_path, seeded):
    def loader():
        generator = torch.Generator().manual_seed(5) if seeded else None
        return noise(shuffle=True, generator=generator)

    settings = FineTuneSettings(epochs=4, optimizer="adamw", lr=0.01, save_steps=1)
    model = tiny(dropout=0.2)
    whole = finetune(model, loader(), settings)
    with pytest.raises(StopError):
        finetune(model, loader(), settings, folder=tmp_path, track=stop_at("epoch 3/4", 2))
    resumed = finetune(model, loader(), settings, folder=tmp_path)
    assert same(whole.model, resumed.model)


def test_the_state_of_another_run_is_refused(tmp_path):
    settings = FineTuneSettings(epochs=1, recalibrate=0)
    finetune(tiny(), noise(), settings, folder=tmp_path)
    with pytest.raises(InputError) as caught:
        finetune(tiny(), noise(), FineTuneSettings(epochs=2), folder=tmp_path)
    assert caught.value.what == f"{tmp_path}: holds the state of another fine-tuning"
    assert caught.value.why == "it differs in: settings"
    other = tiny()
    other[0].weight.data.add_(1)
    with pytest.raises(InputError, match="it differs in: model"):
        finetune(other, noise(), settings, folder=tmp_path)


def test_generations_survive_damage(tmp_path):
    for number in range(4):
        tensors = {"a": torch.full((3,), float(number))}
        save_generation(tmp_path, Generation(tensors, {"number": number}))
    assert len(list(tmp_path.iterdir())) == 4
    newest = max(tmp_path.glob("*.safetensors"))
    damaged = bytearray(newest.read_bytes())
    damaged[-1] ^= 1
    newest.write_bytes(damaged)
    assert load_generation(tmp_path).facts == {"number": 2}
    newest.with_suffix(".sha256").unlink()
    assert load_generation(tmp_path).tensors["a"].tolist() == [2, 2, 2]
    save_generation(tmp_path, Generation({"a": torch.zeros(1)}, {"number": 9}))
    assert load_generation(tmp_path).facts == {"number": 9}
    for path in tmp_path.glob("*.safetensors"):
        path.write_bytes(b"")
    with pytest.raises(InputError) as caught:
        load_generation(tmp_path)
    assert caught.value.what == f"{tmp_path}: the saved training state is damaged"
    assert load_generation(tmp_path / "nothing") is None


# real processes


def work(folder: Path, *arguments: str, **environment: str) -> subprocess.Popen:
    clean = {n: v for n, v in os.environ.items() if n not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    return subprocess.Popen(
        [sys.executable, finetune_worker.__file__, str(folder), *arguments],
        env={**clean, "OMP_NUM_THREADS": "1", **environment},
        stderr=subprocess.PIPE,
        text=True,
    )


def wait(process: subprocess.Popen) -> int:
    _, errors = process.communicate(timeout=240)
    if process.returncode > 0:
        raise AssertionError(errors)
    return process.returncode


@pytest.mark.slow  # test_kills.py has one kill of a small run in the default suite
def test_kill_9_in_mid_epoch_changes_nothing(tmp_path):
    kills = ("epoch 1/3:12", "epoch 3/3:7")
    for kill in kills:
        assert wait(work(tmp_path / "killed", KILL=kill)) == -signal.SIGKILL
    assert wait(work(tmp_path / "killed")) == 0
    finetune_worker.train(tmp_path / "whole")
    ends = [load_file(tmp_path / name / "end.safetensors") for name in ("killed", "whole")]
    assert ends[0].keys() == ends[1].keys()
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    folder = tmp_path_factory.mktemp("alone")
    finetune_worker.together(folder)
    return folder


@pytest.mark.slow  # test_processes.py has every stage on two processes in the default suite
@pytest.mark.parametrize("world", [2, 3])
def test_processes_together_equal_one(tmp_path, alone, world):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    places = {"WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    processes = [
        work(tmp_path, "together", RANK=str(r), LOCAL_RANK=str(r), **places) for r in range(world)
    ]
    assert [wait(p) for p in processes] == [0] * world
    ours, theirs = (json.loads((f / "end.json").read_text()) for f in (tmp_path, alone))
    for name in ("own", "foreign"):
        assert {**ours[name], "loss": 0} == {**theirs[name], "loss": 0}
        assert ours[name]["loss"] == pytest.approx(theirs[name]["loss"], rel=1e-12)
    assert ours["curve"] == pytest.approx(theirs["curve"], rel=1e-4)
    assert ours["foreign curve"] == pytest.approx(theirs["foreign curve"], rel=1e-4)
    ends = [load_file(f / "end.safetensors") for f in (tmp_path, alone)]
    for name, value in ends[0].items():
        assert torch.allclose(value, ends[1][name], rtol=1e-2, atol=1e-3), name


@pytest.mark.gpu
def test_on_a_gpu():
    data = open_data("digits", DataSettings(cache="device"))
    settings = FineTuneSettings(epochs=6, batch_size=64, lr=0.1, precision="bf16", ema=0.9)
    tuned = finetune(tiny(), data, settings)
    assert next(tuned.model.parameters()).device.type == "cpu"
    assert evaluate(tuned.model, data.reporting()).top1 > 0.8


@pytest.mark.parametrize("how", ["frozen", "detached"])
def test_a_network_without_derivatives_is_named(how):
    model = tiny().requires_grad_(how != "frozen")
    if how == "detached":
        model.register_forward_hook(lambda module, inputs, output: output.detach())
    with pytest.raises(InputError, match="its answers have no derivatives"):
        finetune(model, noise(), FineTuneSettings(epochs=1))
