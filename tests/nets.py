"""Tiny networks, one for each way of writing a channel gate."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class SE(nn.Module):
    """Squeeze-and-excitation as most people write it."""

    def __init__(self, channels: int, hidden: int = 4) -> None:
        super().__init__()
        self.fc = nn.Sequential(
            nn.Linear(channels, hidden), nn.ReLU(), nn.Linear(hidden, channels), nn.Sigmoid()
        )

    def forward(self, x: Tensor) -> Tensor:
        b, c, _, _ = x.shape
        return x * self.fc(x.mean((2, 3))).view(b, c, 1, 1)


class Block(nn.Module):
    """A residual block with its gate before the sum."""

    def __init__(self, width: int, se: nn.Module) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.se = se

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(self.conv1(x)))
        return F.relu(x + self.se(self.bn2(self.conv2(y))))


class Residual(nn.Module):
    """Two residual SE blocks: both gates score one dependency group."""

    def __init__(self, width: int = 8, classes: int = 3) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, width, 3, padding=1)
        self.blocks = nn.Sequential(Block(width, SE(width)), Block(width, SE(width)))
        self.fc = nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.blocks(self.stem(x)).mean((2, 3)))


class Inner(nn.Module):
    """An inverted residual with its gate on the inner channels (MobileNetV3)."""

    def __init__(self, width: int = 6, inner: int = 12, classes: int = 3) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, width, 3, padding=1)
        self.expand = nn.Conv2d(width, inner, 1)
        self.depthwise = nn.Conv2d(inner, inner, 3, padding=1, groups=inner)
        self.se = SE(inner)
        self.project = nn.Conv2d(inner, width, 1)
        self.fc = nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        y = self.se(F.relu(self.depthwise(F.relu(self.expand(x)))))
        return self.fc((x + self.project(y)).mean((2, 3)))


class Gated(nn.Module):
    """conv -> gate(x) -> conv: the frame for one spelling of a gate."""

    def __init__(self, gate: nn.Module, width: int = 8) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, width, 3, padding=1)
        self.gate = gate
        self.head = nn.Conv2d(width, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.gate(F.relu(self.conv(x)))).mean((2, 3))


def images(count: int = 2, size: int = 16, seed: int = 0) -> Tensor:
    """Random images (count, 3, size, size) in [0, 1]."""
    return torch.rand(count, 3, size, size, generator=torch.Generator().manual_seed(seed))


# -- one network for each way in which channels depend on each other -------------------------------


class Head(nn.Module):
    """Mean over positions, then a classifier."""

    def __init__(self, width: int, classes: int = 3) -> None:
        super().__init__()
        self.fc = nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x.mean((2, 3)))


class Chain(nn.Module):
    """conv `a` -> `middle` -> conv `b` -> head: the frame for one kind of dependency."""

    def __init__(self, middle: nn.Module, width: int = 8, after: int | None = None) -> None:
        super().__init__()
        self.a = nn.Conv2d(3, width, 3, padding=1)
        self.middle = middle
        self.b = nn.Conv2d(after or width, 5, 1)
        self.head = Head(5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.relu(self.b(self.middle(self.a(x)))))


class Concat(nn.Module):
    """Two branches side by side: `c` reads both."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 6, 3, padding=1), nn.Conv2d(3, 4, 1)
        self.norm, self.c, self.head = nn.BatchNorm2d(10), nn.Conv2d(10, 5, 1), Head(5)

    def forward(self, x: Tensor) -> Tensor:
        both = torch.cat([self.a(x), self.b(x)], 1)
        return self.head(F.relu(self.c(F.relu(self.norm(both)))))


class Halves(nn.Module):
    """A gated linear unit: the halves of a tensor are multiplied, so they go together."""

    def forward(self, x: Tensor) -> Tensor:
        one, two = x.chunk(2, 1)
        return one * two.tanh()


class SplitSizes(nn.Module):
    """Split at sizes that the module holds."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes = [3, 5]
        self.one, self.two = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(5, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        one, two = x.split(self.sizes, 1)
        return torch.cat([self.one(one), self.two(two)], 1)


class SliceHeld(nn.Module):
    """A slice up to a number that the module holds: the rest goes on untouched (FasterNet)."""

    def __init__(self) -> None:
        super().__init__()
        self.part = 3
        self.conv = nn.Conv2d(3, 3, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.conv(x[:, : self.part]), x[:, self.part :]], 1)


class SliceFixed(nn.Module):
    """Every other channel."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([x[:, ::2].relu(), x[:, 1::2]], 1)


class Shuffle(nn.Module):
    """ShuffleNet's channel shuffle in two groups."""

    def forward(self, x: Tensor) -> Tensor:
        b, c, h, w = x.shape
        return x.view(b, 2, c // 2, h, w).transpose(1, 2).reshape(b, c, h, w)


class ShuffledGroups(nn.Module):
    """A shuffle between two grouped convolutions whose conv groups have an odd width."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Conv2d(8, 10, 1, groups=2), nn.Conv2d(10, 8, 1, groups=2)
        self.mix = Shuffle()

    def forward(self, x: Tensor) -> Tensor:
        return self.two(self.mix(self.one(x)).relu())


class Twice(nn.Module):
    """One layer used twice: what goes in is what comes out."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.relu(self.conv(x)))


class TiedWeights(nn.Module):
    """Two layers with one weight."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.one, self.two = nn.Conv2d(width, width, 1), nn.Conv2d(width, width, 1)
        self.two.weight = self.one.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.two(F.relu(self.one(x)))


class LayerScale(nn.Module):
    """x + gamma * conv(x), gamma a bare parameter."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width, width, 1)
        self.gamma = nn.Parameter(torch.linspace(0.5, 1.5, width).view(width, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.gamma * self.conv(x)


class ZeroPadded(nn.Module):
    """The parameter-free shortcut of the CIFAR ResNets (option A): stride and zero channels."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width, 2 * width, 3, stride=2, padding=1)
        self.width = width

    def forward(self, x: Tensor) -> Tensor:
        half = self.width // 2
        return self.conv(x) + F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, half, half))


class FlattenHead(nn.Module):
    """conv -> flatten -> linear: each channel is read at every position."""

    def __init__(self, size: int = 4) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 6, 3, padding=1)
        self.pool = nn.AdaptiveAvgPool2d(size)
        self.fc = nn.Linear(6 * size * size, 8)
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.relu(self.fc(self.pool(F.relu(self.conv(x))).flatten(1))))


class Bare(nn.Module):
    """A convolution and a linear layer as functions of bare parameters."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.kernel = nn.Parameter(torch.randn(6, width, 1, 1) / 3)
        self.matrix = nn.Parameter(torch.randn(width, 6) / 3)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(F.conv2d(x, self.kernel))
        return F.linear(y.permute(0, 2, 3, 1), self.matrix).permute(0, 3, 1, 2)


class Sorted(nn.Module):
    """An operator that no rule knows."""

    def forward(self, x: Tensor) -> Tensor:
        return x.sort(1).values


class Unbound(nn.Module):
    """Channels taken apart one by one."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack(list(x.unbind(1))[::-1], 1)


class HardView(nn.Module):
    """A view whose sizes stand in the code."""

    def forward(self, x: Tensor) -> Tensor:
        return x.view(-1, 8, x.shape[2] * x.shape[3]).relu().view(x.shape)


class Upsample(nn.Module):
    """A transposed convolution."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.up = nn.ConvTranspose2d(width, 6, 2, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.up(x))


def dependent(kind: str, seed: int = 0) -> nn.Module:
    """The network of that name in `DEPENDENT`, with random weights that `seed` decides."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        net = DEPENDENT[kind]()
        for module in net.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                nn.init.uniform_(module.weight, 0.5, 1.5)
                nn.init.uniform_(module.bias, -0.2, 0.2)
                module.running_mean.uniform_(-0.2, 0.2)
                module.running_var.uniform_(0.8, 1.5)
    return net.eval()


DEPENDENT: dict[str, Callable[[], nn.Module]] = {
    "residual": Residual,
    "inner": Inner,
    "concat": Concat,
    "halves": lambda: Chain(Halves(), after=4),
    "split sizes": lambda: Chain(SplitSizes()),
    "slice held": lambda: Chain(SliceHeld()),
    "slice fixed": lambda: Chain(SliceFixed()),
    "shuffle": lambda: Chain(Shuffle()),
    "whole conv groups": lambda: Chain(nn.Conv2d(8, 8, 3, padding=1, groups=4)),
    "within conv groups": lambda: Chain(nn.Conv2d(8, 12, 3, padding=1, groups=2), after=12),
    "shuffled conv groups": lambda: Chain(ShuffledGroups()),
    "depthwise": lambda: Chain(nn.Conv2d(8, 8, 3, padding=1, groups=8)),
    "multiplier": lambda: Chain(nn.Conv2d(8, 16, 3, padding=1, groups=8), after=16),
    "twice": lambda: Chain(Twice()),
    "tied": lambda: Chain(TiedWeights()),
    "layer scale": lambda: Chain(LayerScale()),
    "zero padded": lambda: Chain(ZeroPadded(), after=16),
    "flatten": FlattenHead,
    "bare": lambda: Chain(Bare()),
    "prelu": lambda: Chain(nn.PReLU(8)),
    "batch norm": lambda: Chain(nn.BatchNorm2d(8)),
    "group norm": lambda: Chain(nn.GroupNorm(2, 8)),
    "instance norm": lambda: Chain(nn.InstanceNorm2d(8, affine=True)),
    "plain instance norm": lambda: Chain(nn.InstanceNorm2d(8)),
    "transposed": lambda: Chain(Upsample(), after=6),
    "transposed depthwise": lambda: Chain(nn.ConvTranspose2d(8, 8, 2, stride=2, groups=8)),
    "transposed conv groups": lambda: Chain(nn.ConvTranspose2d(8, 8, 2, stride=2, groups=4)),
    "sorted": lambda: Chain(Sorted()),
    "unbound": lambda: Chain(Unbound()),
    "hard view": lambda: Chain(HardView()),
}


def detector(classes=3):
    """A small Faster R-CNN on a backbone with a gate."""
    from torchvision.models.detection import FasterRCNN
    from torchvision.models.detection.anchor_utils import AnchorGenerator
    from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead

    body = nn.Sequential(
        nn.Conv2d(3, 12, 3, stride=2, padding=1), nn.BatchNorm2d(12), nn.ReLU(), SE(12),
        nn.Conv2d(12, 16, 3, stride=2, padding=1), nn.BatchNorm2d(16), nn.ReLU(),
    )  # fmt: skip
    body.out_channels = 16
    return FasterRCNN(
        body, min_size=64, max_size=64, rpn_post_nms_top_n_test=40, rpn_post_nms_top_n_train=40,
        rpn_anchor_generator=AnchorGenerator(((16, 32),), ((1.0,),)),
        box_head=TwoMLPHead(16 * 49, 24), box_predictor=FastRCNNPredictor(24, classes),
    ).eval()  # fmt: skip
