"""Budgets are met, floors are kept, and what cannot be reached is refused with its reason."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from cutting import counted, kept
from nets import SE, Block, Chain, Inner, Residual, dependent, images
from torch import nn

from seprune.errors import InputError, UsageError
from seprune.graph.groups import NetworkStructure, find_structure
from seprune.importance import Importance
from seprune.measure.latency_table import (
    LatencyModel,
    LatencyTable,
    TableKey,
    build_table,
    grid,
)
from seprune.measure.work_items import Operator, work_items
from seprune.pruning.constraints import Allocation
from seprune.pruning.limits import Budget, limits
from seprune.pruning.plan import PruningPlan
from seprune.pruning.prune import prune
from seprune.pruning.removals import Part, Removals
from seprune.pruning.search import Search, make_plan


@cache
def structure_of(width: int = 32) -> NetworkStructure:
    return find_structure(Residual(width), images())


def scores(structure: NetworkStructure, seed: int = 0) -> Importance:
    draw = torch.Generator().manual_seed(seed)
    made = {g.name: torch.rand(g.units, generator=draw).double() for g in structure.groups}
    return Importance("random", made)


def constant(structure: NetworkStructure) -> Importance:
    made = {g.name: torch.ones(g.units, dtype=torch.float64) for g in structure.groups}
    return Importance("constant", made)


FREE = Allocation(floor=0.0, min_channels=1)


# -- the target ------------------------------------------------------------------------------------


@pytest.mark.parametrize("scope", ["global", "isomorphic", "uniform", "cost_aware"])
@pytest.mark.parametrize("kind", ["macs", "params"])
@pytest.mark.parametrize("budget", [0.75, 0.5, 0.25])
def test_a_budget_is_met_within_one_per_cent_by_the_network_actually_cut(scope, kind, budget):
    torch.manual_seed(0)
    model = Residual(64)
    structure = find_structure(model, images())
    plan = make_plan(structure, scores(structure), allocation=Allocation(scope), **{kind: budget})
    small = counted(prune(model, plan), images())
    dense = counted(model, images())
    which = ("macs", "params").index(kind)
    assert budget - 0.01 <= small[which] / dense[which] <= budget
    assert plan.facts["macs"] == [dense[0], small[0]]
    assert plan.facts["params"] == [dense[1], small[1]]
    assert plan.facts["targets"] == {kind: int(budget * dense[which])}
    assert (plan.facts["criterion"], plan.facts["allocation"]) == ("random", scope)
    assert plan.history
    assert all(set(step) == {"ratio", kind} for step in plan.history)


def test_several_budgets_hold_at_once():
    structure = structure_of()
    plan = make_plan(structure, scores(structure), macs=0.6, params=0.4)
    at, whole = kept(plan), structure.full_widths()
    assert structure.macs_at(at) <= 0.6 * structure.macs_at(whole)
    assert structure.params_at(at) <= 0.4 * structure.params_at(whole)
    tight = make_plan(structure, scores(structure), params=0.4)
    assert structure.params_at(kept(tight)) - structure.params_at(at) <= 0.01 * structure.params_at(
        whole
    )


@pytest.mark.parametrize(
    ("budget", "amount"),
    [("1.5M", 1_500_000), ("2m", 2_000_000), ("0.001G", 1_000_000), ("900k", 900_000),
     (1_234_567, 1_234_567)],
)  # fmt: skip
def test_amounts_are_read_as_people_write_them(budget, amount):
    structure = structure_of()
    assert structure.macs_at(structure.full_widths()) > 2_000_000
    assert limits(structure, Budget.parse(macs=budget)) == {"macs": amount}
    plan = make_plan(structure, scores(structure), allocation=FREE, macs=budget)
    # a unit of this small network costs up to 4 %
    assert 0.96 * amount <= structure.macs_at(kept(plan)) <= amount


def test_the_best_scored_units_stay():
    structure = structure_of()
    importance = scores(structure)
    plan = make_plan(structure, importance, allocation=FREE, macs=0.5)
    free = {g.name for g in structure.groups if g.prunable and g.role == "features"}
    for group in plan.groups:
        values = importance.scores[group.name].numpy()
        best = sorted(np.argsort(-values)[: len(group.keep)].tolist())
        assert list(group.keep) == (best if group.name in free else list(range(group.units)))
    gone = [importance.scores[g.name][u] for g in plan.groups if g.name in free
            for u in range(g.units) if u not in g.keep]  # fmt: skip
    stays = [importance.scores[g.name][u] for g in plan.groups if g.name in free for u in g.keep]
    # one ranking over all groups: a single threshold, up to the last units that were given back
    assert sum(float(s) < float(max(gone)) for s in stays) <= len(free)


def test_equal_scores_give_the_same_plan_every_time_and_keep_the_first_channels():
    structure = structure_of()
    plans = [make_plan(structure, constant(structure), macs=0.5).dumps() for _ in range(3)]
    assert plans[0] == plans[1] == plans[2]
    for group in make_plan(structure, constant(structure), macs=0.5).groups:
        assert list(group.keep) == list(range(len(group.keep)))


# -- floors and rounding ---------------------------------------------------------------------------


def test_floors_hold_in_every_group():
    structure = structure_of(64)
    allocation = Allocation(floor=0.25, min_channels=8)
    plan = make_plan(structure, scores(structure), allocation=allocation, macs=0.12)
    assert min(len(g.keep) for g in plan.groups if g.units == 64) >= 16
    low = Allocation(floor=0.0, min_channels=20)
    plan = make_plan(structure, scores(structure), allocation=low, macs=0.2)
    assert min(len(g.keep) for g in plan.groups if g.units == 64) >= 20


@pytest.mark.parametrize("step", [4, 8, 16])
def test_widths_are_rounded(step):
    structure = structure_of(64)
    allocation = Allocation(round_to=step)
    plan = make_plan(structure, scores(structure), allocation=allocation, macs=0.4)
    widths = [b for a, b in plan.widths().values() if a == 64]
    assert all(w % step == 0 for w in widths)
    assert len(widths) == 3
    assert structure.macs_at(kept(plan)) <= 0.4 * structure.macs_at(structure.full_widths())


def test_conv_groups_are_rounded_by_channels_not_by_units():
    model = Chain(nn.Conv2d(32, 32, 3, padding=1, groups=16), width=32)
    structure = find_structure(model, images())
    plan = make_plan(structure, scores(structure), allocation=Allocation(round_to=8), macs=0.55)
    before, after = plan.widths()["a"]
    assert before == 32
    assert after % 8 == 0
    assert len(plan.groups[0].keep) * 2 == after
    small = prune(model, plan, images())
    assert small.middle.groups == after // 2


@pytest.mark.parametrize("width", [16, 24])
def test_by_default_narrow_networks_have_the_multiples_that_meet_the_budget(width):
    structure, given = structure_of(width), scores(structure_of(width))
    allocation = Allocation("cost_aware", floor=0.0, min_channels=1, round_to=None)

    def used(plan: PruningPlan) -> float:
        return plan.facts["macs"][1] / (0.6 * plan.facts["macs"][0])

    assert 0.95 <= used(make_plan(structure, given, allocation=allocation, macs=0.6)) <= 1
    by_8 = dataclasses.replace(allocation, round_to=8)
    with suppress(InputError):  # out of reach, or far from it
        assert used(make_plan(structure, given, allocation=by_8, macs=0.6)) < 0.95


@pytest.mark.parametrize(("width", "multiple"), [(48, 8), (64, 16), (128, 16)])
def test_by_default_wide_groups_are_cut_to_multiples_of_16_and_narrow_ones_of_8(width, multiple):
    structure = structure_of(width)
    search = Search(structure, scores(structure), Allocation(round_to=None), {})
    assert {search.stride(g) for g in structure.groups if g.channels == width} == {multiple}


def test_units_that_leave_hardly_a_rounded_width_are_not_rounded():
    """Two units of four channels between shuffled conv groups: 8 channels are all or nothing."""
    structure = find_structure(dependent("shuffled conv groups"), images())
    rounded = Allocation(floor=0.0, min_channels=1, round_to=8, protect=("a", "middle.two"))
    plan = make_plan(structure, scores(structure), allocation=rounded, macs=0.95)
    assert plan.widths()["middle.one"] == [8, 4]
    with pytest.raises(InputError, match=r"at least 0% and 1 channels, in multiples of 8\. "):
        make_plan(structure, scores(structure), allocation=rounded, macs=0.01)


def test_cost_aware_allocation_weighs_scores_against_what_they_free():
    """A unit of `a` frees 9 x 3 + 5 MACs a position, one of `b` 3 + 5: four times as much."""
    structure = find_structure(dependent("concat"), images())
    free = Allocation("cost_aware", floor=0.0, min_channels=1)

    def widths(a: float, b: float, macs: float) -> list[int]:
        given = {"a": a * torch.ones(6).double(), "b": b * torch.ones(4).double()}
        plan = make_plan(structure, Importance("given", given), allocation=free, macs=macs)
        return [plan.widths()[n][1] for n in ("a", "b")]

    assert widths(1, 1, 0.76) == [4, 4]
    assert widths(1, 0.3, 0.76) == [4, 4]
    assert widths(1, 0.2, 0.76) == [5, 1]  # 0.2 / 8 < 1 / 32: all that may go of b goes first


@pytest.mark.parametrize("budget", [0.8, 0.6, 0.4, 0.2])
@pytest.mark.parametrize("spread", [1.2, 3.0, 30.0])
def test_cost_aware_allocation_loses_little_more_than_the_best_of_all_widths(budget, spread):
    """Two layers in a row, whose costs are a product: every pair of widths is tried."""
    model = nn.Sequential(nn.Conv2d(3, 16, 1), nn.ReLU(), nn.Conv2d(16, 20, 3), nn.ReLU(),
                          nn.Conv2d(20, 3, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten())  # fmt: skip
    structure = find_structure(model, images())
    given = {"0": torch.logspace(0, math.log10(spread), 16).double(),
             "2": 2 * torch.logspace(0, math.log10(2 * spread), 20).double()}  # fmt: skip

    def loss(one: int, two: int) -> float:
        return float(given["0"][: 16 - one].sum() + given["2"][: 20 - two].sum())

    free = Allocation("cost_aware", floor=0.0, min_channels=1)
    plan = make_plan(structure, Importance("given", given), allocation=free, macs=budget)
    whole, limit = structure.full_widths(), budget * structure.macs_at(structure.full_widths())
    best = min(
        loss(one, two)
        for one in range(1, 17)
        for two in range(1, 21)
        if structure.macs_at({**whole, "0": one, "2": two}) <= limit
    )
    assert loss(*(plan.widths()[n][1] for n in ("0", "2"))) <= 1.1 * best


def test_cost_aware_allocation_keeps_multiples_and_floors():
    structure = structure_of(48)
    for budget in (0.7, 0.5, 0.3):
        how = Allocation("cost_aware", floor=0.25, round_to=8)
        plan = make_plan(structure, scores(structure), allocation=how, macs=budget)
        at = kept(plan)
        assert structure.macs_at(at) <= budget * structure.macs_at(structure.full_widths())
        assert all(w % 8 == 0 and w >= 16 for n, (b, w) in plan.widths().items() if b == 48)


@pytest.mark.parametrize(("additive", "scope"), [(True, "cost_aware"), (False, "global")])
def test_scores_that_add_up_are_allocated_by_cost_and_others_ranked_by_default(additive, scope):
    structure = structure_of()
    importance = dataclasses.replace(scores(structure), additive=additive)
    plan = make_plan(structure, importance, macs=0.5)
    assert plan.facts["allocation"] == scope
    explicit = make_plan(structure, importance, allocation=Allocation(scope), macs=0.5)
    assert plan.groups == explicit.groups
    explicit = make_plan(structure, importance, allocation=Allocation("uniform"), macs=0.5)
    assert explicit.facts["allocation"] == "uniform"


@pytest.mark.parametrize(
    ("scope", "fewest"), [("cost_aware", 2), ("sensitivity", 2), ("global", 8)]
)
def test_cost_aware_allocation_may_leave_fewer_channels_than_a_ranking_by_scores_alone(
    scope, fewest
):
    structure = structure_of(16)
    smallest = make_plan(structure, scores(structure), allocation=Allocation(scope), macs=0.9)
    assert all(after >= fewest for b, after in smallest.widths().values() if b == 16)
    with pytest.raises(InputError) as caught:
        make_plan(structure, scores(structure), allocation=Allocation(scope), macs=0.001)
    assert f"at least 10% and {fewest} channels" in caught.value.why
    own = Allocation(scope, min_channels=5)
    assert own.fewest == 5


def test_isomorphic_groups_are_ranked_among_themselves():
    """Two kinds of groups with scores of another size: each kind loses its share."""
    structure = structure_of(32)
    importance = scores(structure)
    for name in ("blocks.0.conv1", "blocks.1.conv1"):
        importance.scores[name].mul_(1000)
    everywhere = make_plan(structure, importance, macs=0.5).widths()
    assert everywhere["blocks.0.conv1"] == [32, 32]  # the global ranking never reaches them
    alike = make_plan(structure, importance, allocation=Allocation("isomorphic"), macs=0.5)
    inner = alike.widths()["blocks.0.conv1"][1] + alike.widths()["blocks.1.conv1"][1]
    stream = alike.widths()["stem"][1]
    assert abs(inner / 64 - stream / 32) < 0.06


def test_uniform_takes_the_same_share_of_every_group():
    structure = structure_of(32)
    importance = scores(structure)
    importance.scores["stem"].mul_(1000)
    plan = make_plan(structure, importance, allocation=Allocation("uniform"), macs=0.5)
    shares = {b / a for a, b in plan.widths().values() if a == 32}
    assert max(shares) - min(shares) <= 1 / 32


# -- what is not pruned ----------------------------------------------------------------------------


def test_protected_layers_stay_whole_and_say_so():
    structure = structure_of()
    allocation = Allocation(protect=("blocks.0.*",))
    plan = make_plan(structure, scores(structure), allocation=allocation, macs=0.7)
    reasons = {g.name: g.reason for g in plan.groups}
    # the stream is made in blocks.0.conv2 as well
    assert reasons["stem"] == reasons["blocks.0.conv1"] == "protected by 'blocks.0.*'"
    assert plan.widths()["stem"] == [32, 32]
    assert plan.widths()["blocks.1.conv1"][1] < 32
    assert reasons["fc"] == "it is an output of the model"


def excited(width: int = 32) -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, width, 3, padding=1), Block(width, SE(width, 16)),
                         nn.Conv2d(width, 4, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten())  # fmt: skip


def test_bottlenecks_are_kept_scaled_or_ranked():
    structure = find_structure(excited(), images())
    found: dict[str, Any] = {}
    for how in ("keep", "scale", "rank"):
        allocation = Allocation(floor=0.0, min_channels=1, bottleneck=how)
        plan = make_plan(structure, scores(structure), allocation=allocation, macs=0.4)
        found[how] = plan.widths()["1.se.fc.0"], plan.widths()["0"], plan
    assert found["keep"][0] == [16, 16]
    reasons = {g.name: g.reason for g in found["keep"][2].groups}
    assert reasons["1.se.fc.0"] == "SE hidden width: kept"
    (_, hidden), (_, stream), plan = found["scale"]
    assert hidden == -(-16 * stream // 32)
    assert {g.name: g.reason for g in plan.groups}["1.se.fc.0"] == (
        "SE hidden width: follows its channels"
    )
    assert found["rank"][0][1] < 16
    assert {g.name: g.reason for g in found["rank"][2].groups}["1.se.fc.0"] is None
    for _, _, plan in found.values():
        prune(excited(), plan, images())


def test_groups_without_a_score_stay_whole():
    structure = structure_of()
    importance = scores(structure)
    importance.scores.pop("stem")  # type: ignore[attr-defined]
    plan = make_plan(structure, importance, macs=0.7)
    assert {g.name: g.reason for g in plan.groups}["stem"] == "it has no score"
    assert plan.widths()["stem"] == [32, 32]


# -- latency ---------------------------------------------------------------------------------------


def test_a_latency_budget_asks_the_device():
    structure = structure_of()
    asked = []

    def measure(plan: PruningPlan) -> float:
        asked.append(kept(plan))
        return structure.macs_at(kept(plan)) / 1e9 + 0.0001  # with a part that no cut removes

    plan = make_plan(structure, scores(structure), measure=measure, latency=0.6)
    whole = measure(make_whole(structure))
    assert measure(plan) <= 0.6 * whole
    assert measure(plan) >= 0.5 * whole
    assert len(asked) < 20
    assert [set(step) for step in plan.history] == [{"ratio", "latency"}] * 9
    assert plan.facts["latency"] == {
        "budget": pytest.approx(0.6),
        "reached": pytest.approx(measure(plan) / whole),
        "ms": [whole, measure(plan)],
    }


@pytest.mark.parametrize(("latency", "tightest"), [(0.9, "macs"), (0.4, "latency")])
def test_a_latency_budget_beside_another_one(latency, tightest):
    """The slower of the two decides; giving back units for one never breaks the other."""
    structure = structure_of()

    def measure(plan: PruningPlan) -> float:
        return float(structure.macs_at(kept(plan)))

    plan = make_plan(structure, scores(structure), measure=measure, macs=0.7, latency=latency)
    reached = measure(plan) / structure.macs_at(structure.full_widths())
    assert plan.facts["latency"]["reached"] == reached <= latency
    budget = {"macs": 0.7, "latency": latency}[tightest]
    assert 0.9 * budget <= reached <= budget


@cache
def a_model() -> LatencyModel:
    """Times in tiles of 8 channels, for every width of a residual network's convolutions."""
    items = work_items(Residual(32), structure_of(), images())

    def timer(operator: Operator) -> float:
        tiles = math.ceil(operator.inputs / 8) * math.ceil(operator.outputs / 8)
        return tiles * operator.size[0] * operator.size[1] * 1e-4

    key = TableKey("a processor", "eager", "1", 1, 1)
    return LatencyModel(items, build_table(LatencyTable(key), grid(items), timer))


def longer_than_the_model(asked: list[dict[str, int]]) -> Callable[[PruningPlan], float]:
    """A measurement of 1.2 times the model's time and some more; notes the widths in `asked`."""

    def measure(plan: PruningPlan) -> float:
        asked.append(kept(plan))
        return 1.2 * a_model().at(kept(plan)) + 0.05

    return measure


@pytest.mark.parametrize(
    ("share", "allocation"),
    [(0.7, Allocation()), (0.5, Allocation("cost_aware", min_channels=2))],
)
def test_a_model_of_time_meets_the_budget_with_few_measurements(share, allocation):
    structure, asked = structure_of(), []
    measure = longer_than_the_model(asked)
    full = measure(make_whole(structure))
    asked.clear()
    plan = make_plan(structure, scores(structure), allocation=allocation, measure=measure,
                     times=a_model(), latency=share)  # fmt: skip
    assert len(asked) <= 8
    assert 0.97 * share * full <= measure(plan) <= share * full
    facts, model = plan.facts["latency"], a_model()
    assert facts["reached"] == pytest.approx(measure(plan) / full)
    assert facts["predicted"] == pytest.approx(
        model.at(kept(plan)) / model.at(kept(make_whole(structure)))
    )
    assert "note" not in facts
    table = replace(model.table, note="a table of another machine: measured anew")
    model = LatencyModel(model.items, table)
    again = make_plan(structure, scores(structure), allocation=allocation, measure=measure,
                      times=model, latency=share)  # fmt: skip
    assert again.facts["latency"]["note"] == "a table of another machine: measured anew"


def test_a_model_of_time_meets_a_budget_in_milliseconds_and_one_in_macs_as_well():
    structure = structure_of()
    measure = longer_than_the_model([])
    full = measure(make_whole(structure))
    both = make_plan(structure, scores(structure), measure=measure, times=a_model(),
                     latency=f"{0.5 * full}ms", macs=0.4)  # fmt: skip
    assert structure.macs_at(kept(both)) <= 0.4 * structure.macs_at(structure.full_widths())
    assert measure(both) <= 0.5 * full


@pytest.mark.parametrize(("loss", "left_out"), [(1e-9, True), (1e9, False)])
def test_a_budget_in_time_takes_out_the_parts_that_lose_less_than_channels(loss, left_out):
    """Half of the blocks' time goes with one of them, and a MACs budget asks for no part."""
    structure, parts = structure_of(), (Part("block blocks.1", "blocks.1", loss),)
    given = replace(scores(structure), additive=True)

    def measure(plan: PruningPlan) -> float:
        gone = {f"block {name}": 0 for name in plan.removed.modules}
        with_part = a_model().with_parts({"block blocks.1": "blocks.1"})
        return with_part.at({**kept(plan), **gone})

    allocation = Allocation("cost_aware", min_channels=2, parts=parts)
    plan = make_plan(structure, given, allocation=allocation, measure=measure,
                     times=a_model(), latency=0.6)  # fmt: skip
    assert plan.removed == Removals(blocks=("blocks.1",) if left_out else ())
    assert measure(plan) <= 0.6 * measure(make_whole(structure))
    small = prune(Residual(32), plan, images())
    assert plan.facts["macs"][1] == counted(small, images())[0]
    assert plan.facts["params"][1] == counted(small, images())[1]
    assert not make_plan(structure, given, allocation=allocation, macs=0.5).removed
    other = make_plan(structure, scores(structure), allocation=allocation, measure=measure,
                      times=a_model(), latency=0.6)  # fmt: skip
    assert not other.removed  # of scores that do not add up


def test_a_model_of_time_says_what_can_be_had():
    structure = structure_of()
    with pytest.raises(InputError, match=r"latency can go down to 1.000 of all \(1 ms\), "
                       r"the budget is 0.5 \(0.5 ms\)"):  # fmt: skip
        make_plan(structure, scores(structure), measure=lambda plan: 1.0,
                  times=a_model(), latency=0.5)  # fmt: skip


def make_whole(structure: NetworkStructure) -> PruningPlan:
    from seprune.pruning.plan import plan_of

    return plan_of(structure.groups, {}, {})


def test_a_latency_budget_that_no_cut_reaches_says_what_can_be_had():
    structure = structure_of()
    with pytest.raises(InputError) as caught:
        make_plan(structure, scores(structure), measure=lambda plan: 1.0, latency=0.5)
    assert caught.value.what == (
        "the budget cannot be met: latency can go down to 1.000 of all (1 ms), "
        "the budget is 0.5 (0.5 ms)"
    )
    assert caught.value.why.startswith("every group keeps at least 10% and 8 channels. ")
    assert "fc (it is an output of the model)" in caught.value.why
    with pytest.raises(UsageError, match="a latency budget needs a device to measure on"):
        make_plan(structure, scores(structure), latency=0.5)


# -- what cannot be done ---------------------------------------------------------------------------


def test_a_budget_out_of_reach_names_the_minimum_and_what_stands_in_the_way():
    structure = structure_of()
    allocation = Allocation(floor=0.5, min_channels=8, protect=("stem",))
    with pytest.raises(InputError) as caught:
        make_plan(structure, scores(structure), allocation=allocation, macs=0.1)
    whole = structure.macs_at(structure.full_widths())
    least = structure.macs_at(
        structure.full_widths() | {"blocks.0.conv1": 16, "blocks.1.conv1": 16}
    )
    assert caught.value.what == (
        f"the budget cannot be met: macs can go down to {least:,} ({least / whole:.3f} of all), "
        f"the budget is {int(0.1 * whole):,} (0.100)"
    )
    assert caught.value.why.startswith("every group keeps at least 50% and 8 channels. ")
    assert "stem (protected by 'stem')" in caught.value.why
    assert "fc (it is an output of the model)" in caught.value.why
    assert caught.value.fix == "choose a larger budget, or lower plan.floor and plan.min_channels"
    assert (caught.value.code, caught.value.exit_status) == ("budget", 3)
    # and what it names can be had
    plan = make_plan(structure, scores(structure), allocation=allocation, macs=least)
    assert structure.macs_at(kept(plan)) == least


@pytest.mark.parametrize("budget", [0, 0.0, 1, 1.0, 1.5])
def test_a_fraction_is_between_0_and_1(budget):
    structure = structure_of()
    with pytest.raises(InputError) as caught:
        make_plan(structure, scores(structure), macs=budget)
    assert caught.value.what == f"budget macs={budget} is no fraction between 0 and 1"
    assert caught.value.fix == "macs=0.5 keeps half; an amount is written macs=1.0G"


@pytest.mark.parametrize("budget", ["half", "G", "xM", "nan", "-1G", -0.5, float("inf")])
def test_a_budget_is_a_number(budget):
    structure = structure_of()
    with pytest.raises(UsageError) as caught:
        make_plan(structure, scores(structure), macs=budget)
    assert caught.value.what == f"budget macs={budget} is not a number"


def test_a_model_that_is_already_below_its_budget_is_named():
    structure = structure_of()
    whole = structure.macs_at(structure.full_widths())
    for budget in (whole, "1.0G"):
        with pytest.raises(InputError) as caught:
            make_plan(structure, scores(structure), macs=budget)
        assert caught.value.what == f"budget macs={budget} is met without a cut"
        assert caught.value.why == f"the network has {whole:,} macs"


def test_unknown_and_missing_budgets():
    structure = structure_of()
    with pytest.raises(UsageError) as caught:
        make_plan(structure, scores(structure), flops=0.5)
    assert str(caught.value) == (
        "unknown budget 'flops'\n"
        "why: budgets are macs, params, latency\n"
        "next: give for example macs=0.5"
    )
    with pytest.raises(UsageError, match="no budget is given"):
        make_plan(structure, scores(structure))


def test_a_group_that_nothing_can_be_taken_from_is_no_trouble():
    structure = find_structure(Inner(), images())
    plan = make_plan(structure, scores(structure), macs=0.9)
    assert plan.widths()["stem"] == [6, 6]  # fewer than the floor of 8
    assert plan.widths()["expand"][1] < 12
