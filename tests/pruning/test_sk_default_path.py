"""SK networks on the way that people go: default statistics and criterion, refit, tuning, files."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from cutting import counted, kept, masked
from masked_reads import masked_reads
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import seprune
from seprune import Architecture, FineTuneSettings, ModelLoader, RefitOptions

C = 16
Mix = Callable[["SK", list[Tensor], Tensor], Tensor]


def _wide(gate: Tensor) -> Tensor:
    return gate[..., None, None]


def _stacked(sk: SK, maps: list[Tensor], z: Tensor) -> Tensor:
    gates = torch.softmax(torch.stack([fc(z) for fc in sk.fcs], 1), 1)
    return maps[0] * _wide(gates[:, 0]) + maps[1] * _wide(gates[:, 1])


def _summed(sk: SK, maps: list[Tensor], z: Tensor) -> Tensor:
    gates = torch.stack([fc(z).view(len(z), C, 1, 1) for fc in sk.fcs], 0).softmax(0)
    return (gates * torch.stack(maps, 0)).sum(0)


def _viewed(sk: SK, maps: list[Tensor], z: Tensor) -> Tensor:
    gates = sk.one(z).view(len(z), 2, -1).softmax(1)
    return sum(m * _wide(g) for m, g in zip(maps, gates.unbind(1)))


def _by_exponents(sk: SK, maps: list[Tensor], z: Tensor) -> Tensor:
    one, two = (fc(z).exp() for fc in sk.fcs)
    return maps[0] * _wide(one / (one + two)) + maps[1] * _wide(two / (one + two))


def _chunked(sk: SK, maps: list[Tensor], z: Tensor) -> Tensor:
    one, two = sk.one(z).sigmoid().chunk(2, 1)
    return maps[0] * _wide(one) + maps[1] * _wide(two)


def _einsum(sk: SK, maps: list[Tensor], z: Tensor) -> Tensor:
    gates = torch.stack([fc(z) for fc in sk.fcs]).softmax(0)
    return torch.einsum("kbchw,kbc->bchw", torch.stack(maps), gates)


MIXES: dict[str, Mix] = {
    "stack and select": _stacked,
    "stack and sum": _summed,
    "one layer, view": _viewed,
    "exponents": _by_exponents,
    "two sigmoids": _chunked,
    "einsum": _einsum,
}


QUICK = ("stack and select", "two sigmoids", "einsum")


class SK(nn.Module):
    """Selective kernels (Li et al. 2019): which of two branches every channel takes."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.mix = MIXES[how]
        near, far = nn.Conv2d(C, C, 3, padding=1), nn.Conv2d(C, C, 3, padding=2, dilation=2)
        self.branches = nn.ModuleList(
            [nn.Sequential(near, nn.ReLU()), nn.Sequential(far, nn.ReLU())]
        )
        self.fc = nn.Linear(C, 8)
        self.fcs = nn.ModuleList([nn.Linear(8, C), nn.Linear(8, C)])
        self.one = nn.Linear(8, 2 * C)

    def forward(self, x: Tensor) -> Tensor:
        maps = [branch(x) for branch in self.branches]
        return self.mix(self, maps, self.fc((maps[0] + maps[1]).mean((2, 3))).relu())


class Net(nn.Module):
    def __init__(self, how: str) -> None:
        super().__init__()
        self.stem, self.bn, self.sk = nn.Conv2d(3, C, 3, padding=1), nn.BatchNorm2d(C), SK(how)
        self.last, self.fc = nn.Conv2d(C, 24, 3), nn.Linear(24, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.sk(self.bn(self.stem(x)).relu())
        return self.fc(self.last(x).relu().mean((2, 3)))


def net(how: str) -> nn.Module:
    torch.manual_seed(4)
    return Net(how).eval()


def data(count: int = 24) -> DataLoader:
    draw = torch.Generator().manual_seed(1)
    images = torch.rand(count, 3, 10, 10, generator=draw)
    return DataLoader(TensorDataset(images, torch.arange(count) % 4), batch_size=8)


@pytest.mark.parametrize(
    "how",
    [pytest.param(m, marks=() if m in QUICK else pytest.mark.slow) for m in MIXES],
)
def test_from_statistics_to_a_tuned_network_in_a_folder(how, tmp_path):
    model, x = net(how), torch.rand(5, 3, 12, 9)
    structure = seprune.analyse(model, x[:2])
    assert len(structure.gates) == 2
    statistics = seprune.collect_statistics(model, data(), structure=structure)
    plan = seprune.make_plan(structure, seprune.score(structure, statistics), macs=0.5)
    small = seprune.prune(model, plan)

    widths = kept(plan)
    assert counted(small, x) == (structure.macs_at(widths), structure.params_at(widths))
    assert structure.macs_at(widths) <= 0.5 * structure.costs()["macs"]
    with torch.no_grad():
        torch.testing.assert_close(small(x), masked(model, plan)(x), rtol=1e-5, atol=1e-6)

    fitted = seprune.refit(model, small, plan, data(), options=RefitOptions(images=24))
    assert fitted.errors
    assert all(after <= before for before, after in fitted.errors.values())
    settings = FineTuneSettings(epochs=1, batch_size=8, lr=0.01, recalibrate=0)
    tuned = seprune.finetune(fitted.model, data(), settings, teacher=model).model
    weights = zip(tuned.parameters(), fitted.model.parameters())
    assert any(not torch.equal(a, b) for a, b in weights)

    name = f"{__file__}:net"
    seprune.save(tuned, tmp_path / "m", Architecture(name, args={"how": how}).cut(plan))
    again = seprune.load(tmp_path / "m", loader=ModelLoader.allowing(name))
    with torch.no_grad():
        assert torch.equal(again(x), tuned.eval()(x))
        assert bool(again(x).isfinite().all())


@pytest.mark.parametrize("how", MIXES)
def test_effects_are_those_of_a_mask_on_every_read(how):
    model, draw = net(how).double(), torch.Generator().manual_seed(2)
    x, y = torch.rand(6, 3, 9, 8, dtype=torch.double, generator=draw), torch.arange(6) % 4
    structure = seprune.analyse(model, x[:2])
    found = seprune.collect_statistics(model, [(x, y)], structure=structure, gradients="labels")

    def loss(outputs: Tensor, image: int) -> Tensor:
        return nn.functional.cross_entropy(outputs, y[image : image + 1])

    right = masked_reads(model, structure, x, loss)
    for name in ("stem", "sk.branches.0.0"):
        torch.testing.assert_close(
            found.groups[name]["effect_square"].double(), right[name].square().mean(0), rtol=1e-5,
            atol=1e-12,
        )  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("network", ["timm/skresnet18", "seprune/sknet50"])
def test_shipped_sk_networks(network):
    torch.manual_seed(0)
    model, x = seprune.build(network).eval(), torch.rand(4, 3, 64, 64)
    structure = seprune.analyse(model, x[:2])
    batches = [(x, torch.arange(4))]
    statistics = seprune.collect_statistics(model, batches, structure=structure)
    plan = seprune.make_plan(structure, seprune.score(structure, statistics), macs=0.5)
    small = seprune.prune(model, plan)
    with torch.no_grad():
        right, found = masked(model, plan).double()(x.double()), small.double()(x.double())
    torch.testing.assert_close(found, right, rtol=1e-9, atol=1e-9 * float(right.abs().max()))
