"""Scores against closed forms, against finite differences, and against a change of order."""

from __future__ import annotations

import copy
import itertools
from typing import Any

import pytest
import torch
from nets import Chain, Inner, LayerScale, Residual, dependent, images
from torch import Tensor, nn

from seprune.errors import InputError, SepruneError, UsageError
from seprune.graph.groups import ChannelGroup, NetworkStructure, find_structure
from seprune.importance import CRITERIA, Scoring, criterion, score
from seprune.importance.alternatives import alternatives
from seprune.importance.joint import correlation, effects_in_order, joint_scores
from seprune.importance.propagate import propagate
from seprune.pruning.constraints import Allocation
from seprune.pruning.search import make_plan
from seprune.statistics import CollectOptions, GateStatistics, collect_statistics
from seprune.statistics.gate_gradients import image_keys, normal


def plain(model: nn.Module, name: str, **how: Any) -> dict[str, Tensor]:
    """Scores of a weight criterion as they are, not normalised."""
    structure = find_structure(model, images())
    scoring = Scoring(name, normalize="none", **how)
    return dict(score(structure, model=model, scoring=scoring).scores)


def batches(count: int = 6, dtype: torch.dtype = torch.float32) -> list[tuple[Tensor, Tensor]]:
    x = images(count, 8, seed=5).to(dtype)
    return [(x[:4], torch.tensor([0, 1, 2, 0])), (x[4:], torch.tensor([1, 2]))]


def collected(
    model: nn.Module, gradients: Any = "none", dtype: torch.dtype = torch.float32
) -> tuple[NetworkStructure, GateStatistics]:
    structure = find_structure(model, images(2, 8).to(dtype))
    options = CollectOptions(device="cpu")
    loader = batches(dtype=dtype)
    statistics = collect_statistics(
        model, loader, structure=structure, gradients=gradients, options=options
    )
    return structure, statistics


# -- closed forms of the weights -------------------------------------------------------------------


def test_l1_and_l2_are_means_over_the_layers_of_the_group():
    model = dependent("concat")
    a, c = model.a.weight.detach().double(), model.c.weight.detach().double()
    l1, l2 = plain(model, "l1")["a"], plain(model, "l2")["a"]
    into, gamma = c[:, :6].flatten(2).sum(2), model.norm.weight.detach().double()[:6]  # 1x1
    parts = a.abs().sum((1, 2, 3)) + into.abs().sum(0) + gamma.abs()
    torch.testing.assert_close(l1, parts / 3)
    parts = a.square().sum((1, 2, 3)) + into.square().sum(0) + gamma.square()
    torch.testing.assert_close(l2, parts / 3)


def test_units_of_several_channels_add_up():
    model = dependent("whole conv groups")  # unit u is conv group u
    a, middle = model.a.weight.detach().double(), model.middle.weight.detach().double()
    b = model.b.weight.detach().double().flatten(1)
    own = [slice(2 * u, 2 * u + 2) for u in range(4)]
    expected = torch.stack([
        (a[s].square().sum() + 2 * middle[s].square().sum() + b[:, s].square().sum()) / 4
        for s in own
    ])  # fmt: skip
    torch.testing.assert_close(plain(model, "l2")["a"], expected)


def test_flattened_channels_count_at_every_position():
    model = dependent("flatten")
    conv, fc = model.conv.weight.detach().double(), model.fc.weight.detach().double()
    expected = (conv.square().sum((1, 2, 3)) + fc.view(8, 6, 16).square().sum((0, 2))) / 2
    torch.testing.assert_close(plain(model, "l2")["conv"], expected)


def test_bare_parameters_and_transposed_convolutions_have_norms_too():
    bare = dependent("bare")
    kernel, matrix = (p.detach().double() for p in (bare.middle.kernel, bare.middle.matrix))
    expected = (kernel.square().sum((1, 2, 3)) + matrix.square().sum(0)) / 2
    torch.testing.assert_close(plain(bare, "l2")["middle.kernel"], expected)
    model = dependent("transposed")
    up, b = model.middle.up.weight.detach().double(), model.b.weight.detach().double()
    expected = (up.square().sum((0, 2, 3)) + b.square().sum((0, 2, 3))) / 2
    torch.testing.assert_close(plain(model, "l2")["middle.up"], expected)


def test_bn_scale_is_the_mean_of_gamma_and_nothing_without_a_norm():
    model = dependent("residual")
    found = plain(model, "bn_scale")
    one, two = (model.blocks[i].bn2.weight.detach().double().abs() for i in range(2))
    torch.testing.assert_close(found["stem"], (one + two) / 2)
    torch.testing.assert_close(
        found["blocks.0.conv1"], model.blocks[0].bn1.weight.detach().double().abs()
    )
    assert "blocks.0.se.fc.0" not in found
    assert "fc" not in found


def test_lamp_is_a_norm_over_those_that_are_not_smaller():
    model = dependent("concat")
    l2, lamp = plain(model, "l2")["a"], plain(model, "lamp")["a"]
    expected = torch.stack([v / l2[l2 >= v].sum() for v in l2])
    torch.testing.assert_close(lamp, expected)
    assert lamp.max() == 1


def torch_prunings(kind: str) -> tuple[nn.Module, dict[str, Any]]:
    """The network, and torch-pruning's group of each of the layers that we compare."""
    import torch_pruning as tp

    model = dependent(kind)
    layers = {"residual": ["stem", "blocks.0.conv1"], "concat": ["a", "b"], "flatten": ["conv"],
              "batch norm": ["a", "b"]}[kind]  # fmt: skip
    graph = tp.DependencyGraph().build_dependency(model, images())
    found = {}
    for name in layers:
        layer: Any = model.get_submodule(name)
        channels = list(range(layer.out_channels))
        found[name] = graph.get_pruning_group(layer, tp.prune_conv_out_channels, channels)
    return model, found


@pytest.mark.parametrize("kind", ["residual", "concat", "flatten", "batch norm"])
def test_weight_baselines_are_those_of_torch_pruning(kind):
    import torch_pruning as tp

    theirs = {
        "l1": tp.importance.GroupMagnitudeImportance(p=1, normalizer=None),
        "l2": tp.importance.GroupMagnitudeImportance(p=2, normalizer=None),
        "bn_scale": tp.importance.BNScaleImportance(normalizer=None),
        "lamp": tp.importance.LAMPImportance(),
        "fpgm": tp.importance.FPGMImportance(normalizer=None),
    }
    model, groups = torch_prunings(kind)
    if kind == "flatten":
        del theirs["fpgm"]  # it compares single positions; here a unit is one vector
    for name, importance in theirs.items():
        found = plain(model, name)
        for layer, group in groups.items():
            expected = importance(group)
            if expected is None:  # no norm
                assert layer not in found
            else:
                torch.testing.assert_close(
                    found[layer].float(), expected.detach(), rtol=1e-4, atol=1e-5
                )


@pytest.mark.parametrize("kind", ["residual", "concat", "batch norm"])
def test_taylor_is_torch_prunings_of_the_whole_calibration_set(kind):
    import torch_pruning as tp

    model, groups = torch_prunings(kind)
    structure, statistics = collected(model, "weights")
    scoring = Scoring("taylor", normalize="none")
    found = score(structure, statistics, model=model, scoring=scoring).scores
    model.zero_grad()
    x, y = (torch.cat(part) for part in zip(*batches()))
    torch.nn.functional.cross_entropy(model(x), y).backward()
    for layer, group in groups.items():
        expected = tp.importance.GroupTaylorImportance(normalizer=None)(group)
        torch.testing.assert_close(found[layer].float(), expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("kind", ["residual", "concat", "batch norm"])
def test_hessian_is_torch_prunings_mean_over_images(kind):
    """Image by image: their `accumulate_grad` keeps the last image alone (1.6.1)."""
    import torch_pruning as tp

    model, groups = torch_prunings(kind)
    structure, statistics = collected(model, "weights")
    scoring = Scoring("hessian", normalize="none")
    found = score(structure, statistics, model=model, scoring=scoring).scores
    x, y = (torch.cat(part) for part in zip(*batches()))
    expected = {layer: torch.zeros(len(found[layer])) for layer in groups}
    for i in range(len(x)):
        theirs = tp.importance.GroupHessianImportance(normalizer=None)
        model.zero_grad()
        torch.nn.functional.cross_entropy(model(x[i : i + 1]), y[i : i + 1]).backward()
        theirs.accumulate_grad(model)
        for layer, group in groups.items():
            expected[layer] += theirs(group) / len(x)
    for layer, value in expected.items():
        torch.testing.assert_close(found[layer].float(), value, rtol=1e-4, atol=1e-8)


def test_depthwise_weights_do_not_count():
    model = dependent("depthwise")
    a, b = (m.weight.detach().double() for m in (model.a, model.b))
    expected = (a.square().sum((1, 2, 3)) + b.square().sum((0, 2, 3))) / 2
    torch.testing.assert_close(plain(model, "l2")["a"], expected)


def test_uniform_scores_take_the_same_share_of_every_group():
    model = dependent("residual")
    structure = find_structure(model, images())
    scores = score(structure, model=model, scoring=Scoring("uniform"))
    plan = make_plan(structure, scores, allocation=Allocation(min_channels=1), macs=0.5)
    kept = [list(g.keep) for g in plan.groups if g.reason is None and g.units == 8]
    assert len(kept) == 3
    assert max(map(len, kept)) - min(map(len, kept)) <= 1  # what is left of the budget
    assert all(keep == list(range(len(keep))) for keep in kept)


def test_squared_effects_alone_add_up():
    model = dependent("residual")
    structure = find_structure(model, images())
    found = {}
    for gradients in ("logits", "labels"):
        batches = [(images(), torch.tensor([0, 1]))]
        found[gradients] = collect_statistics(
            model, batches, structure=structure, gradients=gradients
        )

    def additive(name: str, **how: Any) -> bool:
        statistics = found.get(CRITERIA[name].gradients)
        return score(structure, statistics, model=model, scoring=Scoring(name, **how)).additive

    assert additive("gate_logit")
    assert additive("gate_fisher", combine="mean")
    assert additive("gate_mean_measured")
    assert not additive("gate_logit", normalize="mean")
    assert not additive("gate_taylor")  # of absolute values
    assert not additive("l2", normalize="none")


def test_random_depends_on_the_seed_and_the_name_alone():
    one, two = plain(dependent("residual"), "random"), plain(dependent("residual", 9), "random")
    assert all(torch.equal(one[n], two[n]) for n in one)
    other = plain(dependent("residual"), "random", seed=1)
    assert not torch.equal(one["stem"], other["stem"])
    assert not torch.equal(one["stem"], one["blocks.0.conv1"])


def test_a_bare_scale_alone_says_nothing():
    model = Chain(LayerScale())
    assert plain(model, "l2")["a"].shape == (8,)


@pytest.mark.parametrize(
    ("how", "expected"),
    [("none", [1.0, 3.0, 2.0, 2.0]), ("mean", [0.5, 1.5, 1.0, 1.0]),
     ("max", [1 / 3, 1.0, 2 / 3, 2 / 3]), ("sum", [0.125, 0.375, 0.25, 0.25]),
     ("standard", [-(2**0.5), 2**0.5, 0.0, 0.0]), ("rank", [0.0, 0.75, 0.25, 0.5])],
)  # fmt: skip
def test_scores_are_normalised_within_their_group(how, expected):
    from seprune.importance.criteria import _normalized

    made = _normalized(torch.tensor([1.0, 3.0, 2.0, 2.0], dtype=torch.float64), how)
    torch.testing.assert_close(made, torch.tensor(expected, dtype=torch.float64))


# -- gates -----------------------------------------------------------------------------------------


def gates_of(model: Residual) -> list[Tensor]:
    """The gates of both blocks for all images, (n, C), written out by hand."""
    seen: list[Tensor] = []
    hooks = [b.se.fc.register_forward_hook(lambda m, i, o: seen.append(o)) for b in model.blocks]
    with torch.no_grad():
        model.eval()(torch.cat([x for x, _ in batches()]))
    for hook in hooks:
        hook.remove()
    return [s.double() for s in seen]


def test_gate_bn_is_the_gate_times_the_scale_of_the_norm_before_it():
    model = dependent("residual")
    structure, statistics = collected(model)
    scoring = Scoring("gate_bn", combine="sum", ungated="none", normalize="none")
    found = score(structure, statistics, model=model, scoring=scoring).scores
    gammas = [b.bn2.weight.detach().double().abs() for b in model.blocks]
    expected = sum(g.mean(0) * gamma for g, gamma in zip(gates_of(model), gammas))
    torch.testing.assert_close(found["stem"], expected, rtol=1e-6, atol=0)
    without = dependent("inner")  # no norm before its gate
    structure, statistics = collected(without)
    made = [
        score(structure, statistics, model=without, scoring=Scoring(name, ungated="none")).scores
        for name in ("gate_bn", "gate_mean")
    ]
    torch.testing.assert_close(made[0]["expand"], made[1]["expand"])


@pytest.mark.parametrize("combine", ["mean", "max", "sum"])
def test_gate_means_of_a_shared_group_are_combined(combine):
    model = dependent("residual")
    structure, statistics = collected(model)
    scoring = Scoring("gate_mean", combine=combine, ungated="none", normalize="none")
    found = score(structure, statistics, scoring=scoring).scores
    means = torch.stack([g.mean(0) for g in gates_of(model)])
    expected = {"mean": means.mean(0), "max": means.max(0).values, "sum": means.sum(0)}[combine]
    assert set(found) == {"stem"}  # no gate scales any other group
    torch.testing.assert_close(found["stem"], expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize(
    ("name", "of"),
    [
        ("gate_max", lambda g: g.max(0).values),
        ("gate_std", lambda g: g.std(0, correction=0)),
        ("gate_class", lambda g: torch.stack([g[[0, 3]].mean(0), g[[1, 4]].mean(0),
                                              g[[2, 5]].mean(0)]).max(0).values),
    ],
)  # fmt: skip
def test_other_gate_statistics(name, of):
    model = dependent("residual")
    structure, statistics = collected(model)
    scoring = Scoring(name, combine="mean", ungated="none", normalize="none")
    found = score(structure, statistics, scoring=scoring).scores["stem"]
    expected = torch.stack([of(g) for g in gates_of(model)]).mean(0)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-7)


def test_propagation_worked_out_by_hand():
    """s_c = sum_o |W_oc| s_o / mean(s), from the last group back to the first."""
    model = nn.Sequential(nn.Conv2d(3, 2, 1), nn.ReLU(), nn.Conv2d(2, 3, 1), nn.ReLU(),
                          nn.Conv2d(3, 2, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten())  # fmt: skip
    with torch.no_grad():
        model[2].weight.copy_(torch.tensor([[1.0, -2], [0, 3], [-4, 0]])[..., None, None])
        model[4].weight.copy_(torch.tensor([[1.0, 0, 2], [1, -5, 0]])[..., None, None])
    structure = find_structure(model, images())
    given = propagate(model, structure, {"2": torch.tensor([1.0, 2, 3], dtype=torch.float64)})
    # mean 2: 0.5, 1, 1.5 -> |1| 0.5 + |-4| 1.5 and |-2| 0.5 + |3| 1
    assert given["0"].tolist() == [6.5, 4.0]
    assert given["2"].tolist() == [1, 2, 3]
    # nothing known but the outputs, which count 1 each: 2, 5, 2 and then with mean 3
    alone = propagate(model, structure, {})
    assert alone["2"].tolist() == [2, 5, 2]
    torch.testing.assert_close(
        alone["0"], torch.tensor([2 / 3 + 4 * 2 / 3, 2 * 2 / 3 + 3 * 5 / 3], dtype=torch.float64)
    )


def test_propagation_through_conv_groups_reads_their_own_rows_only():
    model = dependent("within conv groups")
    structure = find_structure(model, images())
    after = torch.arange(1, 7, dtype=torch.float64)  # of 6 units: channels u and u + 6
    found = propagate(model, structure, {"middle": after})["a"]
    weight = model.middle.weight.detach().double().abs().sum((2, 3))  # (12, 4)
    out = torch.cat([after, after]) / after.mean()
    first, second = weight[:6].T @ out[:6], weight[6:].T @ out[6:]
    torch.testing.assert_close(found, first + second)  # unit u: channels u and u + 4


def test_gates_reach_ungated_groups_through_the_weights():
    model = dependent("inner")
    structure, statistics = collected(model)
    scoring = Scoring("gate_mean", ungated="propagate", normalize="none")
    found = score(structure, statistics, model=model, scoring=scoring).scores
    gate = found["expand"] / found["expand"].mean()
    stem = model.expand.weight.detach().double().abs().sum((2, 3)).T @ gate
    stem += model.fc.weight.detach().double().abs().sum(0)
    torch.testing.assert_close(found["stem"], stem, rtol=1e-6, atol=0)


# -- gate values that order, effects that measure --------------------------------------------------


def test_effects_in_the_order_of_other_scores_by_hand():
    rank = torch.tensor([3.0, 1.0, 2.0])  # unit 1 leaves first, then 2, then 0
    squares = torch.tensor([1.0, 4.0, 9.0])
    alone = effects_in_order(rank, squares, 0.0)
    torch.testing.assert_close(alone, torch.tensor([5.0, 4.0, 5.0]).double())  # 9 and 1 pooled
    joint = effects_in_order(rank, squares, 1.0)  # 4, 9 + 2*3*2, 1 + 2*1*5
    torch.testing.assert_close(joint, torch.tensor([16.0, 4.0, 16.0]).double())
    assert alone.argsort().tolist() == joint.argsort().tolist() == [1, 2, 0]


def test_effects_are_the_isotonic_regression_of_what_units_add():
    draw = torch.Generator().manual_seed(0)
    rank, squares = torch.rand(9, generator=draw), torch.rand(9, generator=draw).double()
    order = rank.argsort().tolist()
    root = squares.sqrt()
    sums = [0.0]
    for u in order:  # (1 - r) sum of squares + r (sum of roots)^2 over those that have left
        gone = order[: order.index(u) + 1]
        sums.append(float(0.7 * squares[gone].sum() + 0.3 * root[gone].sum() ** 2))
    added = [b - a for a, b in itertools.pairwise(sums)]
    expected = [  # the max-min formula
        max(min(sum(added[a : b + 1]) / (b + 1 - a) for b in range(i, 9)) for a in range(i + 1))
        for i in range(9)
    ]
    found = effects_in_order(rank, squares, 0.3)
    torch.testing.assert_close(found[order], torch.tensor(expected, dtype=torch.float64))
    assert found.argsort().tolist() == order


@pytest.mark.parametrize("kind", ["inner", "residual"])
def test_gate_means_order_units_and_their_measured_effects_add_up(kind):
    model = dependent(kind)
    structure, statistics = collected(model, "logits")
    plain_means = score(structure, statistics, model=model, scoring=Scoring("gate_mean")).scores
    found = score(structure, statistics, model=model, scoring=Scoring("gate_mean_measured"))
    assert found.additive
    assert set(found.scores) == set(statistics.groups)
    for name, own in statistics.groups.items():
        made, squares = found.scores[name], own["effect_square"]
        ranks = plain_means[name][made.argsort()]
        assert torch.equal(ranks, ranks.sort().values)
        r = correlation(squares, own["effect_sum_square"])
        total = (1 - r) * squares.sum() + r * squares.sqrt().sum() ** 2
        torch.testing.assert_close(made.sum(), total)


def test_without_the_model_ungated_groups_keep_the_order_of_their_effects():
    structure, statistics = collected(dependent("inner"), "logits")
    scoring = Scoring("gate_mean_measured", "coupled")
    found = score(structure, statistics, scoring=scoring).scores
    gated = {g.name for g in structure.groups if g.gates}
    for name, own in statistics.groups.items():
        squares = own["effect_square"]
        torch.testing.assert_close(found[name].sum(), squares.sum())
        assert torch.equal(found[name], squares) == (name not in gated)


def test_alternatives_to_a_scoring_need_what_the_statistics_have():
    _, with_logits = collected(dependent("inner"), "logits")
    _, with_labels = collected(dependent("inner"), "labels")
    ways = alternatives(Scoring("gate_logit", seed=3), with_logits)
    assert list(ways) == [
        "gate_logit joint",
        "gate_logit coupled",
        "gate_mean_measured joint",
        "gate_mean_measured coupled",
    ]
    assert ways["gate_mean_measured coupled"] == Scoring("gate_mean_measured", "coupled", seed=3)
    fisher = alternatives(Scoring("gate_fisher", "mean"), with_labels)
    assert list(fisher) == ["gate_fisher mean", "gate_fisher joint", "gate_fisher coupled"]
    for alone in (Scoring("l2"), Scoring("gate_taylor"), Scoring("gate_logit", normalize="mean")):
        assert list(alternatives(alone, with_logits).values()) == [alone]
    assert len(alternatives(Scoring("gate_logit"), None)) == 1


# -- effects ---------------------------------------------------------------------------------------


def by_differences(model: nn.Module, group: ChannelGroup, x: Tensor, logits_v: Tensor) -> Tensor:
    """E[(d z.v / dm)^2] for a mask m on each unit at all of the group's sources at once."""
    modules = dict(model.named_modules())
    step, found = 1e-5, []

    def z(unit: int, mask: float) -> Tensor:
        def scale(source: Any) -> Any:
            def hook(_m: nn.Module, _i: Any, output: Tensor) -> Tensor:
                factor = torch.ones(output.shape[1], dtype=output.dtype)
                factor[source.index[unit].tolist()] = mask
                return output * factor.view(1, -1, *[1] * (output.dim() - 2))

            return hook

        hooks = [modules[s.name].register_forward_hook(scale(s)) for s in group.sources]
        with torch.no_grad():
            answer = (model(x) * logits_v).sum(1)
        for hook in hooks:
            hook.remove()
        return answer

    for unit in range(group.units):
        slope = (z(unit, 1 + step) - z(unit, 1 - step)) / (2 * step)
        found.append(slope.square().mean())
    return torch.stack(found)


@pytest.mark.parametrize("kind", ["residual", "inner", "flatten", "whole conv groups", "depthwise"])
def test_gate_logit_is_the_squared_slope_of_a_mask_on_the_whole_group(kind):
    model = dependent(kind).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.5)  # away from gates of 1/2
    if kind in ("residual", "inner"):
        structure, statistics = collected(model, "logits", torch.float64)
    else:  # no gate of its own: put one beside
        model = Beside(model).double()
        structure, statistics = collected(model, "logits", torch.float64)
    coupled = Scoring("gate_logit", combine="coupled")
    found = score(structure, statistics, scoring=coupled).scores
    x = torch.cat([images for images, _ in batches(dtype=torch.float64)])
    v = normal(image_keys(x, 0), model(x).shape[1])
    checked = [g for g in structure.groups if g.prunable and g.role == "features"]
    assert checked
    for group in checked:
        expected = by_differences(model, group, x, v)
        torch.testing.assert_close(found[group.name], expected, rtol=1e-4, atol=1e-12)


class Beside(nn.Module):
    """A network without gates beside one that has some."""

    def __init__(self, one: nn.Module) -> None:
        super().__init__()
        self.one, self.two = one, Inner().eval()

    def forward(self, x: Tensor) -> Tensor:
        return self.one(x) + self.two(x)


def test_coupled_scores_are_not_sums_of_single_ones():
    """A channel whose parts cancel is worth nothing, however loud each of them is."""
    structure, statistics = collected(dependent("residual"), "logits")
    coupled = score(structure, statistics, scoring=Scoring(combine="coupled")).scores["stem"]
    summed = score(structure, statistics, scoring=Scoring(combine="sum")).scores["stem"]
    assert not torch.allclose(coupled, summed, rtol=1e-2)
    parts = [statistics.units["stem"], *(statistics.values[f"blocks.{i}.se"] for i in range(2))]
    by_hand = torch.stack([p["effect_square"] for p in parts])
    torch.testing.assert_close(summed, by_hand.sum(0))
    highest = score(structure, statistics, scoring=Scoring(combine="max")).scores["stem"]
    torch.testing.assert_close(highest, by_hand.max(0).values)


def test_joint_scores_add_up_to_what_all_units_lose_together():
    """E[(sum of u)^2] over the whole group, from single images' u."""
    structure, statistics = collected(dependent("residual"), "logits")
    own = statistics.groups["stem"]
    everything = {"all": [(n, torch.zeros(8).long()) for n in ("blocks.0.se", "blocks.1.se")]}
    everything["all"].append(("stem", torch.zeros(8).long()))
    options = CollectOptions(device="cpu", units=("stem",), couplings=everything)
    together = collect_statistics(
        dependent("residual"), batches(), gradients="logits", options=options
    )
    all_at_once = together.groups["all"]["effect_square"]
    torch.testing.assert_close(own["effect_sum_square"], all_at_once, rtol=1e-9, atol=1e-18)
    joint = score(structure, statistics).scores["stem"]
    coupled = score(structure, statistics, scoring=Scoring(combine="coupled")).scores["stem"]
    assert torch.equal(joint.argsort(), coupled.argsort())
    alone, root = coupled.sum(), coupled.sqrt().sum() ** 2
    assert alone < all_at_once < root  # they do correlate, and not wholly
    torch.testing.assert_close(joint.sum()[None], all_at_once, rtol=1e-9, atol=1e-18)


@pytest.mark.parametrize(
    ("whole", "expected"),
    [
        # s = 9, 1, 4, 1, roots 3, 1, 2, 1; leaving in the order 3, 1, 2, 0; (3+1+2+1)^2 = 49
        (15, [9, 1, 4, 1]),  # uncorrelated: the sum of the squares is 15
        (49, [33, 3, 12, 1]),  # wholly: 1, 2^2 - 1, 4^2 - 2^2, 7^2 - 4^2
        (32, [21, 2, 8, 1]),  # r = 17/34: half way
        (0, [9, 1, 4, 1]),  # effects that cancel are not trusted
        (90, [33, 3, 12, 1]),  # sums of rounded numbers may say more than there can be
    ],
)
def test_joint_scores_are_what_each_unit_adds(whole, expected):
    found = joint_scores(torch.tensor([9.0, 1, 4, 1]), torch.tensor([float(whole)]))
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64))


def test_joint_scores_of_one_unit_and_of_silent_ones():
    one = joint_scores(torch.tensor([3.0]), torch.tensor([3.0]))
    assert one.tolist() == [3]
    assert joint_scores(torch.zeros(4), torch.zeros(1)).tolist() == [0, 0, 0, 0]


def test_joint_counts_as_coupled_where_nothing_is_squared():
    model = dependent("residual")
    structure = find_structure(model, images())
    labelled = collect_statistics(model, batches(), structure=structure, gradients="labels")
    both = [
        score(structure, labelled, scoring=Scoring("gate_taylor", combine=how)).scores["stem"]
        for how in ("joint", "coupled")
    ]
    assert torch.equal(*both)


def test_ungated_groups_can_be_left_out():
    structure, statistics = collected(dependent("residual"), "logits")
    found = score(structure, statistics, scoring=Scoring(ungated="none")).scores
    assert set(found) == {"stem"}


# -- the order of channels -------------------------------------------------------------------------


def permuted(model: Residual, order: Tensor) -> Residual:
    """The same function, with the inner channels of block 0 in another order."""
    twin = copy.deepcopy(model)
    block, own = twin.blocks[0], model.blocks[0]
    with torch.no_grad():
        block.conv1.weight.copy_(own.conv1.weight[order])
        block.conv2.weight.copy_(own.conv2.weight[:, order])
        for name in ("weight", "bias", "running_mean", "running_var"):
            getattr(block.bn1, name).copy_(getattr(own.bn1, name)[order])
    return twin


@pytest.mark.parametrize(
    "name",
    [
        "l1",
        "l2",
        "bn_scale",
        "lamp",
        "fpgm",
        "taylor",
        "hessian",
        "gate_bn",
        "gate_logit",
        "gate_fisher",
        "gate_taylor",
    ],
)
def test_scores_move_with_their_channels(name):
    model = dependent("residual").double()
    order = torch.tensor([3, 1, 7, 0, 2, 6, 5, 4])
    found = []
    for net in (model, permuted(model, order)):
        structure, statistics = collected(net, CRITERIA[name].gradients, torch.float64)
        made = score(structure, statistics, model=net, scoring=Scoring(name))
        found.append(made.scores)
    torch.testing.assert_close(found[1]["blocks.0.conv1"], found[0]["blocks.0.conv1"][order])
    torch.testing.assert_close(found[1]["blocks.1.conv1"], found[0]["blocks.1.conv1"])


# -- what cannot be done ---------------------------------------------------------------------------


def test_an_unknown_criterion_names_the_close_ones():
    with pytest.raises(UsageError) as caught:
        criterion("gate_logits")
    assert caught.value.what == "importance.criterion: unknown criterion 'gate_logits'"
    assert caught.value.why == f"known: {', '.join(CRITERIA)}"
    assert caught.value.fix == "importance.criterion=gate_logit"
    assert (caught.value.code, caught.value.exit_status) == ("criterion", 2)


@pytest.mark.parametrize("name", [n for n, c in CRITERIA.items() if c.family != "weights"])
def test_missing_statistics_say_how_to_collect_them(name):
    structure = find_structure(dependent("residual"), images())
    with pytest.raises(InputError) as caught:
        score(structure, scoring=Scoring(name))
    assert str(caught.value) == (
        f"criterion '{name}' cannot be computed\n"
        "why: no statistics were given\n"
        f"next: collect again: seprune collect ... --gradients {CRITERIA[name].gradients}"
    )


def test_statistics_of_other_derivatives_are_refused():
    structure, statistics = collected(dependent("residual"), "logits")
    with pytest.raises(InputError) as caught:
        score(structure, statistics, scoring=Scoring("gate_fisher"))
    assert caught.value.why == "the statistics hold gradients of 'logits', it needs 'labels'"


def test_a_weight_criterion_needs_a_model():
    structure = find_structure(dependent("residual"), images())
    with pytest.raises(SepruneError) as caught:
        score(structure, scoring=Scoring("l2"))
    assert caught.value.fix == "score(..., model=model)"


def test_scores_that_are_not_finite_name_their_group():
    model = dependent("residual")
    structure = find_structure(model, images())
    with torch.no_grad():
        model.blocks[1].conv1.weight[0, 0, 0, 0] = float("nan")
    with pytest.raises(InputError) as caught:
        score(structure, model=model, scoring=Scoring("l2"))
    assert "criterion 'l2' gives a score that is not finite in group" in caught.value.what
    assert caught.value.code == "nonfinite"


class Signed(Inner):
    """Its gates are what the last layer gives, of either sign."""

    def __init__(self) -> None:
        super().__init__()
        self.se.fc[-1] = nn.Identity()


@pytest.mark.parametrize("name", ["gate_mean", "gate_max", "gate_class", "gate_std", "gate_bn"])
def test_signed_gates_are_scored_by_size(name: str) -> None:
    torch.manual_seed(0)
    model = Signed().eval()
    structure, statistics = collected(model)
    scoring = Scoring(name, ungated="none")
    own = score(structure, statistics, model=model, scoring=scoring).scores["expand"]
    assert float(own.min()) >= 0
    assert own.mean() == pytest.approx(1)
    if name == "gate_mean":
        x = torch.cat([images for images, _ in batches()])
        with torch.no_grad():
            y = torch.relu(model.depthwise(torch.relu(model.expand(model.stem(x)))))
            size = model.se.fc(y.mean((2, 3))).double().square().mean(0).sqrt()
        torch.testing.assert_close(own, size / size.mean(), rtol=1e-5, atol=0)
