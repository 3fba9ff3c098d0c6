"""Two groups at once: one takes its next width, another gives one up.

Where widths are multiples of 8 or 16, no single group may fit into what a budget leaves. A pair of
moves may, and where it loses less as well, the plan is better for it.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from seprune.graph.groups import ChannelGroup
    from seprune.pruning.search import Search

MOST = 50  # pairs; a handful is used


def pair_moves(search: Search, kept: dict[str, int], *, until: float) -> dict[str, int]:
    """The widths after the pairs that lessen the loss most, within all budgets, one by one.

    Args:
        until: the fraction of the tightest budget that may stay unused.
    """
    for _ in range(MOST):
        if search.slack(kept) <= until:
            break
        best = next((more for _, more in _moves(search, kept) if search.meets(more)), None)
        if best is None:
            break
        kept = best
    return kept


def _moves(search: Search, kept: dict[str, int]) -> Iterator[tuple[float, dict[str, int]]]:
    """All pairs that lessen the loss, the best first."""
    groups = [g for g in search.free if g.role == "features"]
    lost = {g.name: np.concatenate([[0.0], np.cumsum(search.losses(g))]) for g in groups}

    def loss(group: ChannelGroup, units: int) -> float:
        return float(lost[group.name][group.units - units])

    wider = [(g, search.rounded(g, kept[g.name] + 1)) for g in groups if kept[g.name] < g.units]
    found = []
    for group in groups:
        step, now = search.stride(group), kept[group.name]
        less = (now - 1) // step * step
        if less < search.floors[group.name]:
            continue
        paid = loss(group, less) - loss(group, now)
        for other, units in wider:
            gain = loss(other, kept[other.name]) - loss(other, units) - paid
            if other.name != group.name and gain > 0:
                found.append((gain, {**kept, group.name: less, other.name: units}))
    yield from sorted(found, key=lambda move: -move[0])
