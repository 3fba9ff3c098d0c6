"""Sizes that are written into a forward follow the widths: values, copies, exports, files."""

import copy
import io

import numpy as np
import pytest
import torch
from cutting import random_plan
from torch import Tensor, nn

from seprune import Architecture, ModelLoader, analyse, load, prune, save
from seprune.errors import InputError
from seprune.graph.sizes import set_size
from seprune.pruning.plan import PruningPlan, plan_of

WAYS = (
    "view", "view of the batch", "reshape", "reshape by name", "sizes in a list", "unflatten",
    "module", "bias", "gate", "expanded gate", "nested twice", "parts joined", "sequence",
    "repeated gate", "repeated mask",
)  # fmt: skip


class Written(nn.Module):
    """conv, gate, conv, linear, with 12 or 16 channels written down in one of many ways."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how
        self.c1, self.bn, self.c2 = nn.Conv2d(3, 12, 3, padding=1), nn.BatchNorm2d(12), None
        self.f1, self.f2 = nn.Linear(12, 5), nn.Linear(5, 12)
        self.c2, self.fc = nn.Conv2d(12, 16, 3, padding=1), nn.Linear(16, 4)
        self.bias = nn.Parameter(torch.rand(12))
        self.unflatten = nn.Unflatten(1, (16, 1))
        self.wide = nn.Linear(12 + 16, 4)
        nn.init.uniform_(self.bn.weight, 0.5, 1.5)
        nn.init.uniform_(self.bn.running_mean, -0.3, 0.3)

    def gate(self, x: Tensor) -> Tensor:
        g = self.f2(self.f1(x.mean((2, 3))).relu()).sigmoid()
        if self.how == "gate":
            return g.view(len(x), 12, 1, 1)
        g = g[:, :, None, None]
        if self.how == "repeated gate":  # ones, which are no widths
            return g.repeat(1, 1, *x.shape[2:])
        return g.expand(-1, 12, *x.shape[2:]) if self.how == "expanded gate" else g

    def forward(self, x: Tensor) -> Tensor:
        shade = x.mean(1, keepdim=True)
        x = self.bn(self.c1(x)).relu()
        if self.how == "repeated mask":
            x = x * shade.repeat(1, 12, 1, 1)
        if self.how == "bias":
            x = x + self.bias.view(1, 12, 1, 1)
        x = x * self.gate(x)
        if self.how == "sequence":  # the first view follows by itself, the second does not
            x = x.view(len(x), x.shape[1], -1).view(len(x), 12, *x.shape[2:])
        y = self.c2(x).relu().mean((2, 3), keepdim=True)
        if self.how == "parts joined":
            both = torch.cat([x.mean((2, 3), keepdim=True), y], 1)
            return self.wide(both.reshape(-1, 28))
        return self.fc(self.flattened(y))

    def flattened(self, y: Tensor) -> Tensor:
        how = self.how
        if how == "view":
            return y.view(-1, 16)
        if how == "view of the batch":
            return y.view(y.size(0), 16)
        if how == "reshape":
            return torch.reshape(y, (len(y), 16))
        if how == "reshape by name":
            return torch.reshape(input=y, shape=[-1, 16])
        if how == "sizes in a list":
            return y.reshape([len(y), int(torch.tensor(16))])
        if how == "unflatten":
            return y.flatten(1).unflatten(1, (16, 1))[:, :, 0]
        if how == "module":
            return self.unflatten(y.flatten(1)).squeeze(2)
        if how == "nested twice":
            return y.view(-1, 16, 1).view(-1, 16)
        return y.flatten(1)


def written(how: str = "view") -> Written:
    torch.manual_seed(1)
    return Written(how).eval()


def images(count: int = 2, side: int = 8) -> Tensor:
    return torch.rand(count, 3, side, side, generator=torch.Generator().manual_seed(count))


def masked(model: Written, plan: PruningPlan, x: Tensor) -> Tensor:
    """The parent's outputs where convolutions and linear layers read zeros for what is removed."""
    model = copy.deepcopy(model)
    for layer, sides in plan.layers().items():
        if "in" in sides:
            weight = model.get_submodule(layer).weight.data
            gone = np.setdiff1d(np.arange(weight.shape[1]), sides["in"])
            weight[:, torch.from_numpy(gone)] = 0
    with torch.no_grad():
        return model(x)


@pytest.mark.parametrize("how", WAYS)
def test_a_written_size_follows_and_the_network_computes_what_its_masked_parent_does(how):
    model = written(how).double()
    structure = analyse(model, images().double())
    assert {g.name for g in structure.groups if g.prunable} >= {"c1", "f1", "c2"}
    plan = random_plan(structure)
    small = prune(model, plan)
    assert small.c1.out_channels < 12
    assert small.c2.out_channels < 16
    for count, side in ((2, 8), (5, 12)):
        x = images(count, side).double()
        with torch.no_grad():
            torch.testing.assert_close(small(x), masked(model, plan, x), rtol=1e-12, atol=1e-12)


def test_only_sizes_that_do_not_follow_by_themselves_are_in_the_plan():
    plan = random_plan(analyse(written("sequence"), images()))
    sides = {(m.layer, m.side, m.total) for g in plan.groups for m in g.members if "#" in m.side}
    assert sides == {("", "view#2[1]", 12)}


def net(how: str) -> nn.Module:
    return written(how)


@pytest.mark.parametrize("how", ["view", "module", "bias"])
def test_copies_files_pickles_and_second_cuts_keep_the_sizes(how, tmp_path):
    model, x = written(how), images(3)
    plan = random_plan(analyse(model, images()))
    small = prune(model, plan)
    with torch.no_grad():
        right = small(x)
        assert torch.equal(copy.deepcopy(small)(x), right)
        stream = io.BytesIO()
        torch.save(small, stream)
        stream.seek(0)
        assert torch.equal(torch.load(stream, weights_only=False)(x), right)
        name = f"{__file__}:net"
        save(small, tmp_path / "m", Architecture(name, args={"how": how}).cut(plan))
        assert torch.equal(load(tmp_path / "m", loader=ModelLoader.allowing(name))(x), right)
    assert type(small).__name__ == "Written"
    assert isinstance(small, Written)
    again = prune(small, random_plan(analyse(small, images()), seed=1, share=0.5))
    assert again.c2.out_channels < small.c2.out_channels
    again.train()(images(4)).sum().backward()
    assert again.c1.weight.grad is not None
    with torch.no_grad():
        assert model(x).shape == again.eval()(x).shape


@pytest.mark.slow
@pytest.mark.parametrize("how", ["view", "gate"])
def test_compiled_and_exported_networks_have_the_sizes_too(how):
    model, x = written(how), images(3)
    small = prune(model, random_plan(analyse(model, images())))
    with torch.no_grad():
        right = small(x)
        shapes = {"x": {0: torch.export.Dim.AUTO}}
        made = torch.export.export(small, (x,), dynamic_shapes=shapes).module()
        torch.testing.assert_close(made(x), right)
        if how == "view":  # len(x) makes a batch size fixed, in the parent too
            torch.testing.assert_close(made(x[:2]), small(x[:2]))
        torch.testing.assert_close(torch.compile(small)(x), right)


def test_a_changed_class_is_not_added_to_a_registry():
    known = []

    class Registered(Written):
        def __init_subclass__(cls) -> None:
            known.append(cls)

    torch.manual_seed(1)
    model = Registered("view").eval()
    prune(model, random_plan(analyse(model, images())))(images())
    assert known == []


def test_what_cannot_be_set_is_refused_by_name():
    with pytest.raises(InputError, match=r"'softmax#1\[0\]' names no size"):
        set_size(nn.Linear(2, 2), "softmax#1[0]", 1)
    scripted = torch.jit.script(nn.ReLU())
    with pytest.raises(InputError, match=r"in the forward of a .* cannot be changed") as caught:
        set_size(scripted, "view#1[1]", 1)
    assert caught.value.why == "it is compiled"


# -- linear layers whose outputs become maps -------------------------------------------------------


class Generator(nn.Module):
    def __init__(self, how: str, transposed: bool) -> None:
        super().__init__()
        self.how, self.fc = how, nn.Linear(6, 10 * 4)
        first = nn.ConvTranspose2d(10, 7, 2, 2) if transposed else nn.Conv2d(10, 7, 3, padding=1)
        self.first, self.last = first, nn.Conv2d(7, 3, 1)

    def forward(self, z: Tensor) -> Tensor:
        x = self.fc(z).relu()
        if self.how == "nhwc":
            x = x.view(len(z), 2, 2, -1).permute(0, 3, 1, 2)
        elif self.how == "unflatten":
            x = x.unflatten(1, (-1, 2, 2))
        elif self.how == "attribute":
            x = x.view(-1, self.first.in_channels, 2, 2)
        else:
            x = x.view(len(z), 10, 2, 2)
        return self.last(self.first(x).relu())


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("how", ["nhwc", "unflatten", "attribute", "written"])
def test_a_linear_layer_whose_outputs_become_a_map_is_cut_by_its_channels(how, transposed):
    torch.manual_seed(2)
    model, z = Generator(how, transposed).double(), torch.rand(2, 6).double()
    structure = analyse(model, z)
    (group,) = (g for g in structure.groups if g.name == "fc")
    assert (group.channels, group.units, group.prunable) == (40, 10, True)
    keep = {"fc": [0, 2, 3, 7], "first": [1, 4, 5]}
    plan = plan_of(structure.groups, keep, {})
    small = prune(model, plan)
    assert small.fc.out_features == 16
    gone = [1, 4, 5, 6, 8, 9]
    model.first.weight.data[(gone,) if transposed else (slice(None), gone)] = 0
    model.last.weight.data[:, [0, 2, 3, 6]] = 0
    z = torch.rand(5, 6).double()
    torch.testing.assert_close(small(z), model(z), rtol=1e-12, atol=1e-12)
