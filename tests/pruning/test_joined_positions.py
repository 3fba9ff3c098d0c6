"""Maps joined along their positions, and maps that a decoder makes of a vector again."""

from __future__ import annotations

import copy

import pytest
import torch
from cutting import random_plan
from support_mask import masked
from torch import nn

from seprune.pruning.analyse import analyse
from seprune.pruning.prune import prune


class Excite(nn.Module):
    """Squeeze over `dims` and gate dimension `at`."""

    def __init__(self, channels: int, dims: tuple[int, ...], at: int) -> None:
        super().__init__()
        self.dims, self.at = dims, at
        self.one, self.two = nn.Linear(channels, 4), nn.Linear(4, channels)

    def forward(self, x):
        gate = self.two(self.one(x.mean(self.dims)).relu()).sigmoid()
        return x * (gate.unsqueeze(1) if self.at == 2 else gate[..., None, None])


class Tokens(nn.Module):
    """A learned token before those of the image; the gate scales all of them."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 4, 4)
        self.token = nn.Parameter(torch.randn(1, 1, 16))
        self.wide = nn.Linear(16, 24)
        self.se, self.head = Excite(24, (1,), 2), nn.Linear(24, 3)

    def forward(self, x):
        tokens = self.stem(x).flatten(2).transpose(1, 2)
        tokens = torch.cat((self.token.expand(len(x), -1, -1), tokens), dim=1)
        return self.head(self.se(self.wide(tokens).relu())[:, 0])


class TwoStems(nn.Module):
    """Two layers' maps one below the other: what reads them reads both."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.dim = dim
        self.left, self.right = nn.Conv2d(3, 12, 3, padding=1), nn.Conv2d(3, 12, 1)
        self.se, self.next = Excite(12, (2, 3), 1), nn.Conv2d(12, 8, 1)
        self.head = nn.Linear(8, 3)

    def forward(self, x):
        both = torch.cat([self.left(x).relu(), self.right(x).relu()], self.dim)
        answers = self.head(self.next(self.se(both)).relu().mean((2, 3)))
        return sum(answers.chunk(2)) if self.dim == 0 else answers


class Decoder(nn.Module):
    """A vector is unfolded into a map, which has gates like any other."""

    def __init__(self, unfold: str) -> None:
        super().__init__()
        self.unfold = unfold
        self.down, self.code = nn.Conv2d(3, 8, 4, 4), nn.Linear(8 * 4, 6)
        self.up = nn.Linear(6, 16 * 4)
        self.grow = nn.ConvTranspose2d(16 if unfold == "view" else 6, 12, 2, 2)
        self.se, self.out = Excite(12, (2, 3), 1), nn.Conv2d(12, 3, 1)

    def forward(self, x):
        code = self.code(self.down(x).relu().flatten(1))
        if self.unfold == "view":
            small = self.up(code).relu().view(-1, 16, 2, 2)
        else:
            small = code[:, :, None, None]
        return self.out(self.se(self.grow(small).relu()))


@pytest.mark.parametrize(
    ("network", "gated", "units"),
    [
        (Tokens, 24, {"stem": 16, "wide": 24}),
        (lambda: TwoStems(0), 12, {"left": 12, "next": 8}),
        (lambda: TwoStems(2), 12, {"left": 12, "next": 8}),
        (lambda: Decoder("view"), 12, {"down": 8, "up": 16, "grow": 12}),
        (lambda: Decoder("transposed"), 12, {"down": 8, "grow": 12}),
    ],
    ids=["token", "batch", "rows", "view", "transposed"],
)
def test_the_gate_is_found_and_the_cut_network_is_its_masked_parent(network, gated, units):
    torch.manual_seed(0)
    model, x = network().eval().double(), torch.rand(2, 3, 8, 8, dtype=torch.float64)
    structure = analyse(model, x)
    assert [gate.channels for gate in structure.gates] == [gated]
    found = {g.members[0].layer: g.units for g in structure.groups if g.prunable}
    assert found.items() >= units.items()
    plan = random_plan(structure, share=0.5)
    small = prune(model, plan).eval()
    with torch.no_grad(), masked(copy.deepcopy(model), plan) as parent:
        torch.testing.assert_close(small(x), parent(x), rtol=1e-10, atol=1e-12)


class ChannelsLast(nn.Module):
    """Layers on (B, H, W, C) between convolutions; the pool behind them sees other strides."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.wide, self.narrow = nn.Conv2d(3, 8, 3), nn.Linear(8, 12), nn.Linear(12, 8)
        self.pool, self.one, self.two = (
            nn.AdaptiveAvgPool2d(1),
            nn.Conv2d(8, 4, 1),
            nn.Conv2d(4, 8, 1),
        )
        self.head = nn.Linear(8, 3)

    def forward(self, x):
        y = self.stem(x).permute(0, 2, 3, 1)
        y = self.narrow(self.wide(y).relu()).permute(0, 3, 1, 2)
        y = y * self.two(self.one(self.pool(y)).relu()).sigmoid()
        return self.head(y.mean((2, 3)))


def test_a_pool_of_a_map_in_channels_last_is_followed():
    torch.manual_seed(0)
    model, x = ChannelsLast().eval().double(), torch.rand(2, 3, 6, 6, dtype=torch.float64)
    structure = analyse(model, x)
    units = {g.members[0].layer: g.units for g in structure.groups if g.prunable}
    assert units == {"stem": 8, "wide": 12, "narrow": 8, "one": 4}
    plan = random_plan(structure, share=0.5)
    small = prune(model, plan).eval()
    with torch.no_grad(), masked(copy.deepcopy(model), plan) as parent:
        torch.testing.assert_close(small(x), parent(x), rtol=1e-10, atol=1e-12)
