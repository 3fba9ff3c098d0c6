"""A segmenter and a detector on a small SE-ResNet, for images of 64 pixels: they learn in minutes.

Both stand on the maps of three stages behind a strided stem, each with the coarser ones added.
"""

from __future__ import annotations

from collections import OrderedDict
from functools import partial

from torch import Tensor, nn
from torch.nn import functional as F

from seprune.models.blocks import SE, Network
from seprune.models.residual import ResNet, ResNetLayout, basic

SIDE = 64
WIDTH = 32  # of the merged maps
STAGES = (16, 32, 64)  # channels of the maps of 1/2, 1/4 and 1/8 of the image's sides
SCALES = (0.26, 0.36, 0.48, 0.6)  # of the anchors' sides, as parts of the image's


class Pyramid(nn.Module):
    """Image -> maps (B, 32, h, w), the finest first (Lin et al., arXiv:1612.03144).

    Args:
        finest: the first stage that has a map.
    """

    def __init__(self, channels: int, se: SE, finest: int = 0) -> None:
        super().__init__()
        net = ResNet(ResNetLayout(basic, (1, 1, 1), "cifar", STAGES), channels, 10, se)
        net.conv1.stride = (2, 2)  # type: ignore[assignment]
        self.stem = nn.Sequential(net.conv1, net.bn1, nn.ReLU())
        self.stages = nn.ModuleList(net.get_submodule(name) for name in net.stages)
        self.finest = finest
        self.lateral = nn.ModuleList(
            nn.Sequential(nn.Conv2d(width, WIDTH, 1, bias=False), nn.BatchNorm2d(WIDTH))
            for width in STAGES[finest:]
        )

    def forward(self, x: Tensor) -> list[Tensor]:
        x, maps = self.stem(x), []
        for number, stage in enumerate(self.stages):
            x = stage(x)
            if number >= self.finest:
                maps.append(self.lateral[number - self.finest](x))
        for number in range(len(maps) - 1, 0, -1):
            coarse = F.interpolate(maps[number], scale_factor=2.0)
            maps[number - 1] = maps[number - 1] + coarse
        return maps


class Segmenter(nn.Module):
    """A class for each pixel from the finest map: {"out": (B, classes, H, W)}."""

    def __init__(self, channels: int, classes: int, se: SE) -> None:
        super().__init__()
        self.body = Pyramid(channels, se)
        self.head = nn.Sequential(
            nn.Conv2d(WIDTH, WIDTH, 3, padding=1, bias=False),
            nn.BatchNorm2d(WIDTH),
            nn.ReLU(),
            nn.Conv2d(WIDTH, classes, 1),
        )

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        logits = self.head(self.body(x)[0].relu())
        return {"out": F.interpolate(logits, x.shape[2:], mode="bilinear", align_corners=False)}


class Maps(nn.Module):
    """What an SSD looks at: maps of 1/4, 1/8 and 1/16 of the image's sides."""

    def __init__(self, channels: int, se: SE) -> None:
        super().__init__()
        self.body = Pyramid(channels, se, finest=1)
        self.extra = nn.Sequential(
            nn.Conv2d(WIDTH, WIDTH, 3, 2, 1, bias=False), nn.BatchNorm2d(WIDTH), nn.ReLU()
        )

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        middle, coarse = self.body(x)
        maps = (middle.relu(), coarse.relu(), self.extra(coarse.relu()))
        return OrderedDict((str(number), own) for number, own in enumerate(maps))


def detector(channels: int, classes: int, se: SE) -> nn.Module:
    """An SSD of torchvision with the heads of SSDLite; it scales its images to 64 x 64."""
    from torchvision.models.detection.anchor_utils import DefaultBoxGenerator
    from torchvision.models.detection.ssd import SSD
    from torchvision.models.detection.ssdlite import SSDLiteHead

    anchors = DefaultBoxGenerator([[], [], []], scales=list(SCALES), clip=False)
    norm = partial(nn.BatchNorm2d, eps=1e-3, momentum=0.03)
    head = SSDLiteHead([WIDTH] * 3, anchors.num_anchors_per_location(), classes, norm)
    made: nn.Module = SSD(
        Maps(channels, se), anchors, (SIDE, SIDE), classes, head=head, score_thresh=0.02,
        topk_candidates=60, detections_per_img=20, image_mean=[0.5] * channels,
        image_std=[0.25] * channels,
    )  # fmt: skip
    return made


_SMALL = Network(Segmenter, input=(3, SIDE, SIDE), classes=5, se=SE(reduction=4, bias=False))
NETWORKS = {
    "se_resnet8_fpn": _SMALL,
    "se_resnet8_ssd": Network(detector, _SMALL.input, _SMALL.classes, _SMALL.se),
}
