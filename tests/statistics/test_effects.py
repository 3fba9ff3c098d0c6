"""Sensitivities of dependency groups against masks on every read, for every way to write a gate."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from masked_reads import masked_reads
from spellings import SPELLINGS
from torch import Tensor, nn

from seprune import analyse, collect_statistics
from seprune.statistics import GateStatistics


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def shaken(model: nn.Module) -> nn.Module:
    """Norms with statistics and parameters of their own, in float64."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                for tensor in (module.running_mean, module.bias):
                    tensor.copy_(torch.randn(tensor.shape, generator=generator) * 0.3)
                for tensor in (module.running_var, module.weight):
                    tensor.copy_(torch.rand(tensor.shape, generator=generator) + 0.5)
    return model.double().eval()


def agree(model: nn.Module, x: Tensor) -> GateStatistics:
    """Every group's statistics are those of the masks; returns what was collected."""
    structure = analyse(model, x[:2])
    with torch.no_grad():
        classes = model(x[:1]).shape[1]
    y = torch.arange(len(x)) % classes
    batches = [(x[:2], y[:2]), (x[2:], y[2:])]
    got = collect_statistics(model, batches, structure=structure, gradients="labels")
    cross_entropy = nn.functional.cross_entropy
    want = masked_reads(model, structure, x, lambda out, i: cross_entropy(out, y[i : i + 1]))
    features = [g for g in structure.groups if g.role == "features" and g.prunable]
    assert want or not features
    for name, u in want.items():
        own = got.groups[name]
        close(own["effect_square"], u.square().mean(0), name)
        close(own["effect_mean"], u.mean(0), name)
        close(own["effect_sum_square"], u.sum(1).square().mean()[None], name)
    return got


def close(got: Tensor, want: Tensor, name: str) -> None:
    torch.testing.assert_close(got, want.detach(), rtol=1e-7, atol=1e-20, msg=lambda m: name + m)


@pytest.mark.parametrize("key", SPELLINGS)
def test_a_group_is_scored_by_masks_on_its_reads(key: str) -> None:
    torch.manual_seed(0)
    net = shaken(SPELLINGS[key].net())
    agree(net, torch.rand(3, *SPELLINGS[key].input[1:], dtype=torch.float64))


# -- where the gate is not the only way through ---------------------------------------------------


class SE(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Conv2d(channels, 4, 1), nn.Conv2d(4, channels, 1)

    def gate(self, x: Tensor) -> Tensor:
        return self.fc2(torch.relu(self.fc1(x.mean((2, 3), keepdim=True)))).sigmoid()

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gate(x)


class Paths(nn.Module):
    """conv -> norm -> ReLU -> `way` -> pool -> linear layer."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.way = WAYS[way]
        self.stem, self.norm = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.se, self.se2 = SE(8), SE(8)
        self.conv2, self.norm2 = nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.conv3, self.head, self.wide = nn.Conv2d(8, 8, 1), nn.Linear(8, 4), nn.Linear(16, 4)
        self.act, self.space = nn.SiLU(), nn.Conv2d(8, 1, 1)
        self.depth = nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.groupwise = nn.Conv2d(4, 4, 1)
        self.grouped = nn.Conv2d(8, 8, 3, padding=1, groups=2)

    def forward(self, x: Tensor) -> Tensor:
        y = self.way(self, torch.relu(self.norm(self.stem(x))))
        return (self.wide if y.shape[1] == 16 else self.head)(torch.relu(y).mean((2, 3)))


def _shared(m: Paths, y: Tensor) -> Tensor:
    g = m.se.gate(y)
    z = y * g
    return m.conv3(z + m.norm2(m.conv2(z)) * g)


def _shared_by_groups(m: Paths, y: Tensor) -> Tensor:
    g = m.se.gate(y)
    return torch.cat([m.conv2(y * g), m.conv3(y.roll(1, 1)) * g], 1)


def _pair(m: Paths, y: Tensor) -> Tensor:
    g = m.se.gate(y)
    return m.conv3(m.conv2(y) * g + m.grouped(y) * (1 - g))


def _no_graph(m: Paths, y: Tensor) -> Tensor:
    with torch.no_grad():
        g = m.se.gate(y)
    return m.conv2(y * g)


def _shuffled(m: Paths, y: Tensor) -> Tensor:
    g = m.se.gate(y).view(-1, 2, 4).transpose(1, 2).reshape(-1, 8, 1, 1)
    return m.conv2(y * g)


def _parts(m: Paths, y: Tensor) -> Tensor:
    maps = [m.conv2(y), m.grouped(y)]
    z = torch.cat([m.se.fc2(torch.relu(m.se.fc1(f.mean((2, 3), True)))) for f in maps], 1)
    a = z.view(len(y), 2, 8).softmax(1)
    return m.conv3(maps[0] * a[:, 0, :, None, None] + maps[1] * a[:, 1, :, None, None])


def _folded(m: Paths, y: Tensor) -> Tensor:
    z = y.reshape(len(y) * 2, 4, *y.shape[2:])
    z = z * torch.sigmoid(m.groupwise(z.mean((2, 3), keepdim=True)))
    return m.conv2(z.reshape(y.shape))


WAYS = {
    "the only one": lambda m, y: m.conv2(m.se(y)),
    "x + x g": lambda m, y: m.conv2(y + y * m.se.gate(y)),
    "x + se(x)": lambda m, y: m.conv2(y + m.se(y)),
    "x (1 + g)": lambda m, y: m.conv2(y * (1 + m.se.gate(y))),
    "addcmul": lambda m, y: m.conv2(torch.addcmul(y, y, m.se.gate(y))),
    "g1 g2": lambda m, y: m.conv2(y * (m.se.gate(y) * m.se2.gate(y))),
    "x g1 g2": lambda m, y: m.conv2(y * m.se.gate(y) * m.se2.gate(y)),
    "two in a row": lambda m, y: m.conv2(m.se2(m.se(y))),
    "x g + x g g": lambda m, y: m.conv2(y * (g := m.se.gate(y)) + y * g * g),
    "before the branch": lambda m, y: y + m.norm2(m.conv2(m.se(y))),
    "a second reader before the gate": lambda m, y: m.conv2(m.se(y)) + m.conv3(y),
    "a classifier before the gate": lambda m, y: torch.cat([m.conv2(m.se(y)), y], 1),
    "on the branch": lambda m, y: m.conv3(torch.relu(y + m.se(m.norm2(m.conv2(y))))),
    "on the sum": lambda m, y: m.conv3(torch.relu(m.se(y + m.norm2(m.conv2(y))))),
    "on both operands": lambda m, y: m.conv3(m.se(y) + m.se2(m.conv2(y))),
    "one gate on two maps": _shared,
    "one gate on two groups": _shared_by_groups,
    "g and 1 - g": _pair,
    "called twice": lambda m, y: m.conv3(m.se(torch.relu(m.conv2(m.se(y))))),
    "detached": lambda m, y: m.conv2(y * m.se.gate(y).detach()),
    "without a graph": _no_graph,
    "permuted": _shuffled,
    "slices of one softmax": _parts,
    "in front of a norm": lambda m, y: m.conv2(torch.relu(m.norm2(m.se(y)))),
    "in front of SiLU": lambda m, y: m.conv2(m.act(m.se(y))),
    "behind SiLU": lambda m, y: m.conv2(m.se(nn.functional.silu(m.conv3(y)))),
    "in front of a depthwise layer": lambda m, y: m.conv2(m.depth(m.se(y))),
    "behind a grouped layer": lambda m, y: m.conv2(m.se(m.grouped(y))),
    "no gate, preactivated": lambda m, y: y + m.conv2(torch.relu(m.norm2(y))),
    "no gate, SiLU by function": lambda m, y: m.conv3(nn.functional.silu(m.norm2(m.conv2(y)))),
    "no gate, GELU of a sum": lambda m, y: m.conv3(nn.functional.gelu(y + m.conv2(y))),
    "no gate, in place": lambda m, y: m.conv3(torch.relu_(m.conv2(y).add_(y))),
    "a spatial gate behind it": lambda m, y: m.conv2((z := m.se(y)) * m.space(z).sigmoid()),
    "channel groups in the batch": _folded,
    "bare functions": lambda m, y: nn.functional.conv2d(m.se(y) + y, m.conv3.weight, m.conv3.bias),
    "no gate, two readers": lambda m, y: m.conv2(y) + m.conv3(y) + m.grouped(y.tanh()),
}  # fmt: skip


@pytest.mark.parametrize("way", WAYS)
def test_every_way_through_counts(way: str) -> None:
    torch.manual_seed(0)
    agree(shaken(Paths(way)), torch.randn(5, 3, 6, 6, dtype=torch.float64))


class Frames(nn.Module):
    """Frames are folded into the batch; an image's mask is on all of them."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.paths = Paths(way)

    def forward(self, x: Tensor) -> Tensor:
        return self.paths(x.flatten(0, 1)).view(*x.shape[:2], -1).square().mean(1)


@pytest.mark.parametrize("way", ["the only one", "x + se(x)", "no gate, preactivated"])
def test_frames_are_added_up_for_their_image(way: str) -> None:
    torch.manual_seed(0)
    agree(shaken(Frames(way)), torch.randn(5, 4, 3, 6, 6, dtype=torch.float64))


class Levels(nn.Module):
    """A head that is shared by two levels and returns a list; a stem that returns a dictionary."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.down = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, 2, 1)
        self.both, self.shared = Listed(8), nn.Conv2d(8, 8, 3, padding=1)
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        fine = torch.relu(self.stem(x))
        levels = self.both([fine, torch.relu(self.down(fine))])
        levels = [self.shared(level) for level in levels]
        return self.head(sum(nn.functional.silu(level).mean((2, 3)) for level in levels))


class Listed(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, maps: list[Tensor]) -> list[Tensor]:
        return [nn.functional.gelu(self.conv(x)) for x in maps]


def test_layers_that_are_shared_and_modules_that_return_lists() -> None:
    torch.manual_seed(0)
    agree(Levels().double().eval(), torch.randn(5, 3, 6, 6, dtype=torch.float64))


class Contracted(nn.Module):
    """A layer whose rows are the positions of all images, inside of one function of torch."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.mix = nn.Conv2d(3, 6, 3), nn.Linear(6, 8, bias=False)
        self.last = nn.Conv2d(8, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.tensordot(self.first(x).relu(), self.mix.weight, ([1], [1]))
        return self.last(y.permute(0, 3, 1, 2).sigmoid()).mean((2, 3))


def test_rows_that_are_positions_are_added_up_for_their_image() -> None:
    torch.manual_seed(0)
    model, x = shaken(Contracted()), torch.rand(4, 3, 7, 6, dtype=torch.float64)
    structure, y = analyse(model, x[:2]), torch.arange(4)
    batches = [(x[:2], y[:2]), (x[2:], y[2:])]
    got = collect_statistics(model, batches, structure=structure, gradients="labels").groups["mix"]
    cross_entropy = nn.functional.cross_entropy
    want = masked_reads(model, structure, x, lambda out, i: cross_entropy(out, y[i : i + 1]))
    close(got["effect_square"], want["mix"].square().mean(0), "mix")
