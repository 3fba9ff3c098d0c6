"""Evaluation and BatchNorm recalibration against closed forms, on one process."""

import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from seprune.data import open_data
from seprune.errors import EnvironmentFault, InputError
from seprune.measure.metrics import evaluate
from seprune.recovery.recalibrate import recalibrate
from seprune.runtime.distributed import resolve_device


class Table(nn.Module):
    """The image is the row of logits."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, x):
        return x.flatten(1) * self.scale


def batches(logits, labels, size):
    return DataLoader(TensorDataset(logits[:, :, None, None], labels), batch_size=size)


@pytest.mark.parametrize("size", [1, 2, 7, 64])
def test_scores_equal_the_closed_form_for_any_batch_size(size):
    torch.manual_seed(0)
    logits, labels = torch.randn(50, 9), torch.randint(0, 9, (50,))
    score = evaluate(Table(), batches(logits, labels, size), device="cpu")
    order = logits.argsort(1, descending=True)
    assert score.count == 50
    assert score.top1 == (order[:, 0] == labels).sum().item() / 50
    assert score.top5 == (order[:, :5] == labels[:, None]).any(1).sum().item() / 50
    assert score.loss == pytest.approx(F.cross_entropy(logits.double(), labels).item(), rel=1e-6)
    assert score.nonfinite == 0


def test_equal_logits_are_ranked_by_class_number():
    score = evaluate(Table(), batches(torch.zeros(10, 10), torch.arange(10), 3), device="cpu")
    assert (score.top1, score.top5) == (0.1, 0.5)
    assert score.loss == pytest.approx(math.log(10), rel=1e-6)


def test_fewer_than_five_classes():
    score = evaluate(Table(), batches(torch.eye(3), torch.arange(3), 2), device="cpu")
    assert (score.top1, score.top5) == (1.0, 1.0)


def test_a_model_that_gives_nan_is_not_right_by_chance():
    logits = torch.zeros(4, 3)
    logits[1] = float("nan")
    logits[2, 1] = float("inf")
    score = evaluate(Table(), batches(logits, torch.tensor([0, 0, 1, 0]), 2), device="cpu")
    assert (score.top1, score.count, score.nonfinite) == (0.5, 4, 2)
    assert score.loss == pytest.approx(math.log(3), rel=1e-6)
    none = evaluate(Table(), batches(logits[1:3], torch.tensor([0, 1]), 2), device="cpu")
    assert (none.top1, none.nonfinite) == (0.0, 2)
    assert math.isnan(none.loss)


def test_no_images_and_strange_labels():
    with pytest.raises(InputError, match="there are no images to evaluate on"):
        evaluate(Table(), [], device="cpu")
    loader = batches(torch.zeros(5, 3), torch.tensor([0, 1, 2, 3, -1]), 2)
    with pytest.raises(InputError) as caught:
        evaluate(Table(), loader, device="cpu")
    assert caught.value.what == "2 of 5 labels are outside 0..2"
    assert caught.value.why == "the model has 3 outputs"


def test_an_output_that_is_no_table_of_logits():
    loader = [(torch.zeros(2, 3, 4, 4), torch.zeros(2, dtype=torch.int64))]
    with pytest.raises(InputError, match=r"no table of class logits .* but \(2, 3, 4, 4\)"):
        evaluate(nn.Identity(), loader, device="cpu")


def test_the_model_is_left_as_found_even_when_the_data_raise():
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Dropout(), nn.Flatten())
    model.train()
    model[1].eval()
    before = {n: t.clone() for n, t in model.state_dict().items()}
    evaluate(model, open_data("digits").reporting(), device="cpu")

    def broken():
        yield torch.zeros(2, 1, 8, 8), torch.zeros(2, dtype=torch.int64)
        raise OSError("gone")

    with pytest.raises(OSError, match="gone"):
        evaluate(model, broken(), device="cpu")
    assert [m.training for m in model.modules()] == [True, True, False, True, True]
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())


def test_recalibrated_statistics_equal_the_hand_computed():
    torch.manual_seed(0)
    model = nn.Sequential(nn.BatchNorm2d(3, momentum=0.3), nn.Dropout(0.9), nn.Flatten()).train()
    groups = [torch.randn(n, 3, 5, 5) * 2 + 1 for n in (8, 8, 3)]
    loader = [(images, torch.zeros(len(images))) for images in groups]
    fresh = recalibrate(model, loader, device="cpu")
    weights = torch.tensor([8, 8, 3], dtype=torch.float64) / 19
    means = torch.stack([g.double().mean((0, 2, 3)) for g in groups])
    variances = torch.stack([g.double().var((0, 2, 3)) for g in groups])
    assert torch.allclose(fresh[0].running_mean.double(), weights @ means, atol=1e-6)
    assert torch.allclose(fresh[0].running_var.double(), weights @ variances, rtol=1e-5)
    assert fresh[0].momentum == 0.3
    assert fresh[0].training
    assert model[0].running_mean.eq(0).all()


def test_recalibration_refuses_an_empty_loader_and_nan():
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2))
    before = {n: t.clone() for n, t in model.state_dict().items()}
    with pytest.raises(InputError) as caught:
        recalibrate(model, [], device="cpu")
    assert caught.value.what == "BatchNorm cannot be recalibrated without images"
    images = torch.zeros(2, 1, 5, 5)
    images[0, 0, 0, 0] = float("nan")
    with pytest.raises(InputError, match="1: recalibrated BatchNorm statistics are not finite"):
        recalibrate(model, [(images, torch.zeros(2))], device="cpu")
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())


def test_a_model_without_batchnorm_is_copied():
    model = nn.Linear(2, 2)
    fresh = recalibrate(model, [], device="cpu")
    assert fresh is not model
    assert torch.equal(fresh.weight, model.weight)


def test_devices():
    assert resolve_device("cpu") == torch.device("cpu")
    with pytest.raises(EnvironmentFault, match="device 'gpu' is unknown"):
        resolve_device("gpu")
    if not torch.cuda.is_available():
        assert resolve_device("auto") == torch.device("cpu")
        with pytest.raises(EnvironmentFault, match="'cuda' was asked for, but there is no CUDA"):
            resolve_device("cuda")
