"""What a budget allows one network: its largest MACs and parameters."""

from __future__ import annotations

from seprune.errors import InputError
from seprune.graph.groups import NetworkStructure
from seprune.recipe.budget import BUDGETS, Budget, Limit

__all__ = ["BUDGETS", "Budget", "Limit", "limits"]


def limits(structure: NetworkStructure, budget: Budget) -> dict[str, int]:
    """The largest `macs` and `params` that a budget allows; latency has to be measured.

    Raises:
        InputError: the network is within the budget as it is.
    """
    costs = structure.costs()
    return {name: _amount(name, limit, costs[name]) for name, limit in budget if name in costs}


def _amount(name: str, limit: Limit, cost: int) -> int:
    amount = int(limit.value * cost) if limit.is_fraction else int(limit.value)
    if amount >= cost:
        raise InputError(
            f"budget {name}={limit.written} is met without a cut",
            why=f"the network has {cost:,} {name}",
            fix="choose a smaller budget",
            code="budget",
        )
    return amount
