"""Networks of libraries that seprune knows nothing about, each built as FILE.py:FUNCTION.

Installed for the benchmark, not by the project:

    pip install six
    pip install --no-deps segmentation-models-pytorch monai pytorchcv transformers geffnet \
        pretrainedmodels efficientnet-pytorch speechbrain hyperpyyaml torchaudio munch tokenizers \
        regex sentencepiece joblib scipy
    pip install --no-deps ultralytics ultralytics-thop opencv-python-headless psutil matplotlib \
        contourpy cycler fonttools kiwisolver pyparsing    # AGPL-3.0
"""

from __future__ import annotations

import importlib
import random
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn


@dataclass(frozen=True)
class Foreign:
    """What builds a network, and samples that it may take, the first of them that it does."""

    function: str
    args: dict[str, Any] = field(default_factory=dict)
    shapes: tuple[tuple[int, ...], ...] = ((3, 96, 96), (3, 128, 128), (3, 224, 224))


def smp(decoder: str, encoder: str, **args: Any) -> nn.Module:
    """A segmenter of segmentation_models_pytorch."""
    make = getattr(importlib.import_module("segmentation_models_pytorch"), decoder)
    model: nn.Module = make(encoder, encoder_weights=None, **args)
    return model


def monai(network: str, **args: Any) -> nn.Module:
    """A network of monai, in one, two or three dimensions."""
    model: nn.Module = getattr(importlib.import_module("monai.networks.nets"), network)(**args)
    return model


def pytorchcv(network: str) -> nn.Module:
    """A classifier of pytorchcv, for images of any size: it pools 7 x 7 at the end."""
    model: nn.Module = importlib.import_module("pytorchcv.model_provider").get_model(network)
    if isinstance(getattr(model.features, "final_pool", None), nn.AvgPool2d):
        model.features.final_pool = nn.AdaptiveAvgPool2d(1)  # type: ignore[union-attr]
    return model


def pretrainedmodels(network: str) -> nn.Module:
    """A classifier of pretrainedmodels."""
    zoo = importlib.import_module("pretrainedmodels")
    model: nn.Module = getattr(zoo, network)(num_classes=1000, pretrained=None)
    model.avg_pool = nn.AdaptiveAvgPool2d(1)  # it pools 7 x 7
    return model


def geffnet(network: str) -> nn.Module:
    """A classifier of geffnet."""
    model: nn.Module = importlib.import_module("geffnet").create_model(network, pretrained=False)
    return model


def efficientnet_pytorch(network: str) -> nn.Module:
    """A classifier of efficientnet_pytorch."""
    zoo = importlib.import_module("efficientnet_pytorch")
    model: nn.Module = zoo.EfficientNet.from_name(network)
    return model


def transformers(kind: str, **args: Any) -> nn.Module:
    """An image classifier of transformers, as its configuration describes it."""
    zoo = importlib.import_module("transformers")
    config = getattr(zoo, f"{kind}Config")(**args)
    model: nn.Module = getattr(zoo, f"{kind}ForImageClassification")(config)
    return model


def speechbrain(module: str, network: str, **args: Any) -> nn.Module:
    """A network of speechbrain over (time, features)."""
    random.seed(0)
    found = importlib.import_module(f"speechbrain.lobes.models.{module}")
    model: nn.Module = getattr(found, network)(**args)
    return model


class SqueezeExcitation(nn.Sequential):
    """A squeeze-and-excitation block (arXiv:1709.01507) to put behind a layer."""

    def __init__(self, channels: int) -> None:
        hidden = max(channels // 16, 4)
        super().__init__(
            nn.AdaptiveAvgPool2d(1), nn.Conv2d(channels, hidden, 1), nn.ReLU(),
            nn.Conv2d(hidden, channels, 1), nn.Sigmoid(),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        gate: Tensor = super().forward(x)
        return x * gate


def ultralytics(network: str) -> nn.Module:
    """A YOLO of ultralytics with a squeeze-and-excitation block in each of its C2f blocks."""
    tasks = importlib.import_module("ultralytics.nn.tasks")
    modules = importlib.import_module("ultralytics.nn.modules")
    model: nn.Module = tasks.DetectionModel(f"{network}.yaml", ch=3, nc=4, verbose=False)
    for block in [m for m in model.modules() if isinstance(m, modules.C2f)]:
        squeezed: Any = block.cv2
        channels = squeezed.conv.out_channels
        block.cv2 = nn.Sequential(squeezed, SqueezeExcitation(channels))
    return model


_SMP = [
    ("Unet", "efficientnet-b0", {}),
    ("Unet", "timm-efficientnet-b0", {"decoder_attention_type": "scse"}),
    ("Unet", "tu-mobilenetv3_small_100", {"decoder_attention_type": "scse"}),
    ("UnetPlusPlus", "tu-mobilenetv3_small_100", {}),
    ("MAnet", "tu-mobilenetv3_small_100", {}),
    ("Linknet", "tu-mobilenetv3_small_100", {}),
    ("FPN", "tu-regnety_002", {}),
    ("PSPNet", "tu-seresnet18", {}),
    ("PAN", "tu-mobilenetv3_large_100", {}),
    ("DeepLabV3", "tu-regnety_002", {}),
    ("DeepLabV3Plus", "tu-mobilenetv3_small_100", {}),
    ("UPerNet", "tu-mobilenetv3_small_100", {}),
    ("Linknet", "se_resnext50_32x4d", {}),
    ("Unet", "se_resnet50", {}),
]
_MONAI: list[tuple[str, dict[str, Any], tuple[int, ...]]] = [
    ("EfficientNetBN", {"model_name": "efficientnet-b0", "pretrained": False, "spatial_dims": 1,
                        "in_channels": 2, "num_classes": 3}, (2, 256)),
    ("EfficientNetBN", {"model_name": "efficientnet-b0", "pretrained": False, "spatial_dims": 2,
                        "in_channels": 3, "num_classes": 3}, (3, 96, 96)),
    ("EfficientNetBN", {"model_name": "efficientnet-b0", "pretrained": False, "spatial_dims": 3,
                        "in_channels": 1, "num_classes": 3}, (1, 32, 32, 32)),
    ("FlexibleUNet", {"in_channels": 3, "out_channels": 2, "backbone": "efficientnet-b0",
                      "spatial_dims": 2}, (3, 96, 96)),
    ("UNet", {"spatial_dims": 3, "in_channels": 1, "out_channels": 2, "channels": [16, 32, 64],
              "strides": [2, 2], "num_res_units": 2, "norm": "BATCH"}, (1, 32, 32, 32)),
    ("DynUNet", {"spatial_dims": 2, "in_channels": 1, "out_channels": 2,
                 "kernel_size": [3, 3, 3], "strides": [1, 2, 2],
                 "upsample_kernel_size": [2, 2], "res_block": True}, (1, 64, 64)),
    ("SEResNet50", {"spatial_dims": 2, "in_channels": 3, "num_classes": 5}, (3, 96, 96)),
    ("SEResNet50", {"spatial_dims": 3, "in_channels": 1, "num_classes": 3}, (1, 32, 32, 32)),
    ("SEResNext50", {"spatial_dims": 2, "in_channels": 3, "num_classes": 5}, (3, 96, 96)),
    ("SEResNext50", {"spatial_dims": 3, "in_channels": 1, "num_classes": 3}, (1, 32, 32, 32)),
]  # fmt: skip
_CV = """
    seresnet10 sepreresnet10 mobilenetv3_small_w1 mnasnet_small regnety002 diaresnet10 ghostnet
    cbam_resnet18 bam_resnet18 resnestabc14 efficientnet_b0 mobilenetv3_large_w1 fbnet_cb
    proxylessnas_cpu mixnet_s isqrtcovresnet18 seresnetbc26b senet16 seresnext50_32x4d sknet50
    hrnet_w18_small_v1"""
_GEFFNET = "efficientnet_b0 mobilenetv3_large_100 mixnet_s semnasnet_100 tf_efficientnet_b0"
_TRANSFORMERS: list[tuple[str, str, dict[str, Any]]] = [
    ("EfficientNet", "b0", {"width_coefficient": 1.0, "depth_coefficient": 1.0,
                            "image_size": 96, "hidden_dim": 1280,
                            "initializer_range": 0.3}),  # with its own, 0.02, signals die
    ("RegNet", "y-small", {"hidden_sizes": [32, 64, 128, 256], "depths": [1, 2, 3, 1],
                           "groups_width": 16, "layer_type": "y"}),
    ("MobileNetV2", "1.0", {"image_size": 96}),
    ("ResNet", "small", {"embedding_size": 32, "hidden_sizes": [64, 128, 256, 512],
                         "depths": [1, 1, 2, 1]}),
]  # fmt: skip
_SPEECHBRAIN: list[tuple[str, str, dict[str, Any], tuple[int, ...]]] = [
    ("ECAPA_TDNN", "ECAPA_TDNN", {"input_size": 40, "channels": [64, 64, 64, 64, 192],
                                  "attention_channels": 32, "lin_neurons": 48}, (100, 40)),
    ("ResNet", "ResNet", {"input_size": 40, "channels": [16, 16, 32, 32],
                          "block_sizes": [1, 2, 2, 1], "lin_neurons": 48}, (100, 40)),
    ("ContextNet", "ContextNet", {"input_shape": [8, 100, 40], "out_channels": 64,
                                  "conv_channels": [32, 32, 64, 64], "num_blocks": 4,
                                  "strides": [1, 2, 1, 2], "num_layers": 2,
                                  "residuals": [False, False, True, False], "inner_dim": 8},
     (100, 40)),
    ("Xvector", "Xvector", {"in_channels": 40, "tdnn_channels": [64, 64, 64, 64, 192],
                            "lin_neurons": 48}, (100, 40)),
]  # fmt: skip


def _listed() -> dict[str, Foreign]:
    found: dict[str, Foreign] = {}
    for decoder, encoder, args in _SMP:
        name = f"smp/{decoder}.{encoder}" + ".scse" * bool(args)
        found[name] = Foreign("smp", {"decoder": decoder, "encoder": encoder, **args})
    for name, args, shape in _MONAI:
        found[f"monai/{name}.{args['spatial_dims']}d"] = Foreign(
            "monai", {"network": name, **args}, (shape,)
        )
    for name in _CV.split():
        found[f"pytorchcv/{name}"] = Foreign("pytorchcv", {"network": name})
    for name in ("se_resnet50", "se_resnext50_32x4d"):
        found[f"pretrainedmodels/{name}"] = Foreign("pretrainedmodels", {"network": name})
    for name in _GEFFNET.split():
        found[f"geffnet/{name}"] = Foreign("geffnet", {"network": name})
    found["efficientnet_pytorch/b0"] = Foreign(
        "efficientnet_pytorch", {"network": "efficientnet-b0"}
    )
    for kind, size, args in _TRANSFORMERS:
        found[f"transformers/{kind}.{size}"] = Foreign("transformers", {"kind": kind, **args})
    for name in ("yolov8n", "yolo11n"):
        found[f"ultralytics/{name}"] = Foreign("ultralytics", {"network": name}, ((3, 128, 128),))
    for module, name, args, shape in _SPEECHBRAIN:
        found[f"speechbrain/{name}"] = Foreign(
            "speechbrain", {"module": module, "network": name, **args}, (shape,)
        )
    return found


FOREIGN = _listed()
"""Networks by the name that their row has."""
