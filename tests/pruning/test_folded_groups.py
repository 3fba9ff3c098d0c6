"""EMA attention: groups of channels folded into the batch, weighed by a softmax over channels."""

from __future__ import annotations

import copy

import pytest
import torch
from support_mask import masked
from torch import Tensor, nn

from seprune.pruning.analyse import analyse
from seprune.pruning.plan import plan_of
from seprune.pruning.prune import prune

WIDTH = 24


class Folded(nn.Module):
    def __init__(self, parts: int) -> None:
        super().__init__()
        self.parts, width = parts, WIDTH // parts
        self.stem = nn.Conv2d(3, WIDTH, 3, padding=1)
        self.norm, self.conv = nn.GroupNorm(width, width), nn.Conv2d(width, width, 3, padding=1)
        self.softmax, self.head = nn.Softmax(-1), nn.Conv2d(WIDTH, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        b, c, h, w = x.shape
        folded = x.reshape(b * self.parts, -1, h, w)
        one, two = self.norm(folded), self.conv(folded)
        weights = self.softmax(one.mean((2, 3))).unsqueeze(1)  # (b * parts, 1, c / parts)
        where = (weights @ two.flatten(2)).reshape(-1, 1, h, w).sigmoid()
        return self.head((folded * where).reshape(b, c, h, w)).mean((2, 3))


@pytest.mark.parametrize("parts", [2, 4])
def test_all_that_the_masked_parent_differs_by_is_the_softmax_that_the_caveat_names(parts):
    torch.manual_seed(0)
    model, x = Folded(parts).eval().double(), torch.rand(3, 3, 6, 6, dtype=torch.float64)
    structure = analyse(model, x)
    group = next(g for g in structure.groups if g.name == "stem")
    assert group.units == WIDTH // parts
    assert "softmax in softmax looks across channels" in (group.caveat or "")
    keep = list(range(0, group.units, 2))
    gone = torch.tensor(sorted(set(range(group.units)) - set(keep)))
    plan = plan_of(structure.groups, {"stem": keep}, {})
    small = prune(model, plan).eval()
    with torch.no_grad(), masked(copy.deepcopy(model), plan) as parent:
        assert float((small(x) - parent(x)).abs().max()) > 1e-6
        parent.softmax.register_forward_pre_hook(
            lambda _module, inputs: (inputs[0].index_fill(-1, gone, -torch.inf),)
        )
        torch.testing.assert_close(small(x), parent(x), rtol=1e-10, atol=1e-12)
