"""The rivals' formulas: cases in which what each of them promises is exact."""

from __future__ import annotations

import itertools

import pytest
import rival_methods
import torch
from rival_methods import Quadratic
from torch import Tensor, nn

import seprune
from seprune.pruning.plan import plan_of


class Chain(nn.Module):
    """conv -> ReLU -> conv -> norm -> pool -> linear, eight channels in the middle."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3, padding=1)
        self.second = nn.Conv2d(8, 6, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(6)
        self.head = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.norm(self.second(torch.relu(self.first(x)))))
        return self.head(y.mean((2, 3)))


@pytest.fixture
def net() -> Chain:
    torch.manual_seed(0)
    return Chain().eval()


@pytest.fixture
def batches() -> list[tuple[Tensor, Tensor]]:
    random = torch.Generator().manual_seed(1)
    return [(torch.randn(16, 3, 8, 8, generator=random), torch.zeros(16)) for _ in range(3)]


def agree(one: nn.Module, other: nn.Module, images: Tensor, **tolerance: float) -> None:
    with torch.no_grad():
        torch.testing.assert_close(one(images), other(images), **tolerance)


def test_grails_map_restores_channels_that_are_copies(net, batches):
    """The last four channels are multiples of the first four: nothing is lost without them."""
    with torch.no_grad():
        net.first.weight[4:] = 2 * net.first.weight[:4]
        net.first.bias[4:] = 2 * net.first.bias[:4]
    structure = seprune.analyse(net, batches[0][0][:2])
    plan = plan_of(structure.groups, {"first": range(4)}, {})
    made = rival_methods.mapped(net, structure, plan, batches)
    assert made.second.in_channels == 4
    agree(made, net, batches[0][0], rtol=0, atol=5e-3)  # the ridge
    plain = seprune.prune(net, plan)
    with torch.no_grad():
        assert (plain(batches[0][0]) - net(batches[0][0])).abs().max() > 0.1


def test_vbp_removes_constant_channels_without_loss(net, batches):
    """Constant channels have no variance, and their mean says all but at the border."""
    net.second.padding = (0, 0)
    with torch.no_grad():
        net.norm.bias.fill_(9)  # above the ReLU, so that every channel of the other chain varies
        net.first.weight[[1, 3, 5, 6]] = 0
        net.first.bias[[1, 3, 5, 6]] = torch.tensor([0.5, 1.0, 2.0, 0.1])
    structure = seprune.analyse(net, batches[0][0][:2])
    full = structure.full_widths()
    half = structure.macs_at(full | {"first": 4}) / structure.costs()["macs"]
    made = rival_methods.variance_pruned(net, structure, batches, half + 1e-6)
    assert made.head.in_features == 6, "channels that vary went first"
    agree(made, net, batches[0][0], rtol=1e-4, atol=1e-5)


def quadratic(channels: int = 6, size: int = 2) -> Quadratic:
    random = torch.Generator().manual_seed(3)
    x = torch.randn(200, channels * size, generator=random).double()
    y = torch.randn(200, 3, generator=random).double() + x[:, :3]
    gram = x.T @ x / 200 + 1e-3 * torch.eye(channels * size)
    return Quadratic(gram, x.T @ y / 200, size)


def test_osscar_weights_are_the_least_squares_on_what_is_kept():
    form, kept = quadratic(), torch.tensor([0, 3, 4])
    places = form.places(kept)
    expected = torch.linalg.lstsq(form.gram[places][:, places], form.cross[places]).solution.T
    torch.testing.assert_close(form.weights(kept), expected)
    objective = (form.weights(kept).T * form.cross[places]).sum()
    assert form.gain([0, 3, 4], torch.arange(6)) == pytest.approx(float(objective))


def test_osscar_finds_the_best_units_of_a_small_layer():
    form, index = quadratic(), torch.arange(6)
    for width in range(1, 6):
        best = max(itertools.combinations(range(6), width), key=lambda u: form.gain(list(u), index))
        assert form.gain(form.select(index, width), index) == pytest.approx(
            form.gain(list(best), index)
        )


def test_osscar_cuts_to_the_budget_and_loses_nothing_that_others_say(net, batches):
    with torch.no_grad():
        net.first.weight[4:] = 2 * net.first.weight[:4]
        net.first.bias[4:] = 2 * net.first.bias[:4]
    structure = seprune.analyse(net, batches[0][0][:2])
    assert rival_methods.chains(net, structure) == {"first": "second", "second": "head"}
    widths = rival_methods.width_scale(structure, ["first"], 0.75)
    assert structure.macs_at(structure.full_widths() | widths) <= 0.75 * structure.costs()["macs"]
    made = rival_methods.osscar(net, structure, batches, 0.75)
    assert made.second.in_channels < 8
