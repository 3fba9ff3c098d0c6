"""Quick copies of module trees are what `copy.deepcopy` makes; random numbers leave no trace."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from seprune.runtime.module_copy import copy_module, share_tensors
from seprune.runtime.random_state import cpu_random, seed_torch


class Tied(nn.Module):
    """Tied weights, a shared module, a buffer, a list of modules that is no ModuleList, a hook."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)
        self.b.weight = self.a.weight
        self.norm = nn.BatchNorm1d(4)
        self.same = self.norm
        self.order = [self.a, self.norm, self.b]
        self.facts = {"scale": torch.tensor(2.0), "nothing": {}}
        self.seen: list[str] = []
        self.a.register_forward_hook(self.note)

    def note(self, *_: object) -> None:
        self.seen.append("a")

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.order:
            x = layer(x)
        return x * self.facts["scale"]


class Own(Tied):
    def __deepcopy__(self, memo: dict[int, object]) -> Own:
        made = Own()
        made.load_state_dict(self.state_dict())
        made.own = True
        return made


def test_a_copy_computes_the_same_and_shares_nothing() -> None:
    model, x = Tied().eval(), torch.rand(3, 4)
    want = copy.deepcopy(model)(x)
    made = copy_module(model)
    assert torch.equal(made(x), want)
    assert made.a.weight is made.b.weight
    assert made.order[0] is made.a
    assert made.same is made.norm
    assert (made.seen, model.seen) == (["a"], [])  # a hook that is bound to the copy
    for tensors in ("parameters", "buffers"):
        pairs = zip(getattr(model, tensors)(), getattr(made, tensors)(), strict=True)
        assert all(torch.equal(a, b) and a.data_ptr() != b.data_ptr() for a, b in pairs)
    made.facts["nothing"]["x"] = 1
    made.register_buffer("new", torch.ones(1))
    made.a.register_forward_pre_hook(lambda *_: None)
    assert model.facts["nothing"] == {}
    assert not hasattr(model, "new")
    assert not model.a._forward_pre_hooks


def test_a_copy_may_hold_the_same_tensors() -> None:
    model = Tied()
    made = share_tensors(model)
    assert made.a is not model.a
    assert all(a is b for a, b in zip(made.parameters(), model.parameters(), strict=True))
    assert made.norm.running_mean is model.norm.running_mean
    made.a.bias = nn.Parameter(torch.zeros(4))
    assert model.a.bias is not made.a.bias


def test_a_class_that_copies_itself_does_so() -> None:
    assert copy_module(nn.Sequential(Own()))[0].own


@pytest.mark.parametrize("seed", [0, 7])
def test_numbers_are_those_of_manual_seed_and_the_callers_go_on(seed: int) -> None:
    torch.manual_seed(3)
    want = torch.rand(2)
    torch.manual_seed(3)
    with cpu_random(seed):
        inside = torch.rand(4)
    assert torch.equal(torch.rand(2), want)
    torch.manual_seed(seed)
    assert torch.equal(torch.rand(4), inside)
    seed_torch(seed)
    assert torch.equal(torch.rand(4), inside)
