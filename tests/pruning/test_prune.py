"""A cut network is its masked parent, smaller; what cannot be cut is not pruned and named."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from cutting import assert_kept, masked, random_plan
from nets import DEPENDENT, SE, Chain, Gated, Head, Residual, dependent, images
from torch import Tensor, nn

from seprune.errors import InputError
from seprune.graph.groups import find_sized_structure, find_structure
from seprune.graph.sizes import is_size, size_set
from seprune.pruning.analyse import analyse
from seprune.pruning.plan import PruningPlan, plan_of
from seprune.pruning.prune import apply, prune

INEXACT = {"group norm": "its mean and variance are over a norm group's channels, cut ones too"}


def made(kind: str) -> tuple[nn.Module, PruningPlan, nn.Module]:
    model = dependent(kind)
    plan = random_plan(analyse(model, images()))
    return model, plan, prune(model, plan)


def assert_same(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


# -- what comes out --------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", DEPENDENT)
def test_a_cut_network_is_its_masked_parent(kind):
    model, plan, small = made(kind)
    assert_kept(small, model, plan)
    for batch, size in ((2, 16), (1, 16), (3, 20)):  # as its parent, it runs at any of them
        x = images(batch, size)
        with torch.no_grad():
            found = small(x)
            assert found.shape == model(x).shape
            if kind not in INEXACT:
                assert_same(found, masked(model, plan)(x))


@pytest.mark.parametrize("kind", DEPENDENT)
def test_every_width_agrees_with_the_plan(kind):
    _, plan, small = made(kind)
    modules, parameters = dict(small.named_modules()), dict(small.named_parameters())
    names = {"out": ("out_channels", "out_features", "num_features", "num_channels"),
             "in": ("in_channels", "in_features")}  # fmt: skip
    for layer, sides in plan.layers().items():
        for side, stay in sides.items():
            if side.startswith("dim"):
                assert parameters[layer].shape[int(side[3:])] == len(stay)
            elif is_size(side):
                assert size_set(modules[layer], side) == len(stay)
            elif side.startswith("."):
                name, _, index = side[1:].partition("[")
                value = getattr(modules[layer], name)
                assert (value[int(index[0])] if index else value) == len(stay)
            else:
                found = [
                    getattr(modules[layer], n) for n in names[side] if n in vars(modules[layer])
                ]
                assert found == [len(stay)], (layer, side)


def test_the_model_that_was_passed_stays_as_it_was():
    model, x = Residual().train(), images()
    model.stem.weight.requires_grad_(False)
    before = {n: t.clone() for n, t in model.state_dict().items()}
    plan = random_plan(analyse(model, x))
    small = prune(model, plan, x)
    assert model.state_dict().keys() == before.keys()
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())
    assert all(m.training for m in model.modules())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in small.modules())
    shared = {id(p) for p in model.parameters()} & {id(p) for p in small.parameters()}
    assert not shared


def test_frozen_parameters_stay_frozen_and_the_cut_network_learns():
    model = Residual()
    model.stem.weight.requires_grad_(False)
    small = prune(model, random_plan(analyse(model, images()))).train()
    assert [n for n, p in small.named_parameters() if not p.requires_grad] == ["stem.weight"]
    small(images()).square().sum().backward()
    assert all(p.grad is not None for n, p in small.named_parameters() if n != "stem.weight")


def test_tied_weights_stay_tied():
    _, _, small = made("tied")
    assert small.middle.one.weight is small.middle.two.weight
    assert small.middle.one.weight.shape[0] < 8


def test_a_bare_prelu_says_its_new_width():
    _, _, small = made("prelu")
    assert small.middle.num_parameters == len(small.middle.weight) < 8


def test_a_cut_network_can_be_cut_again():
    model, x = dependent("inner"), images()
    small, plans = model, []
    for seed in range(2):
        plans.append(random_plan(analyse(small, x), seed, share=0.7))
        small = prune(small, plans[-1], x)
    assert_same(small(x), masked(prune(model, plans[0]), plans[1])(x))
    assert small.expand.out_channels == 5  # 12 -> 8 -> 5


# -- plans that do not fit -------------------------------------------------------------------------


def test_a_plan_for_another_model_is_refused_before_anything_is_cut():
    plan = random_plan(find_structure(Residual(8), images()))
    other = Residual(12)
    before = copy.deepcopy(other.state_dict())
    with pytest.raises(InputError) as caught:
        apply(other, plan)
    assert caught.value.what == "the plan does not fit the model: layer 'stem'"
    assert caught.value.why == "the plan expects 8 on side 'out', the model has 12"
    assert caught.value.fix == "use the model that the plan was made for"
    assert all(torch.equal(t, before[n]) for n, t in other.state_dict().items())
    with pytest.raises(InputError, match="the model has no such layer"):
        prune(dependent("concat"), plan)


def test_a_plan_that_names_other_sides_is_refused():
    model = Chain(nn.PReLU(8))
    plan = random_plan(find_structure(model, images()))
    for layer, side in (("middle.weight", "dim3"), ("middle", "forward"), ("a", "nothing")):
        group = plan.groups[0]
        members = (replace(group.members[0], layer=layer, side=side), *group.members[1:])
        wrong = PruningPlan((replace(group, members=members), *plan.groups[1:]), {})
        with pytest.raises(InputError, match=f"the plan does not fit the model: layer '{layer}'"):
            prune(model, wrong)


def test_nothing_half_cut_leaves_the_function():
    """A network that `analyse` alone believes: the cut is run before it is returned."""
    model, x = Chain(Particular()), images()
    plan = random_plan(find_structure(model, x))
    with pytest.raises(InputError) as caught:
        prune(model, plan, x)
    assert caught.value.what.startswith("the cut network does not run: ")
    assert "layer 'middle'" in caught.value.what
    assert "8 channels, please" in caught.value.why
    assert caught.value.fix.endswith("plan.protect")
    assert model.a.out_channels == 8


# -- what a trial cut finds ------------------------------------------------------------------------


class Particular(nn.Module):
    """Takes 8 channels and no other number."""

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[1] != 8:
            raise ValueError(f"8 channels, please, not {x.shape[1]}")
        return x.relu()


def test_a_trial_cut_excludes_what_fails_and_only_that():
    structure = analyse(Chain(Particular()), images())
    found = {g.name: (g.prunable, g.reason) for g in structure.groups}
    assert found["b"] == (True, None)
    assert found["a"][0] is False
    assert found["a"][1] == ("a trial cut fails in layer middle: 8 channels, please, not 5")


def test_a_norm_written_by_hand_is_cut_by_its_parameters():
    class Scale(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight, self.bias = nn.Parameter(torch.rand(8)), nn.Parameter(torch.rand(8))

        def forward(self, x: Tensor) -> Tensor:
            mean, spread = x.mean((0, 2, 3)), x.var((0, 2, 3))
            return F.batch_norm(x, mean, spread, self.weight, self.bias)

    model = Chain(Scale()).double().eval()
    structure = analyse(model, images().double())
    assert all(g.prunable for g in structure.groups if g.name in ("a", "b"))
    plan = random_plan(structure)
    small = prune(model, plan)
    assert small.middle.weight.shape[0] == small.a.out_channels < 8
    x = images().double()
    with torch.no_grad():
        torch.testing.assert_close(small(x), masked(model, plan)(x), rtol=1e-12, atol=1e-12)


COMPUTED = {
    "parametrize.remove_parametrizations(layer, 'weight')": nn.utils.parametrizations.weight_norm,
    "remove_weight_norm(layer)": nn.utils.weight_norm,
    "remove_spectral_norm(layer)": nn.utils.spectral_norm,
    "prune.remove(layer, 'weight')": lambda a: nn.utils.prune.l1_unstructured(a, "weight", 0.5),
}


@pytest.mark.parametrize("undo", COMPUTED)
def test_computed_weights_are_cut_once_they_are_parameters_again(undo):
    model, x = Chain(nn.ReLU()), images()
    COMPUTED[undo](model.a)
    found = {g.name: g.reason for g in analyse(model.eval(), x).groups}
    assert found["a"] == f"layer 'a' cannot be cut before torch.nn.utils.{undo}"
    assert found["b"] is None
    with torch.no_grad():
        before = model(x)
        eval(f"nn.utils.{undo}", {"nn": nn, "layer": model.a})
        torch.testing.assert_close(model(x), before)
    structure = analyse(model, x)
    assert all(g.prunable for g in structure.groups if g.name == "a")
    plan = random_plan(structure)
    with torch.no_grad():
        torch.testing.assert_close(prune(model, plan)(x), masked(model, plan)(x))


def test_an_output_that_changes_its_shape_is_found():
    class Folded(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 8, 1)

        def forward(self, x: Tensor) -> Tensor:
            y = self.conv(x).mean((2, 3))
            return y.sum(1, keepdim=True).expand(-1, y.shape[1])

    structure = analyse(Folded(), torch.rand(8, 3, 4, 4))
    reason = "a trial cut changes the output from [[8, 8]] to [[8, 5]]"
    assert structure.groups[0].reason == reason


def test_a_model_that_does_not_run_without_data_is_tried_with_it():
    class Looks(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x if float(x.mean()) > -9 else -x

    structure = analyse(Chain(Looks()), images())
    assert [g.prunable for g in structure.groups] == [True, True, False]


def test_a_model_that_cannot_be_traced_is_named():
    class Jagged(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.reshape(7, -1)

    with pytest.raises(InputError) as caught:
        analyse(Chain(Jagged()), images())
    assert caught.value.what == "the model's forward fails in layer 'middle'"
    assert "shape '[7, -1]' is invalid" in caught.value.why
    assert "--input" in caught.value.fix


def test_a_forward_that_does_not_end_is_stopped_in_time():
    class Endless(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            while True:
                x = x + 1

    with pytest.raises(InputError) as caught:
        analyse(Chain(Endless()), images(), limit_seconds=0.3)
    assert caught.value.what == "the forward pass did not end within 0.3 s"
    assert caught.value.why == "it was in layer 'middle'"


def test_a_search_for_what_can_be_cut_ends_in_time(monkeypatch):
    """After the limit the rest is not pruned, with the reason."""
    found = find_sized_structure(model := Chain(Particular()), images())
    monkeypatch.setattr("seprune.pruning.analyse.find_sized_structure", lambda *_, **__: found)
    found = analyse(model, images(), limit_seconds=0)
    assert not any(g.prunable for g in found.groups)
    assert str(found.groups[0].reason).startswith(
        "no time was left to look for what can be cut after this: a trial cut fails in layer middle"
    )


def test_groups_of_one_channel_are_not_cut_to_nothing():
    model = nn.Sequential(nn.Conv2d(3, 1, 1), nn.ReLU(), nn.Conv2d(1, 2, 1), Head(2))
    structure = analyse(model, images())
    assert [(g.units, g.prunable) for g in structure.groups] == [(1, False), (2, True), (3, False)]
    small = prune(model, plan_of(structure.groups, {"2": [1]}, {}), images())
    assert small[2].out_channels == 1


def test_a_gated_chain_is_cut_together_with_its_gate():
    torch.manual_seed(0)
    model, x = Gated(SE(8)).eval(), images()
    structure = find_structure(model, x)
    plan = plan_of(structure.groups, {"conv": [0, 3, 6]}, {})
    small = prune(model, plan, x)
    assert torch.equal(small.gate.fc[2].weight, model.gate.fc[2].weight[[0, 3, 6]])
    assert torch.equal(small.gate.fc[0].weight, model.gate.fc[0].weight[:, [0, 3, 6]])
    assert_same(small(x), masked(model, plan)(x))
