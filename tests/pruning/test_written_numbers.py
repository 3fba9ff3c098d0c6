"""Splits, slices and constants whose numbers are written into a forward follow the widths."""

import copy
import random
import re
from collections.abc import Callable

import pytest
import torch
from cutting import masked
from test_sizes import images
from torch import Tensor, nn

from seprune import Architecture, InputError, ModelLoader, analyse, load, prune, save
from seprune.pruning.plan import PruningPlan, plan_of

A, B = 12, 8  # channels of the two halves


def _computed(x: Tensor) -> tuple[Tensor, Tensor]:
    middle = x.shape[1] * A // (A + B)
    return x[:, :middle], x[:, middle:]


HALVES: dict[str, Callable[[Tensor], tuple[Tensor, Tensor]]] = {
    "split sizes": lambda x: torch.split(x, [A, B], dim=1),
    "method": lambda x: x.split((A, B), 1),
    "split by name": lambda x: torch.split(tensor=x, split_size_or_sections=[A, B], dim=1),
    "split_with_sizes": lambda x: x.split_with_sizes([A, B], dim=1),
    "slices": lambda x: (x[:, :A], x[:, A:]),
    "slices with both ends": lambda x: (x[:, 0:A, :, :], x[:, A : A + B]),
    "negative slices": lambda x: (x[:, :-B], x[:, -B:]),
    "ellipsis": lambda x: (x[..., :A, :, :], x[..., A:, :, :]),
    "narrow": lambda x: (x.narrow(1, 0, A), torch.narrow(x, 1, A, B)),
    "tensor_split": lambda x: x.tensor_split((A,), dim=1),
    "new axis": lambda x: (x[:, None, :A][:, 0], x[:, None, A:, ...].squeeze(1)),
    "computed": _computed,
    "lists": lambda x: (x[[slice(None), slice(A)]], x[[slice(None), slice(A, None)]]),
    "numbers in tensors": lambda x: (  # imported from ONNX
        x[:, torch.tensor(0) : torch.tensor(A)],
        x[:, torch.tensor(A) : torch.tensor(2**63 - 1)],
    ),
}
"""Ways to take the first A and the last B channels."""


class Halves(nn.Module):
    """conv, one half through a convolution, both joined: as PConv, GhostNet and CSP do."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how
        self.stem, self.bn = nn.Conv2d(3, A + B, 3, padding=1), nn.BatchNorm2d(A + B)
        self.branch, self.last = nn.Conv2d(A, 10, 3, padding=1), nn.Conv2d(10 + B, 6, 1)
        self.fc = nn.Linear(6, 4)
        nn.init.uniform_(self.bn.weight, 0.5, 1.5)

    def forward(self, x: Tensor) -> Tensor:
        a, b = HALVES[self.how](self.bn(self.stem(x)).relu())
        return self.fc(self.last(torch.cat([self.branch(a).relu(), b], 1)).mean((2, 3)))


def net(how: str) -> nn.Module:
    torch.manual_seed(3)
    return Halves(how).double().eval()


def uneven(structure, seed: int = 0) -> PruningPlan:
    """Another share of every group, so that a number of the wrong group shows."""
    draw, keep = random.Random(seed), {}
    for at, group in enumerate(g for g in structure.groups if g.prunable):
        count = max(1, round(group.units * (0.35, 0.8, 0.6)[at % 3]))
        keep[group.name] = draw.sample(range(group.units), count)
    return plan_of(structure.groups, keep, {})


def assert_equals_masked(model: nn.Module, small: nn.Module, plan: PruningPlan) -> None:
    parent = masked(model, plan)
    for count, side in ((2, 8), (3, 6)):
        x = images(count, side).double()
        with torch.no_grad():
            torch.testing.assert_close(small(x), parent(x), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("how", HALVES)
def test_parts_cut_out_by_numbers_follow_each_by_its_own_width(how):
    model = net(how)
    structure = analyse(model, images().double())
    units = {g.name: g.units for g in structure.groups if g.prunable}
    assert units == {"stem": A, "stem#2": B, "branch": 10, "last": 6}
    plan = uneven(structure)
    small = prune(model, plan)
    assert small.branch.in_channels == len(plan.groups[0].keep) < A
    assert_equals_masked(model, small, plan)


@pytest.mark.parametrize("how", ["split sizes", "computed"])
@pytest.mark.parametrize("name", ["stem", "stem#2"])
def test_one_part_may_be_cut_alone(how, name):
    """A number may be computed from the width of the other part."""
    model = net(how)
    groups = analyse(model, images().double()).groups
    plan = plan_of(groups, {name: range(3)}, {})
    assert_equals_masked(model, prune(model, plan), plan)


class Squeezed(nn.Module):
    """A size of one group computed from the width of another (polarised attention)."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.value = nn.Conv2d(3, 12, 1), nn.Conv2d(12, 6, 1)
        self.query, self.out, self.fc = (nn.Conv2d(n, m, 1) for n, m in ((12, 1), (6, 12), (12, 4)))

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).relu()
        b, c, h, w = x.shape
        value = self.value(x).reshape(b, c // 2, h * w)
        context = value @ self.query(x).reshape(b, h * w, 1).softmax(1)
        gate = self.out(context.reshape(b, c // 2, 1, 1)).sigmoid()
        return self.fc(x * gate).mean((2, 3))


@pytest.mark.parametrize("keep", [{"stem": 5}, {"value": 2}, {"stem": 7, "value": 5}])
def test_sizes_computed_from_another_width_are_set(keep):
    torch.manual_seed(0)
    model = Squeezed().double().eval()
    structure = analyse(model, images().double())
    assert {g.name for g in structure.groups if not g.prunable} == {"query", "fc"}
    plan = plan_of(structure.groups, {name: range(n) for name, n in keep.items()}, {})
    assert_equals_masked(model, prune(model, plan), plan)


@pytest.mark.parametrize("how", ["split sizes", "negative slices", "computed"])
def test_saved_networks_and_second_cuts_have_the_numbers(how, tmp_path):
    model = net(how)
    plan = uneven(analyse(model, images().double()))
    small, x = prune(model, plan), images(3).double()
    name = f"{__file__}:net"
    save(small, tmp_path / "m", Architecture(name, args={"how": how}).cut(plan))
    with torch.no_grad():
        right = small(x)
        assert torch.equal(load(tmp_path / "m", loader=ModelLoader.allowing(name))(x), right)
        assert torch.equal(copy.deepcopy(small)(x), right)
    second = uneven(analyse(small, images().double()), seed=1)
    again = prune(small, second)
    assert again.branch.in_channels < small.branch.in_channels
    assert_equals_masked(small, again, second)


class Written(nn.Module):
    """Slices that are written to, equal chunks by size, and constants with sizes."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how
        self.stem, self.side = nn.Conv2d(3, 12, 3, padding=1), nn.Conv2d(12, 12, 1)
        self.part, self.wide = nn.Conv2d(6, 6, 1), nn.Conv2d(3, 20, 1)
        self.last, self.head = nn.Conv2d(12, 5, 1), nn.Conv2d(20, 5, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = WRITTEN[self.how](self, self.stem(x).relu(), x)
        head = self.head if self.how in ("padded by zeros", "new_zeros") else self.last
        return head(y.relu()).mean((2, 3))


def _written_to(net: Written, y: Tensor, x: Tensor) -> Tensor:
    y = y.clone()
    y[:, :6] = net.part(y[:, :6])
    return y


def _added_to(net: Written, y: Tensor, x: Tensor) -> Tensor:
    y[:, 6:] += net.part(y[:, :6])
    return y


def _equal_parts(net: Written, y: Tensor, x: Tensor) -> Tensor:
    one, two = y.split(6, 1)
    return torch.cat([net.part(one), two], 1)


def _filled(net: Written, y: Tensor, x: Tensor) -> Tensor:
    made = y.new_zeros(len(y), 12, *y.shape[2:])
    made[:, :6], made[:, 6:] = y[:, 6:], net.part(y[:, :6])
    return made


def _sum(net: Written, y: Tensor, x: Tensor) -> Tensor:
    total = torch.zeros(len(y), 12, *y.shape[2:], dtype=y.dtype)
    for part in (y, net.side(y)):
        total += part
    return total


WRITTEN: dict[str, Callable[[Written, Tensor, Tensor], Tensor]] = {
    "written to": _written_to,
    "added to": _added_to,
    "equal parts": _equal_parts,
    "padded by zeros": lambda net, y, x: (
        torch.cat([y, torch.zeros(len(y), 8, *y.shape[2:], dtype=y.dtype)], 1) + net.wide(x)
    ),
    "new_zeros": lambda net, y, x: (
        torch.cat((y, y.new_zeros((len(y), 8, *y.shape[2:]))), dim=1) + net.wide(x)
    ),
    "ones": lambda net, y, x: (
        net.side(y) * torch.ones(1, 12, 1, 1, dtype=y.dtype) + torch.ones(1, 1, *y.shape[2:])
    ),
    "full and expanded": lambda net, y, x: (
        y * torch.full((1, 12, 1, 1), 2.0).to(y).expand(len(y), -1, *y.shape[2:])
    ),
    "filled": _filled,
    "sum": _sum,
}


@pytest.mark.parametrize("how", WRITTEN)
def test_slices_that_are_written_to_and_constants_follow(how):
    torch.manual_seed(5)
    model = Written(how).double().eval()
    structure = analyse(model, images().double())
    assert [g.name for g in structure.groups if g.prunable and g.name.startswith("stem")]
    for seed in range(2):
        plan = uneven(structure, seed)
        small = prune(model, plan)
        assert small.stem.out_channels < 12
        assert_equals_masked(model, small, plan)


class Cropped(nn.Module):
    """Two convolutions side by side; odd images are cropped first, by another slice."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Conv2d(3, 8, 1), nn.Conv2d(3, 8, 1)
        self.last = nn.Conv2d(16, 4, 1)
        self.part = 8

    def forward(self, x: Tensor) -> Tensor:
        y = torch.cat([self.one(x), self.two(x)], 1)
        if y.shape[2] % 2:
            y = y[:, :, :-1]
        return self.last(y * y[:, : self.part].sum(1, keepdim=True) / self.part).mean((2, 3))


def test_another_way_through_a_forward_is_refused_rather_than_sliced_wrongly():
    model = Cropped().double().eval()
    plan = plan_of(analyse(model, images().double()).groups, {"one": [1, 4, 5]}, {})
    small = prune(model, plan)
    assert small.part == 8  # in the division it is no width
    parent, gone = copy.deepcopy(model), [0, 2, 3, 6, 7]
    parent.one.weight.data[gone], parent.one.bias.data[gone] = 0, 0
    torch.testing.assert_close(small(images().double()), parent(images().double()))
    with pytest.raises(InputError, match="__getitem__ 2 times") as caught:
        small(images(2, 5).double())
    assert "1 times when the network was cut" in caught.value.why


class Strided(nn.Module):
    def __init__(self, how: str) -> None:
        super().__init__()
        self.how, self.stem = how, nn.Conv2d(3, 12, 1)
        self.last = nn.Conv2d(6, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.stem(x)
        y = y[:, ::2] if self.how == "every other" else y[:, list(range(6))]
        return self.last(y).mean((2, 3))


@pytest.mark.parametrize(
    ("how", "why"),
    [("every other", r"sliced at fixed positions by slice in the model"),
     ("picked", r"index in the model")],
)  # fmt: skip
def test_what_cannot_follow_is_left_whole_by_name(how, why):
    torch.manual_seed(5)
    structure = analyse(Strided(how).eval(), images())
    (group,) = (g for g in structure.groups if g.name == "stem")
    assert not group.prunable
    assert re.search(why, group.reason)


class Hierarchy(nn.Module):
    """Res2Net's block as audio networks spell it: as many chunks as a chunk has channels."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = 4
        self.stem, self.last = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 8, 1)
        self.branches = nn.ModuleList(nn.Conv2d(4, 4, 3, padding=1) for _ in range(self.scale - 1))
        self.fc = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        first, *parts = torch.chunk(self.stem(x).relu(), self.scale, dim=1)
        made = [first]
        for branch, part in zip(self.branches, parts, strict=True):
            made.append(branch(part + made[-1]).relu())
        return self.fc(self.last(torch.cat(made, 1)).mean((2, 3)))


def test_a_number_of_chunks_that_equals_their_width_stays():
    torch.manual_seed(0)
    model = Hierarchy().double().eval()
    structure = analyse(model, images().double())
    units = {g.name: g.units for g in structure.groups if g.prunable}
    assert units == {"stem": 4, "branches.2": 4, "last": 8}
    plan = uneven(structure)
    small = prune(model, plan)
    assert (small.scale, small.stem.out_channels) == (4, 4)
    assert_equals_masked(model, small, plan)
