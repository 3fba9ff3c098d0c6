"""Pairs of widths at the end of a search, against trying every pair by hand."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from torch import nn

import seprune
from seprune.importance import Importance
from seprune.pruning import search as searching
from seprune.pruning.plan import PruningPlan

WIDTHS = (48, 32, 64, 40)


@pytest.fixture(scope="module")
def structure() -> seprune.NetworkStructure:
    layers: list[nn.Module] = []
    for before, after in itertools.pairwise((3, *WIDTHS)):
        layers += [nn.Conv2d(before, after, 3, padding=1), nn.ReLU()]
    net = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(WIDTHS[-1], 5))
    return seprune.analyse(net, torch.randn(2, 3, 6, 6))


def importance(structure: seprune.NetworkStructure, seed: int) -> Importance:
    random = torch.Generator().manual_seed(seed)
    groups = [g for g in structure.groups if g.prunable]
    scores = {g.name: torch.rand(g.units, generator=random).double() for g in groups}
    return Importance("gate_logit", scores, additive=True)


def loss(scores: Importance, kept: dict[str, int]) -> float:
    return sum(float(s.sort().values[: len(s) - kept[n]].sum()) for n, s in scores.scores.items())


def planned(structure, scores: Importance) -> PruningPlan:
    allocation = seprune.Allocation(round_to=8, floor=0.1)
    return seprune.make_plan(structure, scores, allocation=allocation, macs=0.55)


@pytest.mark.parametrize("seed", range(4))
def test_no_pair_of_moves_is_left_that_loses_less(structure, seed, monkeypatch):
    scores = importance(structure, seed)
    made = planned(structure, scores)
    monkeypatch.setattr(searching, "pair_moves", lambda _, kept, until: kept)
    without = planned(structure, scores)
    kept, before = ({g.name: len(g.keep) for g in p.groups} for p in (made, without))
    limit = 0.55 * structure.costs()["macs"]
    assert structure.macs_at(kept) <= limit
    assert loss(scores, kept) <= loss(scores, before)
    assert all(kept[name] % 8 == 0 for name in scores.scores)
    slack = 1 - structure.macs_at(kept) / limit
    for less, more in itertools.permutations(scores.scores, 2):
        moved = {**kept, less: kept[less] - 8, more: kept[more] + 8}
        full = structure.full_widths()
        if slack <= searching.SLACK or moved[less] < 8 or moved[more] > full[more]:
            continue
        assert structure.macs_at(moved) > limit or loss(scores, moved) >= loss(scores, kept)


def test_a_pair_fills_what_no_single_group_can(structure, monkeypatch):
    gained = []
    for seed in range(8):
        scores = importance(structure, seed)
        made = planned(structure, scores).facts["macs"][1]
        with monkeypatch.context() as patch:
            patch.setattr(searching, "pair_moves", lambda _, kept, until: kept)
            gained.append(made - planned(structure, scores).facts["macs"][1])
    assert np.mean(gained) > 0
