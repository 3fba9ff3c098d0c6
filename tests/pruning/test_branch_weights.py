"""Weights of branches (SK) that read their width from another map, or lie behind the channels."""

from __future__ import annotations

import copy

import pytest
import torch
from cutting import random_plan
from support_mask import masked
from torch import Tensor, nn

from seprune.pruning.analyse import analyse
from seprune.pruning.prune import prune


class Branches(nn.Module):
    """Two convolutions weighed by a softmax over them; `spelling` says how its weights lie."""

    def __init__(self, spelling: str) -> None:
        super().__init__()
        self.spelling = spelling
        self.stem = nn.Conv2d(3, 16, 3, padding=1)
        self.one, self.two = nn.Conv2d(16, 16, 1), nn.Conv2d(16, 16, 3, padding=1)
        self.squeeze, self.weigh = nn.Linear(16, 8), nn.Linear(8, 32)
        self.head = nn.Linear(16, 3)

    def weights(self, z: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        batch, channels = x.shape[:2]
        if self.spelling == "branches first":  # the number of channels is that of another map
            w = z.view(batch, 2, channels).softmax(1)
            return w[:, 0], w[:, 1]
        if self.spelling == "branches last":
            w = z.view(batch, -1, 2).softmax(-1)
            return w[:, :, 0], w[..., 1]
        w, v = z.view(batch, channels, 2).sigmoid().unbind(-1)
        return w, v

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).relu()
        one, two = self.one(x), self.two(x)
        z = self.weigh(self.squeeze((one + two).mean((2, 3))).relu())
        w, v = self.weights(z, x)
        made = one * w[..., None, None] + two * v[..., None, None]
        return self.head(made.relu().mean((2, 3)))


@pytest.mark.parametrize("spelling", ["branches first", "branches last", "branches unbound"])
def test_every_width_beside_the_weights_of_branches_is_cut_exactly(spelling: str) -> None:
    torch.manual_seed(0)
    model, x = Branches(spelling).eval().double(), torch.rand(3, 3, 6, 6, dtype=torch.float64)
    structure = analyse(model, x)
    found = {g.name: g.units for g in structure.groups if g.prunable}
    assert found == {"stem": 16, "one": 16, "squeeze": 8}
    assert not [g.caveat for g in structure.groups if g.caveat]
    plan = random_plan(structure, share=0.5)
    kept = {g.name: len(g.keep) for g in plan.groups}
    assert kept["stem"] < 16
    assert kept["one"] < 16
    small = prune(model, plan).eval()
    with torch.no_grad(), masked(copy.deepcopy(model), plan) as parent:
        torch.testing.assert_close(small(x), parent(x), rtol=1e-10, atol=1e-12)
