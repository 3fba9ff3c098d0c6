"""What a budget means: fractions and amounts as MACs and parameters of one network."""

from __future__ import annotations

from collections.abc import Mapping

from seprune.errors import InputError, UsageError
from seprune.graph.groups import NetworkStructure

BUDGETS = ("macs", "params", "latency")
_SUFFIX = {"K": 10**3, "M": 10**6, "G": 10**9}


def resolve(structure: NetworkStructure, budget: Mapping[str, float | str]) -> dict[str, int]:
    """The largest `macs` and `params` that a budget allows.

    Raises:
        InputError: no fraction between 0 and 1, or more than the network has.
    """
    costs = structure.costs()
    return {n: _amount(n, budget[n], costs[n]) for n in costs if n in budget}


def _amount(name: str, budget: float | str, whole: int) -> int:
    if isinstance(budget, int) and budget > 1:
        target = budget
    elif isinstance(budget, str) and budget[-1:].upper() in _SUFFIX:
        target = int(_number(name, budget, budget[:-1]) * _SUFFIX[budget[-1].upper()])
    else:
        target = int(fraction(name, budget) * whole)
    if target >= whole:
        raise InputError(
            f"budget {name}={budget} is met without a cut",
            why=f"the network has {whole:,} {name}",
            fix="choose a smaller budget",
            code="budget",
        )
    return target


def fraction(name: str, budget: float | str) -> float:
    """A budget that has to be a fraction kept, between 0 and 1."""
    kept = _number(name, budget, budget)
    if not 0 < kept < 1:
        raise InputError(
            f"budget {name}={budget} is no fraction between 0 and 1",
            why="a budget says how much is kept",
            fix=f"{name}=0.5 keeps half; an amount is written {name}=1.0G",
            code="budget",
        )
    return kept


def _number(name: str, budget: float | str, text: float | str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = float("nan")
    if not 0 <= number < float("inf"):
        raise UsageError(
            f"budget {name}={budget} is not a number",
            why="a budget says how much is kept",
            fix=f"{name}=0.5 keeps half; an amount is written {name}=1.0G",
            code="budget",
        )
    return number
