"""Weights and biases that a forward reads by name: all that lies along a channel goes with it."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from seprune import analyse, prune
from seprune.pruning.plan import plan_of

OUTS = 12


def parameter(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.randn(*shape) / 4)


class Bare(nn.Module):
    """A layer written out between two convolutions; `weight` lies along its outputs at `dim`."""

    def __init__(self, layer: Callable[..., Tensor], shape: tuple[int, ...]) -> None:
        super().__init__()
        self.first, self.last = nn.Conv2d(3, 16, 3), nn.Conv2d(OUTS, 4, 1)
        self.weight, self.bias, self.more = parameter(*shape), parameter(OUTS), parameter(OUTS)
        self.other = nn.Conv2d(16, OUTS, 1)
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return self.last(F.relu(self.layer(self, self.first(x))))


def rows(make: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    return make(x.mean((2, 3)))[:, :, None, None]


LAYERS: dict[str, tuple[Callable[..., Tensor], tuple[int, ...]]] = {
    "conv2d": (lambda m, x: F.conv2d(x, m.weight, m.bias), (OUTS, 16, 1, 1)),
    "conv1d": (
        lambda m, x: F.conv1d(x.flatten(2), m.weight, m.bias)[..., None], (OUTS, 16, 1),
    ),
    "transposed": (lambda m, x: F.conv_transpose2d(x, m.weight, m.bias), (16, OUTS, 2, 2)),
    "linear": (lambda m, x: rows(lambda v: F.linear(v, m.weight, m.bias), x), (OUTS, 16)),
    "linear of positions": (
        lambda m, x: F.linear(x.permute(0, 2, 3, 1), m.weight, m.bias).permute(0, 3, 1, 2),
        (OUTS, 16),
    ),
    "addmm": (lambda m, x: rows(lambda v: torch.addmm(m.bias, v, m.weight), x), (16, OUTS)),
    "sum of biases": (lambda m, x: F.conv2d(x, m.weight, m.bias + m.more), (OUTS, 16, 1, 1)),
    "weight of a layer": (lambda m, x: F.conv2d(x, m.other.weight, m.bias), (OUTS, 16, 1, 1)),
    "bias of a layer": (
        lambda m, x: F.conv2d(x, m.weight, m.other.bias) + m.other(x), (OUTS, 16, 1, 1),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", LAYERS)
def test_weight_and_bias_that_a_function_is_given_are_cut_together(name: str) -> None:
    """Against the parent in which all that makes the removed channels is zero."""
    torch.manual_seed(0)
    model = Bare(*LAYERS[name]).double().eval()
    x = torch.rand(2, 3, 6, 6, dtype=torch.float64)
    structure = analyse(model, x)
    assert [g.name for g in structure.groups if not g.prunable] == ["last"]
    group = next(g for g in structure.groups if "last" in {m.layer for m in g.members if
                                                           m.side == "in"})  # fmt: skip
    assert group.units == OUTS
    plan = plan_of(structure.groups, {group.name: range(0, OUTS, 2)}, {})
    twin = copy.deepcopy(model)
    with torch.no_grad():
        twin.last.weight[:, 1::2] = 0
    small = prune(model, plan).eval()
    torch.testing.assert_close(small(x), twin(x), rtol=1e-12, atol=1e-12)
    kept = {g.name: len(g.keep) for g in plan.groups}
    assert sum(p.numel() for p in small.parameters()) == structure.params_at(kept)
