"""Networks without a residual sum over wide blocks: SE-VGG-16, SE-MobileNet, SE-ShuffleNet.

The SE block follows the non-linearity of a VGG convolution or of a MobileNet pointwise convolution,
and the last BN of a ShuffleNet unit's branch.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from seprune.models.blocks import (
    SE,
    Conv,
    Network,
    Pool,
    Pooled,
    SqueezeExcitation,
    chain,
    initialize,
)

VGG16 = (64, 64, "M", 128, 128, "M", 256, 256, 256, "M", 512, 512, 512, "M", 512, 512, 512, "M")
# outputs, stride (Howard et al., arXiv:1704.04861, table 1)
MOBILENET = (
    (64, 1), (128, 2), (128, 1), (256, 2), (256, 1), (512, 2),
    *((512, 1),) * 5, (1024, 2), (1024, 1),
)  # fmt: skip
# outputs, units (Zhang et al., arXiv:1707.01083, table 1, g = 3)
SHUFFLENET = ((240, 4), (480, 8), (960, 4))
STEM, CONV_GROUPS = 24, 3


class VGG(nn.Module):
    """`features` (B, C, H, W), 7x7 at 224, then three linear layers."""

    def __init__(self, channels: int, classes: int, se: SE) -> None:
        super().__init__()
        self.features = nn.Sequential()
        for width in VGG16:
            if isinstance(width, str):
                self.features.append(nn.MaxPool2d(2))
                continue
            # the bias of the original is kept beside the BN that the SE paper adds (sec. 6.1)
            convolution, _ = chain(channels, [Conv(width, 3, bias=True)])
            self.features.extend([*convolution, SqueezeExcitation(width, se)])
            channels = width
        self.pool = nn.AdaptiveAvgPool2d(7)
        self.classifier = nn.Sequential(
            *(nn.Linear(channels * 49, 4096), nn.ReLU(), nn.Dropout()),
            *(nn.Linear(4096, 4096), nn.ReLU(), nn.Dropout()),
            nn.Linear(4096, classes),
        )
        initialize(self)

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.pool(self.features(x)).flatten(1))  # type: ignore[no-any-return]


def mobilenet(channels: int, classes: int, se: SE) -> nn.Module:
    features, inputs = chain(channels, [Conv(32, 3, 2)])
    for outputs, stride in MOBILENET:
        unit, _ = chain(inputs, [Conv(inputs, 3, stride, conv_groups=inputs), Conv(outputs)])
        unit.add_module("se", SqueezeExcitation(outputs, se))
        features.append(unit)
        inputs = outputs
    return Pooled(features, inputs, classes)


class ShuffleUnit(nn.Module):
    """Grouped 1x1, shuffle, depthwise 3x3, grouped 1x1, SE; added, or at stride 2 concatenated."""

    def __init__(self, inputs: int, outputs: int, se: SE, *, stride: int) -> None:
        super().__init__()
        self.stride = stride
        width, hidden = outputs - inputs if stride == 2 else outputs, outputs // 4
        # the stem has too few channels to be grouped (paper, sec. 3.2)
        first = Conv(hidden, conv_groups=1 if inputs == STEM else CONV_GROUPS)
        self.reduce, _ = chain(inputs, [first])
        self.depthwise = Conv(hidden, 3, stride, hidden).module(hidden)
        self.bn = nn.BatchNorm2d(hidden)
        self.expand = Conv(width, conv_groups=CONV_GROUPS).module(hidden)
        self.bn_expand = nn.BatchNorm2d(width)
        self.se = SqueezeExcitation(width, se)
        self.pool = nn.AvgPool2d(3, 2, 1)
        self.relu = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        out = shuffle(self.reduce(x), self.expand.groups)
        out = self.se(self.bn_expand(self.expand(self.bn(self.depthwise(out)))))
        out = torch.cat([self.pool(x), out], 1) if self.stride == 2 else x + out
        return self.relu(out)  # type: ignore[no-any-return]


def shuffle(x: Tensor, conv_groups: int) -> Tensor:
    """Channel i of group g becomes channel g of group i."""
    batch, channels, height, width = x.shape
    x = x.reshape(batch, conv_groups, channels // conv_groups, height, width)
    return x.transpose(1, 2).reshape(batch, channels, height, width)


def shufflenet(channels: int, classes: int, se: SE) -> nn.Module:
    features, inputs = chain(channels, [Conv(STEM, 3, 2), Pool("max", 2)])
    for outputs, units in SHUFFLENET:
        for i in range(units):
            features.append(ShuffleUnit(inputs, outputs, se, stride=1 if i else 2))
            inputs = outputs
    return Pooled(features, inputs, classes)


NETWORKS = {
    "se_vgg16": Network(VGG),
    "se_mobilenet": Network(mobilenet),
    "se_shufflenet": Network(shufflenet),
}
