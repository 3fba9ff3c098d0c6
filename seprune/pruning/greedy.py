"""Score against cost: which units go first so that a budget costs the network least.

Minimise the sum over groups of F_g(k_g), the loss of leaving k_g units, subject to C(k) <= budget.
Where the constraint binds, every group has the same loss per cost at its margin (the multiplier of
the constraint), so units go in the order of score per MAC freed. Costs are products of widths, so
what a unit frees is worked out anew along the way. Derivation: docs/importance.md.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from seprune.graph.cost_terms import Term
from seprune.graph.groups import NetworkStructure

Kept = dict[str, int]
Ascending = Mapping[str, np.ndarray[Any, np.dtype[np.float64]]]
_STRETCHES = 128  # in which a wide group goes; narrower ones go unit by unit


class GreedyDescent:
    """The path from the whole network to its floors, one stretch of one group at a time.

    Args:
        scores: of every free group, ascending: what its units lose in this order.
        strides: how many units of a group go at once, at least.
        after: the units that stay in a group when so many are wanted (multiples, floors).
    """

    def __init__(
        self,
        structure: NetworkStructure,
        terms: Sequence[Term],
        scores: Ascending,
        strides: Mapping[str, int],
        after: Callable[[str, int], int],
    ) -> None:
        self.full, self.after = structure.full_widths(), after
        self.strides = {n: s * -(-self.full[n] // (s * _STRETCHES)) for n, s in strides.items()}
        self.sums = {n: np.concatenate([[0.0], np.cumsum(s)]) for n, s in scores.items()}
        self.terms: dict[str, list[Term]] = {name: [] for name in scores}
        self.beside: dict[str, set[str]] = {name: {name} for name in scores}
        for term in terms:
            names = {n for _, groups, _ in term.factors for n in groups if n in self.terms}
            for name in names:
                self.terms[name].append(term)
                self.beside[name] |= names
        self.kept = dict(self.full)
        self.rates: dict[str, tuple[float, int] | None] = {n: self.rate(n) for n in scores}

    def path(self) -> list[Kept]:
        """The widths after every stretch, the whole network first."""
        found = [dict(self.kept)]
        while (name := self.cheapest()) is not None:
            rate = self.rates[name]
            assert rate is not None  # else it would not be the cheapest
            self.kept[name] = rate[1]
            for other in self.beside[name]:
                self.rates[other] = self.rate(other)
            found.append(dict(self.kept))
        return found

    def cheapest(self) -> str | None:
        """The group that loses least per cost next; ties go to the first one."""
        open_ones = [(rate[0], name) for name, rate in self.rates.items() if rate is not None]
        return min(open_ones, key=lambda pair: pair[0])[1] if open_ones else None

    def rate(self, name: str) -> tuple[float, int] | None:
        """Loss per cost of the group's next stretch, and what stays; None at its floor."""
        units, kept = self.full[name], self.kept[name]
        stays = self.after(name, max(0, kept - self.strides[name]))
        if stays >= kept:
            return None
        loss = self.sums[name][units - stays] - self.sums[name][units - kept]
        less = {**self.kept, name: stays}
        freed = sum(t.at(self.kept) - t.at(less) for t in self.terms[name])
        return float(loss) / max(freed, 1e-9), stays
