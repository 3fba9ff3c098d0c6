"""Gates behind norms, in folded batches, on weighed pools, and in containers that never run."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from nets import SE
from torch import Tensor, nn

from seprune import find_gates
from seprune.graph.hooks import watch

C = 8


class Net(nn.Module):
    """conv -> `middle` -> pool -> linear layer."""

    def __init__(self, middle: nn.Module) -> None:
        super().__init__()
        self.conv, self.middle, self.head = nn.Conv2d(3, C, 3, padding=1), middle, nn.Linear(C, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.middle(self.conv(x)).mean((2, 3)))


def gates_of(model: nn.Module, x: Tensor) -> list[tuple[str, int, bool]]:
    return [(g.name, g.channels, g.runs) for g in find_gates(model.eval(), x)]


def images() -> Tensor:
    return torch.rand(2, 3, 10, 6)


@pytest.mark.parametrize(
    "norm",
    [
        nn.InstanceNorm2d(C),
        nn.InstanceNorm2d(C, affine=True),
        nn.InstanceNorm2d(C, affine=True, track_running_stats=True),
        nn.GroupNorm(2, C),
        nn.BatchNorm2d(C),
        nn.Sequential(nn.InstanceNorm2d(C), nn.LeakyReLU()),
        nn.Sequential(nn.Dropout2d(), nn.InstanceNorm2d(C)),
    ],
    ids=["instance", "affine", "tracked", "group", "batch", "activated", "dropped out"],
)
def test_a_gate_right_behind_a_norm(norm: nn.Module) -> None:
    assert gates_of(Net(nn.Sequential(norm, SE(C))), images()) == [("middle.1", C, True)]


class Frames(nn.Module):
    """TSN: the frames of a video are images to the backbone; their answers are averaged."""

    def __init__(self) -> None:
        super().__init__()
        self.net = Net(SE(C))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x.flatten(0, 1)).view(*x.shape[:2], -1).mean(1)


def test_frames_that_are_folded_into_the_batch() -> None:
    net, x, seen = Frames().eval(), torch.rand(2, 4, 3, 10, 6), []
    gates = find_gates(net, x)
    assert [(g.name, g.channels) for g in gates] == [("net.middle", C)]
    x = torch.rand(3, 5, 3, 10, 6)
    with torch.no_grad(), watch(net, gates, lambda gate, values, features: seen.append(values)):
        net(x)
        want = net.net.middle.fc(net.net.conv(x.flatten(0, 1)).mean((2, 3)))
    torch.testing.assert_close(seen[0], want)


class Grouped(nn.Module):
    """Channel groups in the batch dimension, each gated by what its own positions say (SGE)."""

    def __init__(self, halves: bool) -> None:
        super().__init__()
        self.halves, width = halves, C // 4 if halves else C // 2
        self.weight, self.bias = (nn.Parameter(torch.rand(1, width, 1, 1)) for _ in "12")

    def forward(self, x: Tensor) -> Tensor:
        y = x.reshape(len(x) * 2, -1, *x.shape[2:])
        parts = y.chunk(2, 1) if self.halves else (y,)
        gate = torch.sigmoid(self.weight * parts[0].mean((2, 3), keepdim=True) + self.bias)
        return torch.cat([parts[0] * gate, *parts[1:]], 1).reshape(x.shape)


@pytest.mark.parametrize(("halves", "channels"), [(False, C // 2), (True, C // 4)])
def test_groups_that_are_folded_into_the_batch(halves: bool, channels: int) -> None:
    assert gates_of(Net(Grouped(halves)), images()) == [("middle", channels, True)]


class Weighed(nn.Module):
    """GCNet with a product: the squeeze is a mean over positions, weighed by attention."""

    def __init__(self, pool: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.pool, self.attend = pool, nn.Conv2d(C, 1, 1)
        self.fc = nn.Sequential(nn.Conv2d(C, 4, 1), nn.ReLU(), nn.Conv2d(4, C, 1))

    def forward(self, x: Tensor) -> Tensor:
        weights = self.attend(x).flatten(2).softmax(-1)
        return x * self.fc(self.pool(x.flatten(2), weights).view(len(x), C, 1, 1)).sigmoid()


@pytest.mark.parametrize(
    "pool",
    [
        lambda x, w: x @ w.transpose(1, 2),
        lambda x, w: torch.bmm(w, x.transpose(1, 2)),
        lambda x, w: x[:, None] @ w[..., None],
        lambda x, w: (x * w).sum(-1),
        lambda x, w: torch.einsum("bcn,bkn->bck", x, w),
        lambda x, w: torch.einsum("bcn,bn->bc", x, w[:, 0]),
    ],
    ids=["matmul", "bmm", "matmul of four", "product", "einsum", "einsum of rows"],
)
def test_a_squeeze_by_an_attention_over_positions(pool: Callable[..., Tensor]) -> None:
    assert gates_of(Net(Weighed(pool)), images()) == [("middle", C, True)]


class Iterated(nn.Module):
    """Calls the parts of its containers, never the containers."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, C, 1), nn.ModuleDict({"se": SE(C), "idle": SE(4)}))
        self.head = nn.Linear(C, 3)

    def forward(self, x: Tensor) -> Tensor:
        conv, gates = self.body
        return self.head(gates["se"](conv(x)).mean((2, 3)))


def test_a_container_that_is_iterated_over_is_not_idle() -> None:
    assert gates_of(Iterated(), images()) == [("body.1.se", C, True), ("body.1.idle", 4, False)]
