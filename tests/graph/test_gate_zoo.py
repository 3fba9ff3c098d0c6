"""The gates of the networks of both zoos; expected numbers are sums of blocks, not our output."""

from __future__ import annotations

import pytest
from nets import images
from torchvision.models import get_model

from seprune.graph.gates import Gate, find_gates


def named(name: str, size: int = 64) -> tuple[Gate, ...]:
    """The gates of a network of a zoo, with random weights, on two small images."""
    zoo, _, model = name.partition("/")
    if zoo == "timm":
        timm = pytest.importorskip("timm", reason="timm is not installed")
        return find_gates(timm.create_model(model, pretrained=False), images(2, size))
    extra = {"weights_backbone": None} if "_mobilenet_v3" in model else {}
    return find_gates(get_model(model, weights=None, **extra), images(2, size))


# stages with gates, blocks in each
COUNTS = {
    "torchvision/mobilenet_v3_small": 1 + 8,  # Howard et al. 2019, table 2
    "torchvision/mobilenet_v3_large": 3 + 2 + 3,  # table 1: 40, 112 and 160 channels
    "torchvision/efficientnet_b0": 1 + 2 + 2 + 3 + 3 + 4 + 1,
    "torchvision/efficientnet_v2_s": 6 + 9 + 15,  # MBConv stages; the fused ones have none
    "torchvision/regnet_y_400mf": 1 + 3 + 6 + 6,
    "torchvision/lraspp_mobilenet_v3_large": 8
    + 1,  # its head gates low by a sigmoid of pooled high
    "torchvision/deeplabv3_mobilenet_v3_large": 8,
    "timm/seresnet18": 2 + 2 + 2 + 2,
    "timm/seresnet50": 3 + 4 + 6 + 3,
    "timm/seresnext26t_32x4d": 2 + 2 + 2 + 2,
    "timm/legacy_seresnet18": 2 + 2 + 2 + 2,
    "timm/legacy_seresnext26_32x4d": 2 + 2 + 2 + 2,
    "timm/seresnet33ts": 2 + 3 + 3 + 2,
    "timm/seresnext26ts": 2 + 2 + 2 + 2,
    "timm/mobilenetv3_small_100": 1 + 8,
    "timm/mobilenetv3_large_100": 3 + 2 + 3,
    "timm/efficientnet_b0": 1 + 2 + 2 + 3 + 3 + 4 + 1,
    "timm/tf_efficientnetv2_b0": 3 + 5 + 8,
    "timm/gc_efficientnetv2_rw_t": 6 + 9 + 14,  # global context, multiplied
    "timm/semnasnet_100": 3 + 2 + 3,
    "timm/hardcorenas_a": 1 + 1 + 2 + 2 + 2,
    "timm/tinynet_a": 1 + 2 + 2 + 4 + 4 + 5 + 1,
    "timm/lcnet_050": 2,
    "timm/fbnetv3_b": 5 + 6 + 7,
    "timm/rexnet_100": 2 + 3 + 3 + 5,
    "timm/mixnet_s": 4 + 3 + 3 + 3,
    "timm/ghostnet_100": 2 + 2 + 3,
    "timm/ghostnetv2_100": 2 + 2 + 3,  # its attention between positions is none
    "timm/regnety_002": 1 + 1 + 4 + 7,
    "timm/regnetz_b16": 2 + 6 + 12 + 2,
    "timm/resnest14d": 4 * 1,
    "timm/resnest26d": 4 * 2,
    "timm/skresnet18": 2 * (2 + 2 + 2 + 2),  # a gate for each of two branches
    "timm/ecaresnet26t": 2 + 2 + 2 + 2,
    "timm/eca_resnet33ts": 2 + 3 + 3 + 2,
    "timm/eca_nfnet_l0": 1 + 2 + 6 + 3,
    "timm/nf_seresnet50": 3 + 4 + 6 + 3,
    "timm/nf_ecaresnet26": 2 + 2 + 2 + 2,
    "timm/nf_regnet_b0": 1 + 3 + 6 + 6,
    "timm/ese_vovnet19b_dw": 4 * 1,  # the last block of each stage
    "timm/eca_vovnet39b": 4 * 1,
    "timm/tresnet_m": 3 + 4 + 11,  # none in the last stage
    "timm/cs3sedarknet_l": 3 + 6 + 9 + 3,
    "timm/repvit_m0_9": 1 + 1 + 7 + 1,  # every other block
    "timm/repghostnet_100": 2 + 2 + 3,
}
LARGE = {
    ("torchvision/ssdlite320_mobilenet_v3_large", 320): 8,
    ("torchvision/fasterrcnn_mobilenet_v3_large_320_fpn", 320): 8,
    ("timm/coatnet_nano_rw_224", 224): 3 + 4,  # the convolutional stages
    ("timm/coatnet_0_rw_224", 224): 2 + 3,
    ("timm/maxvit_nano_rw_256", 256): 1 + 2 + 3 + 1,
    ("timm/maxvit_tiny_tf_224", 224): 2 + 2 + 5 + 2,
    ("timm/sebotnet33ts_256", 256): 2 + 2 + 2,  # the blocks without attention
    ("timm/legacy_senet154", 64): 3 + 8 + 36 + 3,
    ("timm/seresnextaa101d_32x8d", 64): 3 + 4 + 23 + 3,
    ("timm/dm_nfnet_f0", 64): 1 + 2 + 6 + 3,
    ("timm/repvgg_d2se", 64): 1 + 8 + 14 + 24 + 1,
    ("timm/mobileone_s4", 64): 2 * (5 + 1),  # after the depthwise and the pointwise layer
    ("timm/skresnext50_32x4d", 64): 2 * (3 + 4 + 6 + 3),
    ("timm/resnest50d_1s4x24d", 64): 3 + 4 + 6 + 3,
    ("timm/cs3se_edgenet_x", 64): 3 + 7 + 11 + 3,
}
NONE = [
    "torchvision/resnet18",
    "torchvision/mnasnet0_5",
    "timm/convnextv2_atto",
    "timm/gcresnet33ts",  # global context, added
    "timm/cspresnet50",
    "timm/hgnetv2_b0",
    "timm/edgenext_xx_small",
]


# blocks that a quicker network above has too
TWINS = (
    "torchvision/efficientnet_v2_s", "timm/efficientnet_b0", "timm/gc_efficientnetv2_rw_t",
    "timm/seresnext26t_32x4d", "timm/seresnext26ts", "timm/legacy_seresnext26_32x4d",
    "timm/mobilenetv3_large_100", "timm/semnasnet_100", "timm/tinynet_a", "timm/regnetz_b16",
    "timm/seresnet50", "timm/ghostnet_100",
    "timm/resnest26d", "timm/eca_resnet33ts", "timm/eca_vovnet39b", "timm/nf_seresnet50",
    "timm/nf_regnet_b0", "timm/ghostnetv2_100",
)  # fmt: skip


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=pytest.mark.slow) if n in TWINS else n for n in COUNTS]
)
def test_number_of_gates(name: str) -> None:
    gates = named(name)
    assert len(gates) == COUNTS[name]
    assert all(g.runs and g.tap and g.features and g.scales for g in gates)
    assert {g.tap.kind for g in gates} == {"output"}  # no Python work for every operator


@pytest.mark.slow
@pytest.mark.parametrize(("name", "size"), LARGE)
def test_number_of_gates_of_large_networks(name: str, size: int) -> None:
    gates = named(name, size)
    assert len(gates) == LARGE[name, size]
    assert all(g.runs and g.tap for g in gates)


@pytest.mark.parametrize("name", NONE)
def test_no_gates(name: str) -> None:
    assert named(name) == ()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "cait_xxs24_224", "xcit_nano_12_p16_224"])
def test_no_gates_in_transformers(name: str) -> None:
    assert named(f"timm/{name}", 224) == ()


@pytest.mark.parametrize("name", ["torchvision/mobilenet_v3_small", "timm/mobilenetv3_small_100"])
def test_late_maps_of_one_position_change_nothing(name: str) -> None:
    small, large = named(name, 32), named(name, 128)
    assert [(g.name, g.squeeze, g.activation, g.placement, g.scales, g.tap) for g in small] == [
        (g.name, g.squeeze, g.activation, g.placement, g.scales, g.tap) for g in large
    ]


def test_the_description_of_a_gate() -> None:
    first = named("timm/seresnet50")[0]
    assert (first.name, first.channels, first.squeeze) == ("layer1.0.se", 256, "mean")
    assert (first.activation, first.placement) == ("sigmoid", "residual")
    assert first.scales == ("layer1.0.conv3",)
    assert first.excitation == ("layer1.0.se.fc1", "layer1.0.se.fc2")
    inner = named("torchvision/mobilenet_v3_small")[0]
    assert (inner.name, inner.channels) == ("features.1.block.1", 16)
    assert (inner.activation, inner.placement) == ("hardsigmoid", "inner")
    assert inner.scales == ("features.1.block.0.0",)


def test_branches_of_a_selective_kernel() -> None:
    gates = named("timm/skresnet18")[:2]
    assert [(g.name, g.channels, g.activation) for g in gates] == [
        ("layer1.0.conv1.attn[0]", 64, "softmax"),
        ("layer1.0.conv1.attn[1]", 64, "softmax"),
    ]
    assert [g.scales for g in gates] == [
        ("layer1.0.conv1.paths.0.conv",),
        ("layer1.0.conv1.paths.1.conv",),
    ]
    assert gates[0].tap == gates[1].tap


def test_placement_by_block() -> None:
    gates = named("timm/tresnet_m")
    assert [g.placement for g in gates] == ["residual"] * (3 + 4) + ["inner"] * 11
