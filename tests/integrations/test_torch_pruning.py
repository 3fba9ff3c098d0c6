"""GateImportance inside torch-pruning's pruners: which channels go, over several steps too."""

from __future__ import annotations

import inspect

import pytest
import torch
import torch_pruning as tp
from nets import Inner, Residual, images
from torch import nn

import seprune

OWN = ("in_channel_groups", "out_channel_groups", "num_heads", "pruning_ratio_dict")


def batches(count: int = 24) -> list[tuple[torch.Tensor, torch.Tensor]]:
    return [(images(count), torch.arange(count) % 3)]


def pruner(
    model: nn.Module, importance: object, kind: str = "BasePruner", **more: object
) -> object:
    own = {name: {} for name in OWN}  # torch-pruning shares its default dicts between pruners
    last = [m for m in model.modules() if isinstance(m, nn.Linear)][-1:]
    given = {"pruning_ratio": 0.5, "ignored_layers": last, **own, **more}
    return getattr(tp.pruner, kind)(model, images(2), importance=importance, **given)


def test_gate_means_alone_choose_the_channels_that_the_gate_scales():
    torch.manual_seed(0)
    model = Inner()
    statistics = seprune.collect_statistics(model, batches())
    lowest = statistics.values["se"]["mean"].argsort()[:6].tolist()
    kept = sorted(set(range(12)) - set(lowest))
    expected = model.depthwise.weight.detach()[kept].clone()
    pruner(model, seprune.GateImportance(statistics)).step()
    assert model.depthwise.out_channels == 6
    assert torch.equal(model.depthwise.weight.detach(), expected)


@pytest.mark.parametrize("criterion", ["gate_logit", "l2"])
def test_with_a_structure_every_group_has_the_scores_of_the_criterion(criterion):
    torch.manual_seed(0)
    model = Residual()
    structure = seprune.analyse(model, images(2))
    statistics = seprune.collect_statistics(model, batches(), structure=structure)
    scoring = seprune.Scoring(criterion)
    importance = seprune.GateImportance(
        statistics, structure=structure, model=model, scoring=scoring
    )
    scores = seprune.score(structure, statistics, model=model, scoring=scoring).scores
    graph = tp.DependencyGraph().build_dependency(model, images(1))
    seen = set()
    for group in graph.get_all_groups(ignored_layers=[model.fc]):
        root = str(group[0].dep.target.name).split(" (")[0]
        (own,) = (g for g in structure.groups if root in g.layers and g.name in scores)
        expected = torch.zeros(own.channels)
        (member,) = (m for m in own.members if m.layer == root and m.side == "out")
        for unit, places in enumerate(member.index):
            expected[places] = float(scores[own.name][unit])
        assert torch.allclose(importance(group), expected)
        seen.add(own.name)
    assert seen == set(scores) - {"fc"}  # the outputs of the classifier stay


def test_unit_gates_score_groups_that_no_gate_scales():
    torch.manual_seed(0)
    model = Residual()
    structure = seprune.analyse(model, images(2))
    statistics = seprune.collect_statistics(model, batches(), structure=structure)
    ungated = [n for n in statistics.units if not any(n in g.scales for g in statistics.gates)]
    importance = seprune.GateImportance(statistics)
    graph = tp.DependencyGraph().build_dependency(model, images(1))
    checked = 0
    for group in graph.get_all_groups(ignored_layers=[model.fc]):
        names = {str(d.target.name).split(" (")[0] for d, _ in group}
        own = [n for n in importance.scores if n in names]
        if own and all(n in ungated for n in own):
            moments = [statistics.units[n]["effect_square"].float() for n in own]
            assert torch.allclose(importance(group), torch.stack(moments).mean(0))
            checked += 1
    assert checked


def test_several_steps_remove_what_one_step_removes():
    """Scores do not change between the steps, so the last channels are the same."""
    torch.manual_seed(0)
    model = Inner()
    statistics = seprune.collect_statistics(model, batches())
    order = statistics.values["se"]["mean"].argsort()
    expected = model.depthwise.weight.detach()[order[6:].sort().values].clone()
    several = pruner(model, seprune.GateImportance(statistics), iterative_steps=3)
    widths = []
    for _ in range(3):
        several.step()
        widths.append(model.depthwise.out_channels)
    assert widths[0] > widths[1] > widths[2] == 6
    assert torch.equal(model.depthwise.weight.detach(), expected)


def test_a_layer_that_was_cut_behind_its_back_is_named():
    torch.manual_seed(0)
    model = Inner()
    importance = seprune.GateImportance(seprune.collect_statistics(model, batches()))
    pruner(model, tp.importance.GroupMagnitudeImportance(p=2)).step()
    graph = tp.DependencyGraph().build_dependency(model, images(1))
    group = graph.get_pruning_group(model.depthwise, tp.prune_conv_out_channels, list(range(6)))
    with pytest.raises(seprune.InputError, match="has 6 outputs, and the statistics hold 12"):
        importance(group)


def test_a_statistic_that_was_not_collected_is_named():
    statistics = seprune.collect_statistics(Inner(), batches())
    with pytest.raises(seprune.InputError, match="the statistics hold no 'effect_square'"):
        seprune.GateImportance(statistics, "effect_square")


KINDS = ["MetaPruner", "MagnitudePruner", "BNScalePruner", "GroupNormPruner", "GrowingRegPruner"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("net", [Inner, Residual])
def test_every_pruner_takes_it_and_its_regularisation_stays_finite(kind, net):
    torch.manual_seed(0)
    model = net()
    statistics = seprune.collect_statistics(model, batches())  # the stem has no scores at all
    made = pruner(model, seprune.GateImportance(statistics), kind)
    before = sum(p.numel() for p in model.parameters())
    if hasattr(made, "update_regularizer"):
        made.update_regularizer()
    loss = model(images(4)).logsumexp(1).sum()
    loss.backward()
    wants_loss = "loss" in inspect.signature(made.regularize).parameters
    made.regularize(model, loss) if wants_loss else made.regularize(model)
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    assert all(bool(g.isfinite().all()) for g in gradients)
    made.step()
    assert sum(p.numel() for p in model.parameters()) < 0.7 * before
    assert bool(model(images(2)).isfinite().all())
