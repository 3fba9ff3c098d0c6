"""Masking one group is cutting it, and what it costs is measured group by group."""

from __future__ import annotations

import pytest
import torch
from nets import DEPENDENT, dependent, images
from torch import Tensor, nn

from seprune.errors import InputError, UsageError
from seprune.evaluation import evaluate
from seprune.groups import analyse
from seprune.importance import Importance, Scoring, score
from seprune.plan import plan_of
from seprune.pruning import cuttable, prune
from seprune.sensitivity import (
    SHARES,
    Sensitivity,
    SensitivityOptions,
    lowest,
    masked,
    measure_sensitivity,
)

LOOKS_AT_ALL_CHANNELS = {"group norm"}


def answer(model: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        return model.eval()(x)


@pytest.mark.parametrize("kind", sorted(set(DEPENDENT) - LOOKS_AT_ALL_CHANNELS))
def test_a_masked_group_answers_like_the_cut_network(kind):
    model, x = dependent(kind).double(), images(3).double()
    structure = cuttable(model, images().double())
    before = {name: value.clone() for name, value in model.state_dict().items()}
    checked = 0
    for group in (g for g in structure.groups if g.prunable and g.units > 1):
        gone = list(range(0, group.units, 2))
        keep = sorted(set(range(group.units)) - set(gone))
        small = prune(model, plan_of(structure.groups, {group.name: keep}, {}))
        with masked(model, group, gone):
            torch.testing.assert_close(answer(model, x), answer(small, x))
        checked += 1
    assert checked or kind in ("sorted", "unbound", "hard view", "slice fixed")
    after = model.state_dict()
    assert all(torch.equal(after[name], value) for name, value in before.items())
    assert not any(m._forward_pre_hooks for m in model.modules())


def measured(*shares: float) -> tuple[nn.Module, Sensitivity, list[tuple[Tensor, Tensor]]]:
    model = dependent("residual")
    loader = [
        (images(4, seed=1), torch.tensor([0, 1, 2, 0])),
        (images(2, seed=2), torch.tensor([1, 2])),
    ]
    structure = analyse(model, images())
    scores = score(structure, model=model, scoring=Scoring("l2"))
    options = SensitivityOptions(shares or SHARES, "cpu")
    return model, measure_sensitivity(model, structure, scores, loader, options=options), loader


def test_losses_are_those_of_networks_that_are_cut_in_one_group():
    model, found, loader = measured(0.25, 0.5)
    structure = analyse(model, images())
    scores = score(structure, model=model, scoring=Scoring("l2"))
    assert (found.criterion, found.shares, found.images) == ("l2", (0.25, 0.5), 6)
    whole = evaluate(model, loader, device="cpu")
    assert (found.top1, found.loss) == (whole.top1, whole.loss)
    assert [g.group for g in found.groups] == [g.name for g in structure.groups if g.prunable]
    for row, group in zip(found.groups, (g for g in structure.groups if g.prunable)):
        for share, cell in zip(found.shares, row.losses):
            order = scores.scores[group.name].argsort()
            keep = sorted(order[cell.removed :].tolist())
            assert cell.removed == share * group.units
            small = prune(model, plan_of(structure.groups, {group.name: keep}, {}))
            there = evaluate(small, loader, device="cpu")
            assert cell.top1 == there.top1
            assert cell.loss == pytest.approx(there.loss, rel=1e-5)


def test_it_is_plain_data_that_comes_back():
    _, found, _ = measured()
    assert found.shares == (0.1, 0.3, 0.5)
    assert Sensitivity.of(found.plain()) == found


def test_one_unit_goes_at_least_and_one_stays():
    group = analyse(dependent("residual"), images()).groups[0]
    scores = Importance("x", {group.name: torch.tensor([3.0, 1, 2, 9, 8, 7, 6, 5])})
    assert lowest(scores, group, 0.01) == [1]
    assert lowest(scores, group, 0.3) == [1, 2]
    assert lowest(scores, group, 0.99) == [0, 1, 2, 4, 5, 6, 7]


def test_shares_and_groups_that_make_no_sense_are_refused():
    with pytest.raises(UsageError) as caught:
        measured(0.1, 1.0)
    assert caught.value.what == "1.0 is no share of a group"
    assert caught.value.fix == "for example 0.1,0.3,0.5"
    model = dependent("residual")
    with pytest.raises(InputError, match="no dependency group has a score"):
        measure_sensitivity(model, analyse(model, images()), Importance("x", {}), [])
