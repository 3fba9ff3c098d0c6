"""Rules that a plan can be made by, to be tried beside each other."""

from __future__ import annotations

from seprune.importance.alternatives import alternatives
from seprune.importance.criteria import Scoring
from seprune.pruning.constraints import Allocation
from seprune.statistics import GateStatistics


def rules_to_try(
    scoring: Scoring,
    statistics: GateStatistics | None,
    allocation: Allocation,
    *,
    refits: bool,
) -> dict[str, tuple[Scoring, Allocation]]:
    """Rules by name, the one asked for first; it alone where there is nothing to try beside it.

    A refit evens out how much each group loses, so there the order of units is varied. A network
    that nothing refits fails with the group that was cut deepest, so there the allocation is.
    """
    scorings = alternatives(scoring, statistics)
    if refits or len(scorings) == 1:
        return {name: (own, allocation) for name, own in scorings.items()}
    return {
        f"{name}{', ' * bool(suffix)}{suffix}": (own, way)
        for suffix, way in ({"": allocation} | allocation.others()).items()
        for name, own in scorings.items()
        if own.criterion == scoring.criterion
    }
