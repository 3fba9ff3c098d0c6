"""Cuts that keep every shape and change the values: none of them passes `analyse`."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from nets import Inner, Residual, images
from torch import Tensor, nn
from torch.nn import functional as F

import seprune
from seprune.pipeline.reporting import across_channels
from seprune.pruning import value_check
from seprune.pruning.plan import PruningPlan
from seprune.pruning.value_check import random_plan


class Net(nn.Module):
    """A convolution to `width` channels, what a test does with them, and a head."""

    def __init__(self, width: int = 16, out: int | None = None) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, width, 3, padding=1)
        self.head = nn.Conv2d(out or width, 4, 1)

    def middle(self, x: Tensor) -> Tensor:
        raise AssertionError("a test says what happens here")

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.middle(self.conv(x))).mean((2, 3))


class Rolled(Net):
    def middle(self, x):
        return torch.cat([x[:, -6:], x[:, :-6]], 1)


class LastOnes(Net):
    def middle(self, x):
        return x * x[:, -5:].mean(1, keepdim=True).sigmoid()


class Temperature(Net):
    """An attribute that happens to be as large as a half of the channels."""

    def __init__(self):
        super().__init__(24, 12)
        self.temperature = 12

    def middle(self, x):
        a, b = x.chunk(2, 1)
        return a * b.sigmoid() / self.temperature


class Normalised(Net):
    """A divisor that is as large as a part of a split."""

    def __init__(self):
        super().__init__(24, 12)
        self.width = 12

    def middle(self, x):
        a, b = x.split(self.width, 1)
        return a * b.sigmoid() / self.width


class Fixed(Net):
    """Four channels at a time, however many there are."""

    def middle(self, x):
        parts = x.split(4, 1)
        return x * (parts[0].amax(1, keepdim=True) - parts[-1].amax(1, keepdim=True)).sigmoid()


class Strided(Net):
    def middle(self, x):
        return torch.cat([x[:, 1::2], x[:, ::2]], 1)


class BareBias(Net):
    """Parameters that no layer owns, a bias among them."""

    def __init__(self):
        super().__init__(16, 12)
        self.weight = nn.Parameter(torch.randn(12, 16, 1, 1))
        self.bias = nn.Parameter(torch.randn(12))

    def middle(self, x):
        return F.conv2d(x, self.weight, self.bias).relu()


class Softmax(Net):
    def middle(self, x):
        return torch.softmax(x, 1)


class Summed(Net):
    def middle(self, x):
        return x * (x.sum(1, keepdim=True) / 16).sigmoid()


class Response(Net):
    """Global response normalisation (ConvNeXt V2)."""

    def middle(self, x):
        energy = x.norm(dim=(2, 3), keepdim=True)
        return x * energy / (energy.mean(1, keepdim=True) + 1e-6) + x


class Normed(Net):
    def __init__(self):
        super().__init__()
        self.norm = nn.GroupNorm(1, 16)

    def middle(self, x):
        return self.norm(x)


class Spatial(Net):
    """One gate per position, from a convolution over all channels (scSE's second half)."""

    def __init__(self):
        super().__init__()
        self.gate = nn.Conv2d(16, 1, 1)

    def middle(self, x):
        return x * self.gate(x).sigmoid()


class Expanded(Spatial):
    def middle(self, x):
        gate = self.gate(x).sigmoid()
        return x + x * gate.expand_as(x)


class Mask(Net):
    """A constant over positions."""

    def __init__(self):
        super().__init__()
        self.register_buffer("mask", torch.rand(1, 1, 16, 16))

    def middle(self, x):
        return x * self.mask + torch.linspace(0, 1, 16, dtype=x.dtype)


def masked(model: nn.Module, plan: PruningPlan) -> nn.Module:
    """The parent in which removed channels are zero wherever a layer or bare weight reads them."""
    totals = {(m.layer, m.side): m.total for g in plan.groups for m in g.members}
    for layer, sides in plan.layers().items():
        for side, kept in sides.items():
            mask = torch.zeros(totals[layer, side], dtype=torch.double)
            mask[torch.from_numpy(kept)] = 1
            if side == "in":
                module = model.get_submodule(layer)
                shaped = mask if isinstance(module, nn.Linear) else mask[:, None, None]
                module.register_forward_pre_hook(lambda _, args, m=shaped: (args[0] * m,))
            elif side == "dim1":
                model.get_parameter(layer).data.mul_(mask[:, None, None])
    return model


def difference(model: nn.Module, structure: seprune.NetworkStructure, seed: int) -> float:
    """Largest difference of a cut network from the masked parent, relative to the outputs."""
    plan = random_plan(structure.groups, seed)
    model = model.double().eval()
    cut = seprune.prune(model, plan)
    x = images(3).double()
    with torch.no_grad():
        ours, theirs = cut(x), masked(model, plan)(x)
    return float((ours - theirs).abs().max() / theirs.abs().max())


@pytest.mark.parametrize("net", [Rolled, LastOnes, Fixed, Strided])
def test_what_gives_other_values_is_not_pruned_and_named(net):
    torch.manual_seed(0)
    structure = seprune.analyse(net(), images())
    group = next(g for g in structure.groups if g.name == "conv")
    across = {LastOnes: "mean", Fixed: "amax"}  # of channels that are sliced where they should be
    if net in across:
        caveats = [g.caveat for g in structure.groups if g.caveat]
        assert caveats
        assert f"{across[net]} in the model looks across channels" in caveats[0]
    elif group.prunable:  # a rule that follows it right is as good
        assert difference(net(), structure, 3) < 1e-12
    else:
        assert group.reason


@pytest.mark.parametrize(
    ("net", "operator"),
    [(Softmax, "_softmax"), (Summed, "sum"), (Response, "mean"), (Normed, "native_group_norm")],
)
def test_operators_that_look_across_channels_are_a_caveat_everywhere(net, operator, tmp_path):
    torch.manual_seed(0)
    structure = seprune.analyse(net(), images())
    (group,) = (g for g in structure.groups if g.name == "conv")
    assert group.prunable
    place = "norm" if net is Normed else "the model"
    assert group.caveat == (
        f"{operator} in {place} looks across channels: a cut network is not its masked parent"
    )
    assert group.caveat in repr(structure)[:400].replace("...", group.caveat[57:])
    plan = random_plan(structure.groups, 0)
    plan.save(tmp_path / "plan.json")
    written = json.loads((tmp_path / "plan.json").read_text())["groups"]
    assert [g.get("caveat") for g in written if g["name"] == "conv"] == [group.caveat]
    assert [g.caveat for g in PruningPlan.load(tmp_path / "plan.json").groups] == [
        g.caveat for g in structure.groups
    ]


def test_the_report_and_inspect_name_the_places_once():
    torch.manual_seed(0)
    (note,) = across_channels(seprune.analyse(Softmax(), images()))
    assert note == (
        "_softmax in the model looks across channels, so that a cut network is not its parent "
        "without them: recalibrate, refit or tune it"
    )
    assert across_channels(seprune.analyse(Inner(), images())) == []


@pytest.mark.parametrize("net", [Temperature, Normalised])
def test_a_number_that_is_no_width_stays(net):
    torch.manual_seed(0)
    structure = seprune.analyse(net(), images())
    assert [g.units for g in structure.groups if g.prunable] == [12]
    assert difference(net(), structure, 3) < 1e-12


@pytest.mark.parametrize("net", [Inner, Residual, BareBias, Spatial, Expanded, Mask])
def test_right_cuts_stay_free_and_equal_the_masked_parent(net):
    torch.manual_seed(0)
    model = net()
    structure = seprune.analyse(model, images())
    (first,) = (g for g in structure.groups if g.name in ("stem", "conv"))
    assert first.prunable
    assert first.units == first.channels
    assert not any(g.caveat for g in structure.groups)
    assert max(difference(net(), structure, seed) for seed in range(3)) < 1e-12


def test_a_gate_over_positions_stays_and_says_why():
    structure = seprune.analyse(Spatial(), images())
    (gate,) = (g for g in structure.groups if g.name == "gate")
    assert gate.reason == "it is spread over channels in mul in the model"


def test_a_parent_is_the_same_before_and_after_the_check():
    torch.manual_seed(0)
    model = Softmax().train()
    before = {n: t.clone() for n, t in model.state_dict().items()}
    state = torch.random.get_rng_state()
    seprune.analyse(model, images())
    assert model.training
    assert torch.equal(torch.random.get_rng_state(), state)
    assert all(torch.equal(before[n], t) and t.dtype == before[n].dtype
               for n, t in model.state_dict().items())  # fmt: skip


class Picks(Net):
    """Two scores that are equal up to rounding, and which of them is larger."""

    def __init__(self) -> None:
        super().__init__(64)
        self.other = nn.Conv2d(3, 64, 3, padding=1)
        self.one, self.two = nn.Linear(64, 1), nn.Linear(64, 1)
        self.both = nn.Linear(128, 1)
        weights = torch.cat([self.one.weight, self.two.weight], 1)
        self.both.weight = nn.Parameter(weights.detach().clone())
        self.both.bias = nn.Parameter((self.one.bias + self.two.bias).detach())

    def forward(self, x):
        p, q = self.conv(x), self.other(x)
        a, b = p.mean((2, 3)), q.mean((2, 3))
        better = self.one(a) + self.two(b) > self.both(torch.cat([a, b], 1))
        return self.head(p).mean((2, 3)), better


def test_what_a_last_bit_picks_is_no_wrong_cut(monkeypatch):
    torch.manual_seed(0)
    model = Picks().eval()
    monkeypatch.setattr(value_check, "checkable", lambda m: copy.deepcopy(m).double())
    check = value_check.ValueCheck(model, images())
    structure = seprune.analyse(model, images())
    free = [g for g in structure.groups if g.prunable]
    assert [g.name for g in free] == ["conv", "other"]
    plans = [random_plan(free, seed) for seed in range(8)]
    cut = [check._outputs(check._cut(p))[-1] for p in plans]
    masked = [check._outputs(check._masked(p, producers=False))[-1] for p in plans]
    assert any(not torch.equal(a, b) for a, b in zip(cut, masked))
    assert all(not check.findings(free, seed) for seed in range(8))
