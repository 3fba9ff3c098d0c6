"""The small segmenter and the small detector: sizes, outputs, where their gates are."""

from __future__ import annotations

import pytest
import torch

import seprune
from seprune.models import build, input_size

GOLDEN = {"se_resnet8_fpn": (93_301, 23_022_208), "se_resnet8_ssd": (96_454, 13_431_424)}


@pytest.mark.parametrize("name", GOLDEN)
def test_parameters_macs_and_published_size(name):
    model = build(f"seprune/{name}").eval()
    cost = seprune.count(model, torch.rand(1, 3, 64, 64))
    assert (cost.params, cost.macs) == GOLDEN[name]
    assert input_size(f"seprune/{name}", model) == (3, 64, 64)
    gates = seprune.find_gates(model, torch.rand(2, 3, 64, 64))
    assert [gate.channels for gate in gates] == [16, 32, 64]


def test_the_segmenter_answers_for_every_pixel_and_every_parameter_learns():
    torch.manual_seed(0)
    model = build("seprune/se_resnet8_fpn", classes=7, input=(1, 64, 64)).train()
    out = model(torch.rand(2, 1, 48, 64))["out"]
    assert out.shape == (2, 7, 48, 64)
    out.square().sum().backward()
    assert [n for n, p in model.named_parameters() if p.grad is None] == []


def test_the_detector_has_torchvisions_losses_and_boxes_within_the_image():
    torch.manual_seed(0)
    model = build("seprune/se_resnet8_ssd", classes=3)
    box = {"boxes": torch.tensor([[4.0, 8, 40, 40]]), "labels": torch.tensor([2])}
    losses = model.train()([torch.rand(3, 32, 48)], [box])
    assert set(losses) == {"bbox_regression", "classification"}
    sum(losses.values()).backward()
    assert [n for n, p in model.named_parameters() if p.grad is None] == []
    (found,) = model.eval()([torch.rand(3, 32, 48)])
    assert 0 < len(found["boxes"]) <= 20
    assert set(found["labels"].tolist()) <= {1, 2}
    assert float(found["boxes"].detach()[:, 0::2].max()) <= 48
    assert float(found["boxes"].detach()[:, 1::2].max()) <= 32
