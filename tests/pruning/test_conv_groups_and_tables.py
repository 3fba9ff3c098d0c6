"""Conv groups of transposed convolutions, norm groups, and tables that carry channels: values."""

import pytest
import torch
import torch.nn.functional as F
from cutting import counted, kept, masked, random_plan
from torch import Tensor, nn

from seprune import Architecture, ModelLoader, analyse, load, prune, save
from seprune.pruning.plan import plan_of

C = 16


class Net(nn.Module):
    """conv -> one of many middles -> conv."""

    def __init__(self, what: str) -> None:
        super().__init__()
        self.what, self.groups = what, 8
        self.first, self.gate = nn.Conv2d(3, C, 3, padding=1), nn.Conv2d(C, 1, 1)
        norm_groups = {"norm groups": 8, "norm groups twice": 4, "few norm groups": 2}
        self.norm = nn.GroupNorm(norm_groups.get(what, 8), C)
        self.coarse = nn.GroupNorm(8, C)
        self.side = nn.Conv2d(3, C, 1)
        layers = {
            "transposed conv groups": nn.ConvTranspose2d(C, 24, 2, 2, groups=4),
            "wide transposed groups": nn.ConvTranspose2d(C, 12, 2, 2, groups=2),
            "transposed multiplier": nn.ConvTranspose2d(C, 2 * C, 2, 2, groups=C),
            "transposed in 1-d": nn.ConvTranspose1d(C, 8, 4, 2, 1, groups=4),
            "pixel shuffle": nn.PixelShuffle(2),
        }
        self.middle = layers.get(what, nn.Identity())
        self.scale, self.shift = nn.Parameter(torch.rand(C) + 0.5), nn.Parameter(torch.randn(C))
        self.table = nn.Parameter(torch.randn(1, C, 6, 6))
        self.register_buffer("mean", torch.randn(1, C, 1, 1))
        self.register_buffer("window", torch.rand(C, 6, 6))
        made = {"transposed conv groups": 24, "wide transposed groups": 12, "pixel shuffle": C // 4,
                "transposed multiplier": 2 * C, "transposed in 1-d": 8}  # fmt: skip
        self.last = nn.Conv2d(made.get(what, C), 5, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x)
        if self.what == "transposed in 1-d":
            y = self.middle(y.flatten(2))[:, :, None]
        else:
            y = self.middle(y)
        return self.last(self.changed(x, y).relu()).mean((2, 3))

    def changed(self, x: Tensor, y: Tensor) -> Tensor:
        what = self.what
        if "norm groups" in what:
            y = self.norm(y)
            return self.coarse(y + self.side(x)) if what == "norm groups twice" else y
        changes = {
            "functional norm": lambda: F.group_norm(y, 8, self.scale, self.shift),
            "norm by an attribute": lambda: F.group_norm(y, self.groups, self.scale, self.shift),
            "functional layer norm": lambda: self.by_layer(y),
            "table": lambda: y + self.table,
            "buffers": lambda: (y - self.mean) * self.window,
            "gate expanded": lambda: y * self.gate(y).sigmoid().expand(-1, C, -1, -1),
            "gate repeated": lambda: y * self.gate(y).sigmoid().repeat(1, C, 1, 1),
            "mask expanded": lambda: y * (x.mean((1,), keepdim=True) > 0.5).expand(len(x), C, 6, 6),
        }
        return changes.get(what, lambda: y)()

    def by_layer(self, y: Tensor) -> Tensor:
        return F.layer_norm(y.movedim(1, -1), (C,), self.scale, self.shift).movedim(-1, 1)


def net(what: str) -> nn.Module:
    torch.manual_seed(6)
    return Net(what).double().eval()


UNITS = {
    "transposed conv groups": 4, "wide transposed groups": 8, "transposed multiplier": C,
    "transposed in 1-d": 4, "pixel shuffle": C // 4, "norm groups": 8, "norm groups twice": 4,
    "functional norm": 8, "norm by an attribute": 8, "table": C, "buffers": C,
    "gate expanded": C, "gate repeated": C, "mask expanded": C,
}  # fmt: skip


@pytest.mark.parametrize("what", UNITS)
def test_a_cut_network_is_its_masked_parent(what, tmp_path):
    model, x = net(what), torch.rand(2, 3, 6, 6).double()
    structure = analyse(model, x)
    group = next(g for g in structure.groups if g.name == "first")
    assert (group.prunable, group.caveat) == (True, None), group.reason
    assert group.units == UNITS[what]
    for seed in range(2):
        plan = random_plan(structure, seed)
        small, parent = prune(model, plan), masked(model, plan)
        assert small.first.out_channels < C
        assert counted(small, x) == (
            structure.macs_at(kept(plan)), structure.params_at(kept(plan))
        )  # fmt: skip
        with torch.no_grad():
            torch.testing.assert_close(small(x), parent(x), rtol=1e-12, atol=1e-12)
    name = f"{__file__}:net"
    save(small, tmp_path / "m", Architecture(name, args={"what": what}).cut(plan))
    with torch.no_grad():
        again = load(tmp_path / "m", loader=ModelLoader.allowing(name))
        assert torch.equal(again(x), small(x))
    assert_second_cut_works(small, x)


def assert_second_cut_works(small: nn.Module, x: Tensor) -> None:
    structure = analyse(small, x)
    group = next(g for g in structure.groups if g.name == "first")
    if group.prunable and group.caveat is None:  # two norm groups that are left are few
        plan = random_plan(structure, 7)
        with torch.no_grad():
            found, right = prune(small, plan)(x), masked(small, plan)(x)
        torch.testing.assert_close(found, right, rtol=1e-12, atol=1e-12)


def test_norm_groups_that_go_whole_are_counted():
    model, x = net("norm groups"), torch.rand(2, 3, 6, 6).double()
    structure = analyse(model, x)
    plan = random_plan(structure, 0, share=0.6)
    small = prune(model, plan)
    assert (small.norm.num_groups, small.norm.num_channels) == (4, 8)
    assert small.norm.weight.shape == (8,)


def test_few_norm_groups_lose_channels_each_and_have_a_caveat():
    group = analyse(net("few norm groups"), torch.rand(2, 3, 6, 6).double()).groups[0]
    assert (group.units, group.prunable) == (8, True)
    assert "native_group_norm in norm looks across channels" in group.caveat


def test_a_functional_layer_norm_follows_with_a_caveat():
    model, x = net("functional layer norm"), torch.rand(2, 3, 6, 6).double()
    structure = analyse(model, x)
    group = structure.groups[0]
    assert (group.units, group.prunable) == (C, True)
    assert "native_layer_norm in the model looks across channels" in group.caveat
    keep = {"first": list(range(0, C, 2))}
    small = prune(model, plan_of(structure.groups, keep, {}))
    y = model.first(x)[:, ::2].movedim(1, -1)
    y = F.layer_norm(y, (C // 2,), model.scale[::2], model.shift[::2]).movedim(-1, 1)
    right = F.conv2d(y.relu(), model.last.weight[:, ::2], model.last.bias).mean((2, 3))
    torch.testing.assert_close(small(x), right, rtol=1e-12, atol=1e-12)
