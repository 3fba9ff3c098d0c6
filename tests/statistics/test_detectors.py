"""Networks whose heads return tuples and lists: collected, scored, cut and run."""

from __future__ import annotations

from collections import OrderedDict

import pytest
import torch
from cutting import counted
from masked_reads import masked_reads
from nets import SE
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models import detection
from torchvision.ops import MultiScaleRoIAlign

import seprune
from seprune.statistics.batches import sample_keys
from seprune.statistics.gate_gradients import normal


class Backbone(nn.Module):
    """Two levels with a gate on each."""

    out_channels = 8

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.down = nn.Conv2d(3, 12, 3, 2, 1), nn.Conv2d(12, 16, 3, 2, 1)
        self.se1, self.se2 = SE(12), SE(16)
        self.lateral = nn.ModuleList([nn.Conv2d(12, 8, 1), nn.Conv2d(16, 8, 1)])

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        p = self.se1(self.stem(x).relu())
        q = self.se2(self.down(p).relu())
        fine, coarse = self.lateral[0](p), self.lateral[1](q)
        fine = fine + F.interpolate(coarse, size=fine.shape[-2:])
        return OrderedDict([("0", fine), ("1", coarse)])


def sizes() -> dict:
    anchors = detection.anchor_utils.AnchorGenerator(((8,), (16,)), ((0.5, 1.0),) * 2)
    return {"min_size": 32, "max_size": 32, "num_classes": 3}, anchors


def faster_rcnn() -> nn.Module:
    settings, anchors = sizes()
    pool = MultiScaleRoIAlign(["0", "1"], 3, 2)
    head = detection.faster_rcnn.TwoMLPHead(72, 16)
    predictor = detection.faster_rcnn.FastRCNNPredictor(16, settings.pop("num_classes"))
    return detection.FasterRCNN(
        Backbone(), rpn_anchor_generator=anchors, box_roi_pool=pool, box_head=head,
        box_predictor=predictor, rpn_post_nms_top_n_test=10, box_score_thresh=0.0, **settings,
    )  # fmt: skip


def mask_rcnn() -> nn.Module:
    settings, anchors = sizes()
    pool, masks = MultiScaleRoIAlign(["0", "1"], 3, 2), MultiScaleRoIAlign(["0", "1"], 4, 2)
    head = detection.faster_rcnn.TwoMLPHead(72, 16)
    predictor = detection.faster_rcnn.FastRCNNPredictor(16, 3)
    settings.pop("num_classes")
    return detection.MaskRCNN(
        Backbone(), rpn_anchor_generator=anchors, box_roi_pool=pool, box_head=head,
        box_predictor=predictor, rpn_post_nms_top_n_test=6, box_score_thresh=0.0,
        mask_roi_pool=masks, mask_head=detection.mask_rcnn.MaskRCNNHeads(8, (8, 8), 1),
        mask_predictor=detection.mask_rcnn.MaskRCNNPredictor(8, 8, 3), **settings,
    )  # fmt: skip


def retina_net() -> nn.Module:
    settings, anchors = sizes()
    return detection.RetinaNet(
        Backbone(), anchor_generator=anchors, topk_candidates=20, score_thresh=0.0,
        head=detection.retinanet.RetinaNetHead(8, 2, 3, norm_layer=nn.BatchNorm2d), **settings,
    )  # fmt: skip


def ssd() -> nn.Module:
    anchors = detection.anchor_utils.DefaultBoxGenerator([[2], [2]])
    head = detection.ssdlite.SSDLiteHead([8, 8], [4, 4], 3, nn.BatchNorm2d)
    return detection.ssd.SSD(
        Backbone(), anchors, (32, 32), 3, head=head, score_thresh=0.0, topk_candidates=20
    )


@pytest.mark.parametrize("build", [faster_rcnn, mask_rcnn, retina_net, ssd])
def test_a_detector_goes_through_every_stage(build):
    torch.manual_seed(0)
    model = build().eval()
    pictures = [torch.rand(3, 32, 32) for _ in range(4)]
    structure = seprune.analyse(model, (pictures[:2],))
    assert [g.name for g in structure.gates] == ["backbone.se1", "backbone.se2"]
    backbone = [g for g in structure.groups if g.layers[0] in ("backbone.stem", "backbone.down")]
    assert [g.prunable for g in backbone] == [True, True]
    assert not any("trial cut" in (g.reason or "") for g in structure.groups)
    options = seprune.CollectOptions(device="cpu", task=seprune.Detection())
    got = seprune.collect_statistics(
        model, [pictures[:2], pictures[2:]], structure=structure, options=options
    )
    free = [g.name for g in structure.groups if g.prunable]
    assert set(free) <= set(got.groups)
    assert all(float(got.groups[g.name]["effect_square"].sum()) > 0 for g in backbone)
    plan = seprune.make_plan(structure, seprune.score(structure, got), macs=0.7)
    small = seprune.prune(model, plan, (pictures[:2],))
    assert sum(p.numel() for p in small.parameters()) == plan.facts["params"][1]
    with torch.no_grad():
        assert set(small(pictures)[0]) == set(model(pictures)[0])


def _boxes(module: nn.Module, inputs: tuple, output: tuple) -> tuple:
    """As many proposals as the image says, from none to three."""
    pictures = inputs[0].tensors
    counts = ((pictures.flatten(1).mean(1) * 4).long() % 4).tolist()
    return [boxes[:n] for boxes, n in zip(output[0], counts)], output[1]


def test_layers_that_read_boxes_are_scored_whatever_number_of_boxes_an_image_has():
    torch.manual_seed(0)
    model = faster_rcnn().double().eval()
    model.transform.image_mean, model.transform.image_std = [0.0] * 3, [1.0] * 3
    model.rpn.register_forward_hook(_boxes)
    pictures = [torch.rand(3, 32, 32).double() * 0.01 + n / 4 + 0.1 for n in (1, 2, 0, 3)]
    structure = seprune.analyse(model, (pictures[:2],))  # three boxes of two images
    options = seprune.CollectOptions(device="cpu", task=seprune.Detection())
    got = seprune.collect_statistics(model, [pictures], structure=structure, options=options)
    for name, layer in (("fc6", "fc6"), ("fc7", "")):
        group, found = f"roi_heads.box_head.{name}", []
        module = model.get_submodule(f"roi_heads.box_head.{layer}".rstrip("."))
        for picture in pictures:
            mask = torch.ones(16, dtype=torch.float64, requires_grad=True)
            handle = module.register_forward_hook(lambda *call, m=mask: call[-1] * m)
            flat = seprune.Detection().flat_outputs(model, [picture])
            z = (flat * normal(sample_keys([picture], 1, 0), flat.shape[1])).sum()
            slope = torch.autograd.grad(z, mask, allow_unused=True)[0]
            found.append(torch.zeros_like(mask) if slope is None else slope)
            handle.remove()
        assert float(found[2].abs().max()) == 0 < min(float(found[n].abs().max()) for n in (0, 3))
        want = torch.stack(found).square().mean(0)
        torch.testing.assert_close(got.groups[group]["effect_square"], want, rtol=1e-9, atol=0)


class Pyramid(nn.Module):
    """A head shared by two levels, with a norm for each, that returns lists (EfficientDet)."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone, self.conv = Backbone(), nn.Conv2d(8, 8, 3, padding=1, bias=False)
        self.norms = nn.ModuleList([nn.BatchNorm2d(8), nn.BatchNorm2d(8)])
        self.classes, self.boxes = Lists(8, 4), Lists(8, 8)

    def forward(self, x: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        levels = [n(self.conv(p)).relu() for n, p in zip(self.norms, self.backbone(x).values())]
        return self.classes(levels), self.boxes(levels)


class Lists(nn.Module):
    def __init__(self, width: int, out: int) -> None:
        super().__init__()
        self.conv, self.out = nn.Conv2d(width, 8, 3, padding=1), nn.Conv2d(8, out, 1)

    def forward(self, levels: list[Tensor]) -> list[Tensor]:
        return [self.out(self.conv(level).relu()) for level in levels]


def test_groups_of_heads_that_return_lists_are_scored_by_masks_on_their_reads():
    torch.manual_seed(0)
    model, x = Pyramid().double().eval(), torch.rand(4, 3, 16, 16, dtype=torch.float64)
    structure = seprune.analyse(model, x[:2])
    got = seprune.collect_statistics(model, [x[:2], x[2:]], structure=structure)

    def z(output: tuple[list[Tensor], list[Tensor]], i: int) -> Tensor:
        flat = torch.cat([t.flatten() for levels in output for t in levels])
        return (flat * normal(sample_keys([x[i : i + 1]], 1, 0), len(flat))[0]).sum()

    want = masked_reads(model, structure, x, z)
    assert {"backbone.stem", "backbone.down", "conv", "classes.conv", "boxes.conv"} <= set(want)
    for name, u in want.items():
        mean_square = u.detach().square().mean(0)
        torch.testing.assert_close(
            got.groups[name]["effect_square"], mean_square, rtol=1e-9, atol=0
        )
    plan = seprune.make_plan(structure, seprune.score(structure, got), macs=0.5)
    small = seprune.prune(model, plan, x[:2])
    assert counted(small, x) == (plan.facts["macs"][1], plan.facts["params"][1])
