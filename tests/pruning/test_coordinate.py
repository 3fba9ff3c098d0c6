"""Allocation by time against brute force, over stairs that a greedy descent does not cross."""

from __future__ import annotations

import itertools
import math
import random

import pytest

from seprune.pruning.coordinate import Choices, allocate


def problem(seed: int, groups: int = 4) -> tuple[Choices, dict[str, int]]:
    """Chained layers whose time is a staircase in tiles of 3, with convex losses."""
    draw = random.Random(seed)
    names = [f"g{i}" for i in range(groups)]
    options = {n: list(range(2, 13, 2)) for n in names}
    losses = {}
    for n in names:
        scores = sorted(draw.random() for _ in range(12))
        losses[n] = {u: sum(scores[: 12 - u]) for u in options[n]}

    def layer(a: int, b: int) -> float:
        return math.ceil(a / 3) * math.ceil(b / 3) + 0.1

    def parts(kept: dict[str, int]) -> list[tuple[set[str], float]]:
        widths = [3, *(kept[n] for n in names), 3]
        return [(set(names[max(0, i - 1) : i + 1]), layer(widths[i], widths[i + 1]))
                for i in range(groups + 1)]  # fmt: skip

    def times(kept: dict[str, int]) -> float:
        return sum(ms for _, ms in parts(kept))

    def of_group(name: str, kept: dict[str, int]) -> float:
        return sum(ms for near, ms in parts(kept) if name in near)

    return Choices(options, losses, times, of_group), dict.fromkeys(names, 12)


def brute_force(choices: Choices, budget: float) -> float:
    names = list(choices.options)
    every = (dict(zip(names, w)) for w in itertools.product(*choices.options.values()))
    return min(choices.loss(k) for k in every if choices.times(k) <= budget and choices.fits(k))


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("share", [0.7, 0.5, 0.35])
def test_the_best_widths_of_a_small_network_are_found(seed, share):
    choices, whole = problem(seed)
    budget = share * choices.times(whole)
    found = allocate(choices, budget, [whole])
    assert found is not None
    assert choices.times(found) <= budget
    assert choices.loss(found) == pytest.approx(brute_force(choices, budget))


def test_a_second_budget_holds_beside_the_time():
    choices, whole = problem(1)
    both = Choices(choices.options, choices.losses, choices.times, choices.group_times,
                   lambda kept: sum(kept.values()) <= 30)  # fmt: skip
    found = allocate(both, 0.9 * choices.times(whole), [whole])
    assert found is not None
    assert sum(found.values()) <= 30


def test_nothing_is_found_below_the_floors():
    choices, whole = problem(0)
    floors = dict.fromkeys(whole, 2)
    assert allocate(choices, 0.99 * choices.times(floors), [whole]) is None
    assert allocate(choices, choices.times(floors), [whole]) is not None
