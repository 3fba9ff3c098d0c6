"""Choosing among plans by what their networks give after a refit, against numpy."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import seprune
from seprune.errors import InputError, UsageError
from seprune.importance import Importance
from seprune.pruning.plan import PruningPlan
from seprune.pruning.rules import rules_to_try
from seprune.recovery import candidates
from seprune.recovery.candidates import TrialOptions, choose_plan, output_error
from seprune.recovery.refit import RefitOptions, refit
from seprune.recovery.refit.network import Refitter

OPTIONS = TrialOptions(images=32, held_out=16, device="cpu")


class Net(nn.Module):
    """Eight channels of which the outputs read the first ones most."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1)
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.relu(self.conv(x)).mean((2, 3)))


def images(count: int, seed: int = 1) -> Tensor:
    return torch.randn(count, 3, 6, 6, generator=torch.Generator().manual_seed(seed))


def batches(count: int) -> list[Tensor]:
    return list(images(count).split(20))


@pytest.fixture(scope="module")
def parent() -> nn.Module:
    torch.manual_seed(0)
    net = Net().eval()
    with torch.no_grad():
        net.head.weight.mul_(torch.tensor([8.0, 4, 2, 1, 0.5, 0.25, 0.125, 0]))
    return net


@pytest.fixture(scope="module")
def plans(parent: nn.Module) -> dict[str, PruningPlan]:
    """Four of eight channels: the last, every other, and the first ones removed."""
    structure = seprune.analyse(parent, images(2))
    scores = {"first": range(8), "alternate": [0, 9, 1, 8, 2, 7, 3, 6], "last": range(8, 0, -1)}
    allocation = seprune.Allocation("uniform", floor=0, min_channels=1)
    return {
        name: seprune.make_plan(
            structure,
            Importance(name, {structure.groups[0].name: torch.tensor([*map(float, values)])}),
            allocation=allocation,
            params=0.55,
        )
        for name, values in scores.items()
    }


def kept(plan: PruningPlan) -> tuple[int, ...]:
    return next(g.keep for g in plan.groups if len(g.keep) < g.units)


def expected(parent: nn.Module, plan: PruningPlan, fit: int, judge: slice) -> float:
    """The error after a refit on the first images, by numpy on others."""
    fitted = RefitOptions(images=fit, device="cpu")
    small = refit(parent, seprune.prune(parent, plan), plan, [images(96)[:fit]], options=fitted)
    with torch.no_grad():
        want, give = (m.eval()(images(96)[judge]).double() for m in (parent, small.model))
    return float(np.square((want - give).numpy()).mean() / want.numpy().var())


def test_the_error_is_relative_to_the_variance_of_all_of_the_parents_values():
    parent, model = nn.Linear(3, 2), nn.Linear(3, 2)
    x = torch.randn(7, 3, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        want, give = parent(x).double().numpy(), model(x).double().numpy()
    found = output_error(parent, model, x.split(3))
    assert found == pytest.approx(np.square(want - give).mean() / want.var(), rel=1e-6)
    assert output_error(parent, parent, [x]) == 0


def test_every_output_tensor_counts_alike():
    class Two(nn.Module):
        def __init__(self, scale: float) -> None:
            super().__init__()
            self.scale = scale

        def forward(self, x: Tensor) -> dict[str, Any]:
            return {"a": x, "b": [x[:, :1] * 1000 * self.scale], "n": len(x)}

    x = torch.randn(50, 4, generator=torch.Generator().manual_seed(3))
    wanted = 0.25 * float((x[:, 0] ** 2).mean() / x[:, 0].var(unbiased=False)) / 2
    assert output_error(Two(1.0), Two(0.5), [x]) == pytest.approx(wanted, rel=1e-5)


def test_the_network_nearest_its_parent_is_kept(parent, plans):
    assert [kept(p) for p in plans.values()] == [(4, 5, 6, 7), (1, 3, 5, 7), (0, 1, 2, 3)]
    choice = choose_plan(parent, plans, batches(96), options=OPTIONS)
    assert choice.name == "last"
    assert choice.plan is plans["last"]
    assert choice.close == ()
    assert [t.name for t in choice.trials] == ["last", "alternate", "first"]
    for trial in choice.trials:  # 32 images fit, the next 16 judge
        wanted = expected(parent, plans[trial.name], 32, slice(32, 48))
        assert trial.error == pytest.approx(wanted, rel=1e-4)
        assert trial.images == 16
        assert trial.seconds > 0
    again = choose_plan(parent, plans, batches(96), options=OPTIONS)
    assert [t.error for t in again.trials] == [t.error for t in choice.trials]
    json.dumps(choice.facts(), allow_nan=False)
    assert "plan of last, of 3 candidates" in str(choice)


def test_what_the_candidates_share_is_computed_once(parent, plans, monkeypatch):
    """The parent runs over the images to fit on once, and once over those that judge."""
    seen: dict[int, int] = {}
    whole = Net.forward

    def counted(self: Net, x: Tensor) -> Tensor:
        if len(self.head.weight[0]) == 8 and len(x) > 2:  # the parent; not a recorded pass
            for image in x:
                number = int((image == images(96)).flatten(1).all(1).nonzero())
                seen[number] = seen.get(number, 0) + 1
        return whole(self, x)

    monkeypatch.setattr(Net, "forward", counted)
    choose_plan(parent, plans, batches(96), options=OPTIONS)
    assert seen == dict.fromkeys(range(48), 1)


def test_a_network_that_is_not_refitted_is_judged_as_it_will_be(parent, plans):
    parent = nn.Sequential(parent.conv, nn.BatchNorm2d(8), nn.Flatten(), nn.Linear(288, 4)).eval()
    structure = seprune.analyse(parent, images(2))
    group = structure.groups[0]
    mine = {
        name: seprune.make_plan(
            structure, Importance(name, {group.name: torch.tensor([*map(float, order)])}),
            allocation=seprune.Allocation("uniform", floor=0, min_channels=1), params=0.55,
        )
        for name, order in {"first": range(8), "last": range(8, 0, -1)}.items()
    }  # fmt: skip
    for recover, start in (("none", 0), ("bn", 32)):
        options = replace(OPTIONS, recover=recover)
        choice = choose_plan(parent, mine, batches(96), options=options)
        for trial in choice.trials:
            small, seen = seprune.prune(parent, mine[trial.name]), images(96)[start:]
            seen = seen[: trial.images]
            if recover == "bn":
                small = seprune.recalibrate(small, [images(96)[:32]], device="cpu")
            with torch.no_grad():
                want, give = (m(seen).double().numpy() for m in (parent, small))
            assert trial.error == pytest.approx(
                np.square(want - give).mean() / want.var(), rel=1e-4
            )
        assert choice.trials[0].error < choice.trials[1].error
    assert TrialOptions.before("reconstruct") == TrialOptions() == TrialOptions.before("refit")
    assert TrialOptions.before("none", device="cpu") == TrialOptions(recover="none", device="cpu")


def test_networks_that_nothing_refits_are_tried_with_other_allocations(parent):
    structure = seprune.analyse(parent, images(2))
    statistics = seprune.collect_statistics(
        parent, batches(20), structure=structure, options=seprune.CollectOptions(device="cpu")
    )
    scoring, own = seprune.Scoring(), seprune.Allocation(floor=0.3, protect=("head",))
    found = rules_to_try(scoring, statistics, own, refits=False)
    ways = ("", ", floor 0.2", ", global")
    names = [f"gate_logit {c}{way}" for way in ways for c in ("joint", "coupled")]
    assert list(found) == names
    assert found[names[0]] == (scoring, own)
    assert found[names[2]][1] == own  # a floor is never lowered
    assert found[names[5]] == (replace(scoring, combine="coupled"), replace(own, scope="global"))
    assert list(rules_to_try(scoring, statistics, own, refits=True)) == names[:2]
    fixed = replace(own, scope="cost_aware")
    assert list(rules_to_try(scoring, statistics, fixed, refits=False)) == names[:2]
    assert list(rules_to_try(seprune.Scoring("l2"), None, own, refits=False)) == ["l2 joint"]


def test_close_candidates_are_judged_on_all_images_that_are_left(parent, plans, monkeypatch):
    monkeypatch.setattr(candidates, "TIE", 1e9)
    choice = choose_plan(parent, plans, batches(96), options=OPTIONS)
    assert {t.images for t in choice.trials} == {64}
    assert choice.trials[0].error == pytest.approx(
        expected(parent, plans["last"], 32, slice(32, 96)), rel=1e-4
    )
    assert sorted(choice.close) == ["alternate", "first"]


def test_equal_plans_are_tried_once(parent, plans):
    twins = {"a": plans["first"], "b": plans["last"], "c": plans["last"]}
    choice = choose_plan(parent, twins, batches(96), options=OPTIONS)
    by_name = {t.name: t for t in choice.trials}
    assert choice.name == "b"
    assert choice.close == ()
    assert by_name["c"] == replace(by_name["b"], name="c", seconds=0.0, same_as="b")
    alone = choose_plan(parent, {"b": plans["last"], "c": plans["last"]}, [], options=OPTIONS)
    assert (alone.name, alone.trials) == ("b", ())  # no image was looked at


def test_of_too_few_images_a_quarter_judges(parent, plans):
    choice = choose_plan(parent, plans, batches(20), options=OPTIONS)
    assert {t.images for t in choice.trials} == {5}
    wanted = expected(parent, plans["last"], 15, slice(15, 20))
    best = next(t for t in choice.trials if t.name == "last")
    assert best.error == pytest.approx(wanted, rel=1e-4)


def test_a_network_whose_outputs_are_not_finite_is_never_chosen(parent, plans, monkeypatch):
    def broken(self: Refitter, pruned: nn.Module, plan: PruningPlan) -> Any:
        made = fitted(self, pruned, plan)
        if kept(plan) == kept(plans["last"]):
            nn.init.constant_(made.model.head.bias, math.inf)
        return made

    fitted = Refitter.__call__
    monkeypatch.setattr(Refitter, "__call__", broken)
    choice = choose_plan(parent, plans, batches(96), options=OPTIONS)
    assert choice.name == "alternate"
    assert choice.trials[-1].error == math.inf
    assert choice.facts()["trials"][-1]["error"] is None


@pytest.mark.parametrize(
    ("loader", "given", "error", "message"),
    [
        (batches(8), False, UsageError, "there are no plans to choose from"),
        (batches(1), True, InputError, "one image cannot both recover a network and judge it"),
    ],
)
def test_what_cannot_be_chosen_from(
    parent: nn.Module,
    plans: dict[str, PruningPlan],
    loader: Iterable[Tensor],
    given: bool,
    error: type[Exception],
    message: str,
):
    with pytest.raises(error, match=message):
        choose_plan(parent, plans if given else {}, loader, options=OPTIONS)


def test_outputs_without_numbers_cannot_be_compared():
    class Classes(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.argmax(1)

    with pytest.raises(InputError, match="the outputs of the two networks cannot be compared"):
        output_error(Classes(), Classes(), [torch.rand(2, 3)])
    with pytest.raises(InputError, match=r"the parent gives .*\(2, 3\).*the other one .*\(2, 5\)"):
        output_error(nn.Identity(), nn.Linear(3, 5), [torch.rand(2, 3)])
