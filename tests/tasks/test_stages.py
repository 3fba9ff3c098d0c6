"""Every stage with other tasks than classification."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from nets import SE, Inner, detector, images
from torch import nn

import seprune
from seprune.errors import InputError
from seprune.importance.ablation import measure_sensitivity
from seprune.importance.probes import Probe, ProbeSettings, probed, train_probes
from seprune.recovery.candidates import TrialOptions, choose_plan, output_error
from seprune.recovery.recalibrate import recalibrate
from seprune.tasks import MultiLabel, Regression


class TwoHeads(nn.Module):
    """A branch for each head; each has a gate."""

    def __init__(self, form=tuple) -> None:
        super().__init__()
        self.p, self.q = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(3, 8, 3, padding=1)
        self.se_p, self.se_q = SE(8), SE(8)
        self.a, self.b = nn.Conv2d(8, 3, 1), nn.Conv2d(8, 2, 1)
        self.form = form

    def forward(self, x):
        first = self.a(self.se_p(self.p(x).relu()))
        second = self.b(self.se_q(self.q(x).relu())).mean((2, 3))
        if self.form is torch.cat:
            return torch.cat([first.flatten(1), second], 1)
        return {"out": first, "aux": second} if self.form is dict else (first, second)


@pytest.mark.parametrize("form", [tuple, dict])
def test_derivatives_project_every_output(form):
    torch.manual_seed(0)
    model, flat = TwoHeads(form), TwoHeads(torch.cat)
    flat.load_state_dict(model.state_dict())
    found = {}
    for network in (model, flat):
        structure = seprune.analyse(network, images())
        found[network] = seprune.collect_statistics(
            network, [images(6)], structure=structure, options=seprune.CollectOptions(device="cpu")
        )
    assert set(found[model].groups) == set(found[flat].groups) >= {"p", "q"}
    for name, own in found[model].groups.items():
        assert float(own["effect_square"].sum()) > 0
        assert torch.equal(own["effect_square"], found[flat].groups[name]["effect_square"])


def test_gradients_of_labels_are_those_of_the_loss_of_the_task():
    torch.manual_seed(0)
    model, x, y = Inner(classes=1).eval(), images(5), torch.randn(5, 1) * 4
    own = seprune.collect_statistics(
        model, [(x, y)], gradients="labels",
        options=seprune.CollectOptions(device="cpu", task=Regression()),
    )  # fmt: skip
    gates = []
    hook = model.se.fc.register_forward_hook(lambda m, i, gate: gates.append(gate))
    loss = (model(x) - y).square().sum()
    hook.remove()
    u = gates[0] * torch.autograd.grad(loss, gates[0])[0]
    (values,) = own.values.values()
    assert torch.allclose(values["effect_square"].float(), u.square().mean(0), rtol=1e-4)
    with pytest.raises(InputError, match="gradients 'sampled' need classes"):
        seprune.collect_statistics(
            model, [(x, y)], gradients="sampled", options=seprune.CollectOptions(task=Regression())
        )


def test_dict_batches_and_several_inputs_are_collected_and_recalibrated():
    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net, self.norm = Inner(), nn.BatchNorm2d(3)

        def forward(self, pixel_values, weight):
            return self.net(self.norm(pixel_values) * weight[:, None, None, None])

    torch.manual_seed(0)
    model, x, w, y = Named(), images(6), torch.rand(6), torch.arange(6) % 3
    batch = {"pixel_values": x, "weight": w, "labels": y}
    options = seprune.CollectOptions(device="cpu")
    one, other = (
        seprune.collect_statistics(model, [form], gradients="logits", options=options)
        for form in (batch, ((x, w), y))
    )
    for name, own in one.values.items():
        assert torch.equal(own["effect_square"], other.values[name]["effect_square"])
        assert torch.equal(own["mean"], other.values[name]["mean"])
    assert one.classes == 3
    fresh = recalibrate(model, [batch], device="cpu")
    assert torch.allclose(fresh.norm.running_mean, x.mean((0, 2, 3)), atol=1e-6)
    with pytest.raises(InputError, match="takes more than an image: pixel_values, weight"):
        seprune.collect_statistics(model, [(x, y)])


def test_ablation_measures_the_metric_of_the_task():
    torch.manual_seed(0)
    model, x = Inner(classes=4).eval(), images(12)
    y = torch.randint(2, (12, 4)).float()
    structure = seprune.analyse(model, images())
    importance = seprune.score(structure, model=model, scoring=seprune.Scoring("l2"))
    found = measure_sensitivity(
        model,
        structure,
        importance,
        [(x, y)],
        options=seprune.SensitivityOptions(task=MultiLabel()),
    )
    whole = seprune.evaluate(model, [(x, y)], task=MultiLabel())
    assert (found.loss, found.value) == (whole.loss, whole.metrics["f1"])
    assert any(row.losses[-1].loss != whole.loss for row in found.groups)


def test_fine_tuning_takes_the_loss_of_the_task():
    torch.manual_seed(0)
    model, x = Inner(classes=1), images(16)
    y = x.mean((1, 2, 3))[:, None] * 50
    settings = seprune.FineTuneSettings(
        epochs=1, lr=0.01, momentum=0.0, weight_decay=0.0, recalibrate=0, norms="eval",
        schedule="constant", optimizer="sgd", device="cpu",
    )  # fmt: skip
    model.eval()
    start = (model(x) - y).square().mean()
    gradient = torch.autograd.grad(start, model.fc.bias)[0]
    tuned = seprune.finetune(model, [(x, y)], settings)
    assert tuned.history[0].loss == pytest.approx(start.item(), rel=1e-5)
    moved = tuned.last.fc.bias - model.fc.bias
    assert torch.allclose(moved, -0.01 * gradient, rtol=1e-3)
    labels = torch.randint(2, (16, 4)).float()
    many = Inner(classes=4).eval()
    wanted = nn.functional.binary_cross_entropy_with_logits(many(x), labels)
    history = seprune.finetune(many, ([(x, labels)], [(x, labels)]), settings).history
    assert history[0].loss == pytest.approx(wanted.item(), rel=1e-5)
    mixing = seprune.FineTuneSettings(epochs=1, mixup=0.5, recalibrate=0, device="cpu")
    with pytest.raises(seprune.UsageError, match="images of the task regression cannot be mixed"):
        seprune.finetune(model, [(x, y)], mixing)


def detection_batch(count):
    """Images of one bright box each."""
    pictures, targets = [], []
    for number in range(count):
        picture = torch.rand(3, 64, 64) * 0.2
        left = 4 + 8 * (number % 4)
        picture[:, 20:44, left : left + 24] += 0.8
        box = torch.tensor([[left, 20.0, left + 24, 44.0]])
        pictures.append(picture)
        targets.append({"boxes": box, "labels": torch.tensor([1 + number % 2])})
    return pictures, targets


class Named(Inner):
    """Takes its image by name, and gives a dict, as the networks of Hugging Face do."""

    def forward(self, pixel_values, scale=None):
        x = super().forward(pixel_values if scale is None else pixel_values * scale)
        return {"logits": x, "hidden": x * 2}


def test_fine_tuning_takes_batches_of_any_structure():
    torch.manual_seed(0)
    x, y = images(16), torch.randint(4, (16,))
    plain, named = Inner(classes=4).eval(), Named(classes=4).eval()
    named.load_state_dict(plain.state_dict())
    settings = seprune.FineTuneSettings(
        epochs=1, lr=0.01, recalibrate=16, norms="train", schedule="constant", accumulate=2,
        mixup=0.0, device="cpu",
    )  # fmt: skip
    scale = torch.ones(16, 1, 1, 1)
    forms = {
        "tuple": (plain, (x, y), None),
        "dict": (named, {"pixel_values": x, "labels": y}, None),
        "two inputs": (named, (x, scale, y), seprune.Classification(inputs=2)),
        "inputs in a list": (named, ([x, scale], y), None),
    }
    found = {}
    for name, (model, batch, task) in forms.items():
        own = replace(settings, task=task)
        found[name] = seprune.finetune(model, ([batch], [batch]), own)
    first = found["tuple"]
    assert first.history[0].metrics == pytest.approx(
        seprune.evaluate(first.last, [(x, y)], device="cpu").metrics
    )
    for tuned in found.values():
        assert tuned.history[0].loss == first.history[0].loss
        for a, b in zip(tuned.last.parameters(), first.last.parameters(), strict=True):
            assert torch.equal(a, b)


def test_history_and_metrics_file_hold_the_metrics_of_the_task(tmp_path):
    torch.manual_seed(0)
    x, labels = images(16), torch.randint(2, (16, 4)).float()
    settings = seprune.FineTuneSettings(epochs=2, lr=0.01, recalibrate=0, device="cpu")
    batches = [(x, labels)]
    tuned = seprune.finetune(Inner(classes=4).eval(), (batches, batches), settings, folder=tmp_path)
    assert isinstance(tuned.task, MultiLabel)
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    score = seprune.evaluate(tuned.last, batches, device="cpu")
    assert (rows[-1]["f1"], rows[-1]["map"]) == (score.metrics["f1"], score.metrics["map"])
    assert "top1" not in rows[-1]
    assert tuned.history[-1].top1 is None
    assert tuned.numbers()["metric"] == "f1"


def test_a_detector_is_tuned_by_its_own_losses():
    torch.manual_seed(0)
    model, batch = detector(), detection_batch(4)
    settings = seprune.FineTuneSettings(
        epochs=12, lr=3e-3, optimizer="adamw", schedule="constant", norms="eval",
        recalibrate=0, accumulate=2, device="cpu",
    )  # fmt: skip
    tuned = seprune.finetune(model, ([batch], [batch]), settings)
    assert tuned.task.name == "detection"
    assert tuned.history[-1].validation_loss < 0.8 * tuned.before.loss
    score = seprune.evaluate(tuned.last, [batch], device="cpu")
    assert tuned.history[-1].metrics == dict(score.metrics)
    assert tuned.history[-1].validation_loss == pytest.approx(score.loss)


def halved(model, example, share=0.5):
    structure = seprune.analyse(model, example)
    importance = seprune.score(structure, model=model, scoring=seprune.Scoring("l2"))
    allocation = seprune.Allocation(min_channels=2)
    return seprune.make_plan(structure, importance, allocation=allocation, macs=share)


def test_label_free_recovery_takes_batches_of_any_structure():
    torch.manual_seed(0)
    x = images(24)
    plain, named = Inner(classes=4).eval(), Named(classes=4).eval()
    named.load_state_dict(plain.state_dict())
    plan, scale = halved(plain, images()), torch.ones(8, 1, 1, 1)
    mine = [{"pixel_values": part, "labels": torch.zeros(8).long()} for part in x.split(8)]
    two = [((part, scale), torch.zeros(8)) for part in x.split(8)]
    cut = {m: seprune.prune(m, plan) for m in (plain, named)}
    refitted = [
        seprune.refit(m, cut[m], plan, loader, options=seprune.RefitOptions(device="cpu"))
        for m, loader in ((plain, x.split(8)), (named, mine), (named, two))
    ]
    assert refitted[0].layers
    for other in refitted[1:]:
        for a, b in zip(refitted[0].model.parameters(), other.model.parameters(), strict=True):
            assert torch.allclose(a, b, atol=1e-5)
    options = seprune.ReconstructOptions(epochs=2, shift=0.0, flip=False, device="cpu")
    errors = [
        seprune.reconstruct(m, cut[m], plan, loader, options=options).errors
        for m, loader in ((plain, x.split(8)), (named, mine), (named, two))
    ]
    # the dict also gives `hidden`, twice the logits: its relative error is the same
    assert errors[1] == pytest.approx(errors[0], rel=1e-4)
    assert errors[2] == pytest.approx(errors[0], rel=1e-4)


def test_one_call_compresses_a_network_of_any_inputs():
    torch.manual_seed(0)
    x = images(24)
    plain, named = Inner(classes=4).eval(), Named(classes=4).eval()
    named.load_state_dict(plain.state_dict())
    scale, y = torch.ones(8, 1, 1, 1), torch.arange(8) % 4
    loaders = [
        (plain, [(part, y) for part in x.split(8)], None),
        (named, [{"pixel_values": part, "labels": y} for part in x.split(8)], None),
        (named, [(part, scale, y) for part in x.split(8)], seprune.Classification(inputs=2)),
    ]
    made = [
        seprune.compress(model, loader, test_loader=loader, task=task, device="cpu", macs=0.6)
        for model, loader, task in loaders
    ]
    keeps = [[g.keep for g in own.plan.groups] for own in made]
    assert keeps[0] == keeps[1] == keeps[2]
    with torch.no_grad():
        wanted = made[0].model(x)
        assert torch.allclose(made[1].model(x)["logits"], wanted, atol=1e-4)
        assert torch.allclose(made[2].model(x, scale[:1])["logits"], wanted, atol=1e-4)
    assert made[0].before == made[1].before == made[2].before
    assert made[1].scores["baseline"] == made[0].scores["baseline"]


@pytest.mark.parametrize("labelled", [pytest.param(True, marks=pytest.mark.slow), False])
def test_one_call_compresses_a_detector(labelled):
    pytest.importorskip("pycocotools", reason="the extra tasks is not installed")
    torch.manual_seed(0)
    model, (pictures, targets) = detector(), detection_batch(8)
    loader = [(pictures[i : i + 4], targets[i : i + 4]) for i in (0, 4)]
    given = loader if labelled else [own for own, _ in loader]
    done = seprune.compress(model, given, test_loader=loader, device="cpu", macs=0.6)
    structure = seprune.analyse(model, (pictures[:2],))
    assert done.before.macs == structure.costs()["macs"]
    assert done.before == seprune.count(model, (pictures[:1],)) == seprune.count(model, (pictures,))
    assert done.after.macs == structure.macs_at({g.name: len(g.keep) for g in done.plan.groups})
    assert done.scores["pruned"] == seprune.evaluate(done.model, loader, device="cpu")
    task = seprune.Detection()
    cut = seprune.prune(model, done.plan)
    before, after = (output_error(model, m, loader, task=task) for m in (cut, done.model))
    assert after < 0.8 * before


@pytest.mark.parametrize("side", [pytest.param(64, marks=pytest.mark.slow), None])
def test_a_detector_is_recovered_at_boxes_that_do_not_depend_on_it(side):
    torch.manual_seed(0)
    model = detector()
    pictures = [torch.rand(3, 64, side or 48 + 2 * n) for n in range(12)]
    plan = halved(model, (pictures[:2],))
    cut = seprune.prune(model, plan)
    assert model.backbone[0].weight.shape != cut.backbone[0].weight.shape
    batches = [pictures[i : i + 4] for i in range(0, 12, 4)]
    found = seprune.refit(model, cut, plan, batches, options=seprune.RefitOptions(device="cpu"))
    assert "roi_heads.box_head.fc6" in found.layers
    task = seprune.Detection()
    before, after = (output_error(model, m, batches, task=task) for m in (cut, found.model))
    assert after < 0.5 * before
    assert not found.model._forward_hooks
    options = seprune.ReconstructOptions(epochs=2, device="cpu", images=12)
    again = seprune.reconstruct(model, found.model, plan, batches, options=options)
    assert again.errors[again.best] <= again.errors[0]
    plans = {"given": plan, "wider": halved(model, (pictures[:2],), 0.8)}
    trial = TrialOptions(images=8, held_out=4, device="cpu")
    assert choose_plan(model, plans, batches, options=trial).name == "wider"


def test_probes_learn_from_the_loss_of_the_task():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 4, 1)).eval()
    structure = seprune.analyse(model, images())
    x = images(8)
    masks = (x.mean(1) > 0).long()
    settings = ProbeSettings(epochs=8, lr=0.05, device="cpu")
    twin = probed(model, structure, settings)
    before = nn.functional.cross_entropy(twin(x), masks).item()
    after = train_probes(twin, [(x, masks)], settings)
    assert after < before
    probe = next(m for m in twin.modules() if isinstance(m, Probe))
    assert torch.isfinite(probe.fc1.weight).all()
    for name, own in model.state_dict().items():
        assert torch.equal(own, twin.state_dict()[name])
