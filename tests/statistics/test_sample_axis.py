"""Samples that lie along another dimension than the first one, and gates of units of channels."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from masked_reads import masked_reads
from torch import nn

from seprune.pruning.analyse import analyse
from seprune.statistics.collect import collect_statistics

IMAGES = 4  # a divisor of the 16 positions: rows of positions could be taken for those of images


class Layout(nn.Module):
    """Two linear layers on a map (H, W, B, C)."""

    def __init__(self) -> None:
        super().__init__()
        self.wide, self.narrow = nn.Linear(8, 12), nn.Linear(12, 8)

    def forward(self, x):
        return self.narrow(F.gelu(self.wide(x.permute(2, 3, 0, 1)))).permute(2, 3, 0, 1)


class Tokens(nn.Module):
    """Positions first, as recurrent layers and attention take them by default."""

    def __init__(self) -> None:
        super().__init__()
        self.wide, self.narrow = nn.Linear(8, 12), nn.Linear(12, 8)

    def forward(self, x):
        tokens = x.flatten(2).permute(2, 0, 1)
        tokens = tokens + self.narrow(F.gelu(self.wide(tokens)))
        return tokens.permute(1, 2, 0).view_as(x)


class DynamicRelu(nn.Module):
    """The larger of two linear functions, whose coefficients the image chooses."""

    def __init__(self) -> None:
        super().__init__()
        self.squeeze, self.choose = nn.Linear(8, 4), nn.Linear(4, 32)

    def forward(self, x):
        theta = 2 * self.choose(self.squeeze(x.mean((2, 3))).relu()).sigmoid() - 1
        slopes, shifts = theta.view(-1, 8, 4).split(2, 2)
        both = x.permute(2, 3, 0, 1).unsqueeze(-1) * slopes + shifts
        return both.max(-1)[0].permute(2, 3, 0, 1)


class Shuffled(nn.Module):
    """A gate on a map that was shuffled by hand: one number for four channels of the layer."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.one, self.two = nn.Conv2d(8, 32, 1), nn.Linear(8, 4), nn.Linear(4, 8)

    def forward(self, x):
        y = self.up(x)
        b, c, h, w = y.shape
        y = y.view(b, c // 4, 2, 2, h, w).permute(0, 1, 4, 2, 5, 3).reshape(b, c // 4, 2 * h, -1)
        return y * self.two(self.one(y.mean((2, 3))).relu()).sigmoid()[..., None, None]


class Net(nn.Module):
    def __init__(self, part: nn.Module) -> None:
        super().__init__()
        self.stem, self.part = nn.Conv2d(3, 8, 1), part
        self.next, self.head = nn.Conv2d(8, 6, 1), nn.Linear(6, 5)

    def forward(self, x):
        y = self.next(self.part(self.stem(x).relu())).relu()
        return self.head(y.mean((2, 3)))


@pytest.mark.parametrize(
    "part",
    [
        Layout,
        Tokens,
        DynamicRelu,
        Shuffled,
    ],
    ids=["positions first", "tokens first", "dynamic relu", "shuffled"],
)
def test_effects_are_those_of_masks_image_by_image(part):
    torch.manual_seed(0)
    model = Net(part()).eval().double()
    x, labels = torch.rand(IMAGES, 3, 4, 4, dtype=torch.float64), torch.arange(IMAGES)
    structure = analyse(model, x[:2])
    found = collect_statistics(model, [(x, labels)], structure=structure, gradients="labels").groups

    def loss(logits, image):
        return F.cross_entropy(logits, labels[image : image + 1])

    for name, u in masked_reads(model, structure, x, loss).items():
        torch.testing.assert_close(found[name]["effect_square"], u.square().mean(0))
