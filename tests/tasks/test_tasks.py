"""Tasks: losses, metrics and batches against closed forms."""

from __future__ import annotations

import math
from collections import namedtuple
from dataclasses import dataclass

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from seprune.errors import EnvironmentFault, InputError, UsageError
from seprune.measure.metrics import evaluate
from seprune.tasks import (
    Classification,
    Detection,
    Embedding,
    FromCallables,
    MultiLabel,
    Regression,
    Segmentation,
    infer_task,
    task_by_name,
)
from seprune.tasks.batches import call, positional, primary, to_device


class Echo(nn.Module):
    """The input is the output."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, x):
        return x * self.scale


class Boxes(nn.Module):
    """A detector that answers with the boxes it was made with."""

    def __init__(self, answers):
        super().__init__()
        self.answers = answers
        self.bias = nn.Parameter(torch.tensor(0.5))

    def forward(self, images, targets=None):
        if self.training:
            return {"a": self.bias * 2, "b": self.bias}
        return self.answers[: len(images)]


def test_regression_of_one_number_has_the_squared_error_and_r2():
    x, y = torch.tensor([[1.0], [2.0], [4.0]]), torch.tensor([[1.5], [2.0], [3.0]])
    score = evaluate(Echo(), [(x[:2], y[:2]), (x[2:], y[2:])], task=Regression(), device="cpu")
    assert score.loss == pytest.approx((0.25 + 0 + 1) / 3)
    residual, total = 1.25, float((y - y.mean()).square().sum())
    assert score.metrics == {
        "r2": pytest.approx(1 - residual / total, rel=1e-4),
        "mae": pytest.approx(0.5),
    }
    assert (score.task, score.metric, score.value) == ("regression", "r2", score.metrics["r2"])
    plain = score.plain()
    assert set(plain) == {"task", "metrics", "loss", "count", "nonfinite"}
    assert math.isnan(score.top1)


def test_one_image_that_determines_no_metric_is_named():
    with pytest.raises(InputError, match="the metric r2 cannot be computed") as refused:
        evaluate(Echo(), [(torch.ones(1, 1), torch.ones(1, 1))], task=Regression(), device="cpu")
    assert "two samples" in refused.value.why


def test_regression_takes_targets_of_shape_b_for_outputs_b1():
    x, y = torch.tensor([[1.0], [2.0]]), torch.tensor([3.0, 2.0])
    assert Regression().losses(x, y).tolist() == [4.0, 0.0]  # not broadcast to (2, 2)
    with pytest.raises(InputError, match="compares number by number"):
        Regression().losses(x, torch.zeros(3))


def test_multi_label_is_binary_cross_entropy_and_macro_f1():
    torch.manual_seed(0)
    x, y = torch.randn(20, 4), torch.randint(2, (20, 4)).float()
    score = evaluate(Echo(), [(x, y)], task=MultiLabel(), device="cpu")
    p = x.sigmoid()
    wanted = -(y * p.log() + (1 - y) * (1 - p).log()).mean()
    assert score.loss == pytest.approx(float(wanted), rel=1e-5)
    guess = x > 0
    right = (guess & (y == 1)).sum(0)
    f1 = (2 * right / (guess.sum(0) + (y == 1).sum(0))).mean()
    assert score.metrics["f1"] == pytest.approx(float(f1), rel=1e-6)
    with pytest.raises(InputError, match="multi_label takes a number in"):
        MultiLabel().losses(x, y * 2)


def test_segmentation_ignores_pixels_and_has_the_mean_iou():
    logits = torch.full((2, 3, 2, 2), -5.0)
    answer = torch.tensor([[[0, 1], [2, 2]], [[0, 0], [1, 1]]])
    logits.scatter_(1, answer[:, None], 5.0)
    masks = torch.tensor([[[0, 1], [2, 255]], [[0, 1], [1, 255]]])
    score = evaluate(Echo(), [(logits, masks)], task=Segmentation(), device="cpu")
    # class 0: 2 of 3, class 1: 2 of 3, class 2: 1 of 1
    assert score.metrics["miou"] == pytest.approx((2 / 3 + 2 / 3 + 1) / 3)
    assert score.metrics["pixel_accuracy"] == pytest.approx(5 / 6)
    right = math.log(1 + 2 * math.exp(-10))
    assert score.loss == pytest.approx((right + (2 * right + 10 + right) / 3) / 2, rel=1e-5)
    with pytest.raises(InputError, match="a mask holds class 3, the model has 3"):
        Segmentation().losses(logits, torch.full((2, 2, 2), 3))
    with pytest.raises(InputError, match="are no masks for outputs"):
        Segmentation().losses(logits, torch.zeros(2))


def test_segmentation_scales_logits_and_weighs_the_auxiliary_output():
    coarse = torch.tensor([[[[1.0]], [[3.0]]]])
    masks = torch.ones(1, 4, 4, dtype=torch.long)
    outputs = {"out": coarse, "aux": -coarse}
    main, aux = math.log(1 + math.exp(-2)), math.log(1 + math.exp(2))
    found = Segmentation().losses(outputs, masks)
    assert found.tolist() == pytest.approx([main + 0.5 * aux], rel=1e-5)


def test_a_single_logit_is_a_class_against_the_background():
    torch.manual_seed(0)
    logits, masks = torch.randn(3, 1, 4, 4) * 3, torch.randint(2, (3, 1, 4, 4))
    task = Segmentation()
    wanted = F.binary_cross_entropy_with_logits(logits, masks.float(), reduction="none")
    assert torch.allclose(task.losses(logits, masks), wanted.mean((1, 2, 3)), rtol=1e-5)
    score = evaluate(Echo(), [(logits, masks)], device="cpu")
    assert score.task == "segmentation"
    answer, truth = logits > 0, masks == 1
    ious = [((a & b).sum() / (a | b).sum()).item() for a, b in ((answer, truth), (~answer, ~truth))]
    assert score.value == pytest.approx(sum(ious) / 2, rel=1e-5)
    teacher = torch.randn(3, 1, 4, 4)
    p, q = torch.sigmoid(teacher / 2), torch.sigmoid(logits / 2)
    kl = p * (p / q).log() + (1 - p) * ((1 - p) / (1 - q)).log()
    found = task.distillation(logits, teacher, temperature=2.0)
    assert found.item() == pytest.approx(4 * kl.mean().item(), rel=1e-4)


def test_a_single_output_is_never_trained_by_a_softmax():
    x = torch.randn(4, 1)
    with pytest.raises(InputError, match="a single output, which tells no classes apart") as one:
        Classification().loss(x, torch.zeros(4).long())  # would be exactly 0
    assert "--task multi_label" in one.value.fix
    with pytest.raises(InputError, match="a single output"):
        Classification().distillation(x, x + 1, temperature=1.0)


def _box(x, label, score=None):
    own = {"boxes": torch.tensor([[x, 0.0, x + 10, 10.0]]), "labels": torch.tensor([label])}
    return own if score is None else own | {"scores": torch.tensor([score])}


def test_detection_has_coco_map_and_the_losses_of_training_mode():
    images = [torch.rand(3, 20, 30), torch.rand(3, 25, 20)]
    targets = [_box(0.0, 1), _box(5.0, 2)]
    model = Boxes([_box(0.0, 1, 0.9), _box(5.0, 2, 0.8)]).eval()
    score = evaluate(model, [(images, targets)], device="cpu")
    assert score.task == "detection"
    assert score.metrics == {"map": pytest.approx(1.0), "map50": pytest.approx(1.0)}
    assert (score.loss, score.count) == (pytest.approx(1.5), 2)
    assert not model.training
    missed = Boxes([_box(0.0, 1, 0.9), _box(15.0, 2, 0.8)]).eval()
    assert evaluate(missed, [(images, targets)], device="cpu").metrics["map"] == pytest.approx(0.5)


def test_detection_cuts_batches_and_names_what_is_no_box():
    images, targets = [torch.rand(3, 4, 4), torch.rand(3, 5, 5)], [_box(0.0, 1), _box(0.0, 2)]
    task = Detection()
    assert task.size((images, targets)) == 2
    some, theirs = task.part((images, targets), slice(1, None))
    assert torch.equal(some[0], images[1])
    assert theirs[0] is targets[1]
    for own in ({"images": images, "targets": targets}, {"labels": targets, "x": images}):
        assert task.split(own).target == targets
        assert torch.equal(task.split(task.part(own, slice(1, None))).args[0][0], images[1])
        assert isinstance(infer_task(own), Detection)
    assert len(task.split({"images": images}).args[0]) == 2
    with pytest.raises(InputError, match="the targets of a batch are no boxes"):
        task.split((images, [{"labels": 1}, {}]))
    with pytest.raises(InputError, match="not images and their boxes"):
        task.split({"x": 1})
    with pytest.raises(UsageError, match="a detector's outputs cannot be distilled"):
        task.distillation({}, {}, temperature=1.0)
    with pytest.raises(InputError, match="no head of a detector is found"):
        task.flat_outputs(Echo(), images)
    with pytest.raises(InputError, match="where losses are expected"):
        task.loss([], targets)


def test_embedding_has_recall_at_one_without_a_classifier():
    angles = torch.tensor([0.0, 0.1, 1.5, 1.7, 3.0])
    x = torch.stack([angles.cos(), angles.sin()], 1) * torch.tensor([[1.0], [9], [1], [2], [3]])
    labels = torch.tensor([700, 700, 5, 5, 5])
    score = evaluate(Echo(), [(x[:3], labels[:3]), (x[3:], labels[3:])], task=Embedding())
    assert score.metrics == {"recall@1": 1.0}
    assert evaluate(Echo(), [(x, torch.tensor([700, 5, 5, 5, 5]))], task=Embedding()).metrics == {
        "recall@1": pytest.approx(3 / 5)
    }
    own = F.normalize(x, dim=1) @ F.normalize(x, dim=1).t() / 0.1
    others = [1, 2, 3, 4]
    first = -(own[0, 1] - own[0, others].logsumexp(0))
    assert Embedding().losses(x, labels)[0].item() == pytest.approx(first.item(), rel=1e-2)
    with pytest.raises(InputError, match="name nothing for embeddings"):
        Embedding().losses(x, x)


def test_callables_add_several_losses_and_average_their_metric():
    task = FromCallables(
        forward_fn=lambda model, batch: model(batch["x"]),
        loss_fn=lambda out, y: {"a": (out - y).abs().mean(), "b": out.mean()},
        metric_fn=lambda out, y: (out == y).float().mean(),
        target_fn=lambda batch: batch["z"],
        metric="accuracy",
    )
    batches = [{"x": torch.tensor([1.0, 2.0]), "z": torch.tensor([1.0, 3.0])},
               {"x": torch.tensor([4.0]), "z": torch.tensor([4.0])}]  # fmt: skip
    score = evaluate(Echo(), batches, task=task, device="cpu")
    assert score.metrics == {"accuracy": pytest.approx(2 / 3)}
    assert score.loss == pytest.approx((2 * (0.5 + 1.5) + (0 + 4)) / 3)


@pytest.mark.parametrize(
    ("target", "task"),
    [
        (torch.tensor([3, 1]), Classification),
        (torch.zeros(2, 4, 4, dtype=torch.long), Segmentation),
        (torch.tensor([[1.0, 1.0], [0.0, 1.0]]), MultiLabel),
        (torch.tensor([[5.0], [-1.0]]), Regression),
        (torch.tensor([5.0, -1.0]), Regression),
        ([_box(0.0, 1), _box(0.0, 2)], Detection),
    ],
)
def test_a_task_is_inferred_from_its_targets(target, task):
    assert isinstance(infer_task((torch.rand(2, 3, 4, 4), target)), task)


def test_targets_of_several_tasks_or_none_are_refused_with_their_names():
    images = torch.rand(2, 3, 4, 4)
    with pytest.raises(InputError, match="multi_label and regression have such targets") as one:
        infer_task((images, torch.tensor([[0.2, 0.9], [0.0, 1.0]]).flatten()[:2]))
    assert "--task multi_label, --task regression" in one.value.fix
    with pytest.raises(InputError, match="classification and multi_label and regression"):
        infer_task((images, torch.eye(2)))
    with pytest.raises(InputError, match="numbers to be met") as dense:
        infer_task((images, torch.rand(2, 4, 4)))
    assert "--task regression" in dense.value.fix
    with pytest.raises(InputError, match="no task fits targets that are a list"):
        infer_task((images, ["a", "b"]))
    with pytest.raises(UsageError, match="'guess' is no task"):
        task_by_name("guess")
    assert isinstance(task_by_name("embedding"), Embedding)


def test_classification_refuses_targets_of_other_tasks_and_takes_probabilities():
    logits = torch.tensor([[1.0, 2.0, 0.0]])
    with pytest.raises(InputError, match="--task multi_label"):
        Classification().loss(logits, torch.tensor([[1.0, 1.0, 0.0]]))
    with pytest.raises(InputError, match="--task multi_label, --task regression"):
        Classification().loss(logits[:, :1], torch.tensor([[1.0]]))  # a loss of exactly 0 once
    soft = torch.tensor([[0.5, 0.25, 0.25]])
    wanted = -(soft * logits.log_softmax(1)).sum()
    assert torch.equal(Classification().loss(logits, soft), wanted)


def test_batches_of_any_structure_are_split_cut_and_called():
    class Two(nn.Module):
        def forward(self, a, b=None, *, c=None):
            return a + (0 if b is None else b)

    x, y = torch.tensor([1.0, 2.0]), torch.tensor([0, 1])
    task, model = Classification(), Two()
    for batch, wanted in [
        (x, x),
        ((x,), x),
        ((x, y), x),
        (((x, x), y), 2 * x),
        ({"a": x, "b": x, "labels": y}, 2 * x),
        ({"image": x, "label": y}, x),
        (({"a": x, "b": x}, y), 2 * x),
    ]:
        assert torch.equal(task.forward(model, batch), wanted)
        assert torch.equal(task.forward(model, task.part(batch, slice(1, 2))), wanted[1:])
    assert torch.equal(Classification(inputs=2).forward(model, (x, x, y)), 2 * x)
    Pair = namedtuple("Pair", "a labels")

    @dataclass
    class Fields:
        a: torch.Tensor
        b: torch.Tensor
        labels: torch.Tensor

    for own, wanted in ((Pair(x, y), x), (Fields(x, x, y), 2 * x)):
        assert torch.equal(task.forward(model, own), wanted)
        assert torch.equal(task.split(own).target, y)
        one = task.part(own, slice(1, 2))
        assert type(one) is type(own)
        assert torch.equal(task.forward(model, one), wanted[1:])
        assert torch.equal(task.forward(model, to_device(own, torch.device("cpu"))), wanted)
    assert torch.equal(primary(Fields(x, 2 * x, y)), x)
    args = positional(model, (), {"b": x, "a": y})
    assert args[0] is y
    assert args[1] is x
    assert call(model, (x,), {"c": 1}) is not None
    with pytest.raises(InputError, match="it holds no tensor"):
        task.split(["a"])


def test_outputs_are_flattened_all_of_them():
    class Heads(nn.Module):
        def forward(self, x):
            return {"a": x.flatten(1), "b": (x.mean((2, 3)), x.argmax())}

    x = torch.rand(2, 3, 4, 4)
    flat = Classification().flat_outputs(Heads(), x)
    assert torch.equal(flat, torch.cat([x.flatten(1), x.mean((2, 3))], 1))
    with pytest.raises(InputError, match="label-free derivatives project the outputs"):
        Classification().flat_outputs(nn.Identity(), torch.zeros(2, 1).long())


def test_missing_metrics_name_the_extra(monkeypatch):
    import importlib

    real = importlib.import_module

    def fail(name, *rest):
        if name.startswith("torchmetrics"):
            raise ImportError("No module named 'torchmetrics'")
        return real(name, *rest)

    monkeypatch.setattr(importlib, "import_module", fail)
    with pytest.raises(EnvironmentFault, match="torchmetrics and pycocotools") as caught:
        evaluate(Echo(), [(torch.rand(4, 1) * 9, torch.rand(4, 1) * 9)], task=Regression())
    assert caught.value.fix == "pip install 'seprune[tasks]'"


def test_the_deciding_metric_of_every_class_is_that_of_numpy():
    torch.manual_seed(0)
    logits = torch.randn(6, 5, 8, 8)
    logits[:, 4] = -99  # class 4 is never answered, nor in the masks
    masks = torch.randint(4, (6, 8, 8))
    masks[0, :2] = 255

    class Table(nn.Module):
        def forward(self, rows):
            return {"out": logits[rows.long()]}

    batches = [(torch.arange(0, 3.0), masks[:3]), (torch.arange(3, 6.0), masks[3:])]
    found = evaluate(Table(), batches, task=Segmentation(), device="cpu")
    answers, counted = logits.argmax(1), masks != 255
    expected = []
    for number in range(4):
        own, given = answers == number, masks == number
        both = (own & given & counted).sum().item()
        expected.append(both / ((own | given) & counted).sum().item())
    assert found.by_class[:4] == pytest.approx(expected)
    assert math.isnan(found.by_class[4])
    assert found.value == pytest.approx(sum(expected) / 4, abs=1e-6)


def test_the_precision_of_every_class_averages_to_that_of_all():
    pytest.importorskip("pycocotools", reason="the extra tasks is not installed")
    boxes = torch.tensor([[0.0, 0, 20, 20], [30, 30, 60, 60]])
    target = {"boxes": boxes, "labels": torch.tensor([1, 3])}
    answer = {**target, "scores": torch.tensor([0.9, 0.8])}
    wrong = {**answer, "labels": torch.tensor([1, 1])}

    class Told(nn.Module):
        def __init__(self, answers):
            super().__init__()
            self.answers = answers

        def forward(self, images, targets=None):
            if targets is not None:
                return {"loss": torch.zeros(())}
            return self.answers

    images = [torch.zeros(3, 64, 64)] * 2
    model = Told([answer, wrong]).eval()
    found = evaluate(model, [(images, [target, target])], device="cpu")
    assert math.isnan(found.by_class[0])
    assert math.isnan(found.by_class[2])
    assert found.by_class[1] == pytest.approx(1)  # the wrong one comes after both right ones
    assert found.by_class[3] == pytest.approx(51 / 101)  # COCO asks at 101 recalls; one of two
    assert found.value == pytest.approx((found.by_class[1] + found.by_class[3]) / 2, abs=1e-6)


@pytest.mark.parametrize("training", [False, True])
def test_a_network_that_takes_no_boxes_is_named(training):
    class Strange(nn.Module):
        def forward(self, images):
            return images.mean()

    batch = (
        [torch.zeros(3, 8, 8)],
        [{"boxes": torch.zeros(0, 4), "labels": torch.zeros(0).long()}],
    )
    for network in (nn.Conv2d(3, 4, 1), Strange()):
        with pytest.raises(InputError, match="does not take a list of images") as caught:
            Detection().forward(network.train(training), batch, training=training)
        assert type(network).__name__ in caught.value.what
        assert caught.value.why == str(caught.value.__cause__).strip().splitlines()[0]
