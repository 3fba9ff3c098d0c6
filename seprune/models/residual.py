"""SE-ResNet (CIFAR and ImageNet), SE-PreActResNet, SE-ResNeXt, SENet-154, SKNet-50.

Stages are `layer1`, `layer2`, ...; stage n of the SE paper, which counts the stem, is `layer(n-1)`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

from torch import Tensor, nn

from seprune.errors import UsageError
from seprune.models.blocks import (
    EVERYTHING,
    SE,
    Conv,
    Network,
    SelectiveKernel,
    SqueezeExcitation,
    chain,
    initialize,
)

# width, stride -> the convolutions of one block
Steps = Callable[[int, int], tuple[Conv, ...]]


def basic(width: int, stride: int) -> tuple[Conv, ...]:
    return Conv(width, 3, stride), Conv(width, 3)


def bottleneck(width: int, stride: int) -> tuple[Conv, ...]:
    # stride in the first 1x1, as in the original release (3.86 G for ResNet-50; 4.09 G in the 3x3)
    return Conv(width, 1, stride), Conv(width, 3), Conv(4 * width)


def resnext(width: int, stride: int) -> tuple[Conv, ...]:
    return Conv(2 * width), Conv(2 * width, 3, stride, 32), Conv(4 * width)


def senet(width: int, stride: int) -> tuple[Conv, ...]:
    # 64x4d with the first 1x1 halved (SE paper, appendix)
    return Conv(2 * width), Conv(4 * width, 3, stride, 64), Conv(4 * width)


@dataclass(frozen=True)
class ResNetLayout:
    """The structure of a residual network; the SE settings come on top."""

    block: Steps
    depths: tuple[int, ...]
    stem: str = "imagenet"
    widths: tuple[int, ...] = (64, 128, 256, 512)
    preact: bool = False
    selective: bool = False
    projection: int = 1  # kernel of the strided shortcuts
    dropout: float = 0.0


STEMS: dict[str, tuple[Conv, ...]] = {
    "cifar": (Conv(16, 3),),
    "imagenet": (Conv(64, 7, 2),),
    "deep": (Conv(64, 3, 2), Conv(64, 3), Conv(128, 3)),
}


class Block(nn.Module):
    """Convolutions beside a shortcut, with an SE block in one of five places.

    Modules: `conv1 bn1 conv2 bn2 ... se downsample`, the last two only where they are needed.
    """

    def __init__(
        self, inputs: int, steps: tuple[Conv, ...], se: SE | None, layout: ResNetLayout
    ) -> None:
        super().__init__()
        self.length, self.preact = len(steps), layout.preact
        self.inner = next(i for i, step in enumerate(steps, 1) if step.kernel == 3)
        self._add_steps(inputs, steps, se, layout)
        self.relu = nn.ReLU()
        outputs, stride = steps[-1].outputs, max(step.stride for step in steps)
        self.placement = se.placement if se and not layout.selective else "none"
        if se and self.placement != "none":
            places = {"pre": inputs, "inner": steps[self.inner - 1].outputs}
            self.se = SqueezeExcitation(places.get(self.placement, outputs), se)
        self.downsample: nn.Module = nn.Identity()
        if stride != 1 or inputs != outputs:
            conv = Conv(outputs, layout.projection if stride != 1 else 1, stride)
            # a pre-activated input is normalised already
            self.downsample = nn.Sequential(conv.module(inputs))
            if not self.preact:
                self.downsample.append(nn.BatchNorm2d(outputs))

    def _add_steps(
        self, inputs: int, steps: tuple[Conv, ...], se: SE | None, layout: ResNetLayout
    ) -> None:
        for i, step in enumerate(steps, 1):
            norm: nn.Module = nn.BatchNorm2d(inputs if self.preact else step.outputs)
            conv: nn.Module = step.module(inputs)
            if se and layout.selective and i == self.inner:
                # its branches end in BN and ReLU of their own
                conv, norm = SelectiveKernel(inputs, step, se), nn.Identity()
            self.add_module(f"conv{i}", conv)
            self.add_module(f"bn{i}", norm)
            inputs = step.outputs

    def forward(self, x: Tensor) -> Tensor:
        active = self.relu(self.get_submodule("bn1")(x)) if self.preact else x
        # He et al., arXiv:1603.05027: only a projected shortcut starts after the activation
        projected = not isinstance(self.downsample, nn.Identity)
        shortcut = self.downsample(active) if projected else x
        out = self._convolve(self.se(active) if self.placement == "pre" else active)
        if self.placement == "standard":
            out = self.se(out)
        elif self.placement == "identity":
            shortcut = self.se(shortcut)
        out = out + shortcut
        if not self.preact:
            out = self.relu(out)
        return self.se(out) if self.placement == "post" else out

    def _convolve(self, x: Tensor) -> Tensor:
        for i in range(1, self.length + 1):
            x = self.get_submodule(f"conv{i}")(x)
            last = i == self.length
            if not (last and self.preact):
                x = self.get_submodule(f"bn{i + self.preact}")(x)
            if not last:
                x = self.relu(x)
            if i == self.inner and self.placement == "inner":
                x = self.se(x)
        return x


class ResNet(nn.Module):
    """A stem, stages of blocks, the mean over space, a classifier.

    Modules: `conv1 bn1 layer1 layer2 ... fc`; pre-activated networks have `bn1` after the stages.
    """

    def __init__(self, layout: ResNetLayout, channels: int, classes: int, se: SE) -> None:
        super().__init__()
        names = tuple(f"layer{i}" for i in range(1, len(layout.depths) + 1))
        _check_stages(se, names)
        self.preact = layout.preact
        *first, last = STEMS[layout.stem]
        stem, inputs = chain(channels, first)
        self.conv1: nn.Module = stem.append(last.module(inputs)) if first else last.module(channels)
        stem_width = inputs = last.outputs
        ends = layout.block(layout.widths[-1], 1)[-1].outputs
        self.bn1 = nn.BatchNorm2d(ends if self.preact else stem_width)
        self.relu = nn.ReLU()
        self.maxpool = nn.Identity() if layout.stem == "cifar" else nn.MaxPool2d(3, 2, 1)
        for name, depth, width in zip(names, layout.depths, layout.widths):
            carried = se if se.stages is None or name in se.stages else None
            stage = nn.Sequential()
            for i in range(depth):
                steps = layout.block(width, 2 if i == 0 and name != "layer1" else 1)
                stage.append(Block(inputs, steps, carried, layout))
                inputs = steps[-1].outputs
            self.add_module(name, stage)
        self.stages = names
        self.dropout = nn.Dropout(layout.dropout)
        self.fc = nn.Linear(inputs, classes)
        initialize(self)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv1(x)
        if not self.preact:
            x = self.relu(self.bn1(x))
        x = self.maxpool(x)
        for name in self.stages:
            x = self.get_submodule(name)(x)
        if self.preact:
            x = self.relu(self.bn1(x))
        return self.fc(self.dropout(x.mean((2, 3))))  # type: ignore[no-any-return]


def _check_stages(se: SE, names: tuple[str, ...]) -> None:
    for stage in se.stages or ():
        if stage not in names:
            raise UsageError(
                f"stages: no stage {stage!r} in this network",
                why=f"its stages are {', '.join(names)}",
                fix=f"stages=[{names[-1]}]",
            )


def _cifar(block: Steps, blocks_per_stage: int, *, preact: bool = False) -> Network:
    layout = ResNetLayout(block, (blocks_per_stage,) * 3, "cifar", (16, 32, 64), preact)
    return Network(partial(ResNet, layout), (3, 32, 32), 10, SE(bias=False), EVERYTHING)


def _imagenet(layout: ResNetLayout) -> Network:
    return Network(partial(ResNet, layout), accepts=EVERYTHING)


NETWORKS = {
    # for the digits of this package; at r = 16 its first gate would have one hidden unit
    "se_resnet8": replace(_cifar(basic, 1), input=(1, 8, 8), se=SE(reduction=4, bias=False)),
    "se_resnet20": _cifar(basic, 3),
    "se_resnet32": _cifar(basic, 5),
    "se_resnet56": _cifar(basic, 9),
    "se_resnet110": _cifar(basic, 18),
    "se_resnet164": _cifar(bottleneck, 18),
    "se_preactresnet20": _cifar(basic, 3, preact=True),
    "se_preactresnet56": _cifar(basic, 9, preact=True),
    "se_preactresnet110": _cifar(basic, 18, preact=True),
    "se_preactresnet164": _cifar(bottleneck, 18, preact=True),
    "se_resnet18": _imagenet(ResNetLayout(basic, (2, 2, 2, 2))),
    "se_resnet34": _imagenet(ResNetLayout(basic, (3, 4, 6, 3))),
    "se_resnet50": _imagenet(ResNetLayout(bottleneck, (3, 4, 6, 3))),
    "se_resnet101": _imagenet(ResNetLayout(bottleneck, (3, 4, 23, 3))),
    "se_resnet152": _imagenet(ResNetLayout(bottleneck, (3, 8, 36, 3))),
    "se_resnext50": _imagenet(ResNetLayout(resnext, (3, 4, 6, 3))),
    "se_resnext101": _imagenet(ResNetLayout(resnext, (3, 4, 23, 3))),
    "senet154": _imagenet(ResNetLayout(senet, (3, 8, 36, 3), "deep", projection=3, dropout=0.2)),
    "sknet50": Network(
        partial(ResNet, ResNetLayout(resnext, (3, 4, 6, 3), selective=True)),
        accepts=("reduction", "squeeze"),
    ),
}
