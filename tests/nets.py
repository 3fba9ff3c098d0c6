"""Tiny networks, one for each way of writing a channel gate."""

from __future__ import annotations

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
