"""Channels that a reshape takes apart: the part that its readers leave alone carries them on."""

from __future__ import annotations

import copy

import pytest
import torch
from cutting import random_plan
from support_mask import masked
from torch import nn

from seprune.pruning.analyse import analyse
from seprune.pruning.prune import prune


def maxout(y):
    b, c, h, w = y.shape
    return y.view(b, c // 2, 2, h, w).max(dim=2)[0]


def mean_of_parts(y):
    b, _, h, w = y.shape
    return y.reshape(b, 2, -1, h, w).mean(1)


def pixel_shuffle(y):
    b, c, h, w = y.shape
    apart = y.view(b, c // 4, 2, 2, h, w).permute(0, 1, 4, 2, 5, 3).contiguous()
    return apart.view(b, c // 4, h * 2, w * 2)


def norm_of_parts(y):
    """Every fourth of the channels is normed by itself."""
    pooled = y.mean((2, 3)).view(len(y), 4, -1)
    scale = pooled / (pooled.square().mean(-1, keepdim=True) + 1e-5).sqrt()
    return y * scale.reshape(len(y), -1)[..., None, None].sigmoid()


class Net(nn.Module):
    def __init__(self, reshape, channels: int) -> None:
        super().__init__()
        self.reshape = reshape
        self.wide = nn.Conv2d(3, 32, 3, padding=1)
        self.next, self.head = nn.Conv2d(channels, 8, 1), nn.Linear(8, 3)

    def forward(self, x):
        return self.head(self.next(self.reshape(self.wide(x))).relu().mean((2, 3)))


@pytest.mark.parametrize(
    ("reshape", "channels", "units", "parts"),
    [
        (maxout, 16, 16, lambda u: [2 * u, 2 * u + 1]),
        (mean_of_parts, 16, 16, lambda u: [u, u + 16]),
        (pixel_shuffle, 8, 8, lambda u: [4 * u, 4 * u + 1, 4 * u + 2, 4 * u + 3]),
        (norm_of_parts, 32, 4, lambda u: list(range(8 * u, 8 * u + 8))),
    ],
)
def test_units_are_what_goes_together_and_the_cut_is_exact(reshape, channels, units, parts):
    torch.manual_seed(0)
    model, x = Net(reshape, channels).eval().double(), torch.rand(2, 3, 6, 6, dtype=torch.float64)
    structure = analyse(model, x)
    group = next(g for g in structure.groups if g.members[0].layer == "wide")
    assert (group.units, group.prunable, group.caveat or "") == (units, True, "")
    rows = group.members[0].index.tolist()
    assert [sorted(row) for row in rows] == [parts(u) for u in range(units)]
    plan = random_plan(structure, share=0.5)
    small = prune(model, plan).eval()
    with torch.no_grad(), masked(copy.deepcopy(model), plan) as parent:
        torch.testing.assert_close(small(x), parent(x), rtol=1e-10, atol=1e-12)
