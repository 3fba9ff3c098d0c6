"""Budgets in time: widths from a latency model, corrected by measuring whole networks.

A model that adds up single operators is off by some percent, so the plan that it finds is measured
as a whole network, and the model's budget is scaled by what the measurement says, until the network
is within the budget and at most `GAP` below it. Without a model, the ranking's ratio is bisected
with a measurement for each candidate.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from seprune.errors import InputError
from seprune.measure.latency_table import LatencyModel
from seprune.pruning.coordinate import Choices, allocate
from seprune.pruning.plan import PruningPlan, plan_of, with_facts
from seprune.pruning.removals import Removals
from seprune.recipe.budget import Limit

if TYPE_CHECKING:
    from seprune.pruning.search import Search

Kept = dict[str, int]
Measure = Callable[[PruningPlan], float]
GAP = 0.03  # of the budget may stay unused
CORRECTIONS = 10  # measurements of whole networks
BISECTIONS = 8
MOST_OPTIONS = 32  # widths of a group that are tried


@dataclass(frozen=True)
class Candidate:
    """Widths and the milliseconds that their network was measured at."""

    kept: Kept
    ms: float


class LatencySearch:
    """The plan within a latency budget, and within the search's other targets."""

    def __init__(self, search: Search, limit: Limit, measure: Measure) -> None:
        self.search, self.measure = search, measure
        self.model: LatencyModel | None = None
        self.parts = search.allocation.parts if search.importance.additive else ()
        self.uncut_ms = measure(plan_of(search.structure.groups, {}, {}))
        self.budget = float(limit.value) * (self.uncut_ms if limit.is_fraction else 1.0)

    def plan(self, found: Candidate) -> PruningPlan:
        """The plan, with the budget and what was reached as shares of the network given."""
        shares: dict[str, Any] = {
            "budget": self.budget / self.uncut_ms,
            "reached": found.ms / self.uncut_ms,
        }
        if self.model is not None:
            shares["predicted"] = self.model.at(found.kept) / self.model.at(self.full())
            shares |= {"note": self.model.table.note} if self.model.table.note else {}
        return with_facts(
            self.planned(found.kept), latency={**shares, "ms": [self.uncut_ms, found.ms]}
        )

    def planned(self, kept: Kept) -> PruningPlan:
        """The plan of these widths, without the parts that are left out."""
        gone = [part for part in self.parts if kept.get(part.name) == 0]
        plan = self.search.plan(kept)
        if not gone:
            return plan
        removed = Removals.of_parts(gone)
        left = self.search.structure.without(removed.modules)
        costs = {
            "macs": [plan.facts["macs"][0], left.macs_at(kept)],
            "params": [plan.facts["params"][0], left.params_at(kept)],
        }
        return replace(with_facts(plan, **costs), removed=removed)

    def timed(self, kept: Kept, **more: Any) -> Candidate:
        """A candidate, measured and noted in the search's history."""
        found = Candidate(kept, self.measure(self.planned(kept)))
        self.search.history.append({**more, "latency": found.ms / self.uncut_ms})
        return found

    # -- without a model ------------------------------------------------------------------------

    def measured(self, ratio: float) -> Candidate:
        """The largest network from `ratio` on, each candidate measured."""
        search = self.search
        kept = search.refill(search.kept(ratio))
        best = self.timed(kept, ratio=ratio) if search.targets else Candidate(kept, self.uncut_ms)
        if best.ms <= self.budget:
            return best
        best = self.timed(search.kept(1.0), ratio=1.0)
        if best.ms > self.budget:
            raise self.too_slow(best.ms)
        low, high = ratio, 1.0
        for _ in range(BISECTIONS):
            middle = (low + high) / 2
            found = self.timed(search.kept(middle), ratio=middle)
            if found.ms <= self.budget:
                best, high = found, middle
            else:
                low = middle
        return best

    # -- with a model ---------------------------------------------------------------------------

    def modelled(self, model: LatencyModel, ratio: float) -> Candidate:
        """The widths that lose least within the model's budget, which measurements correct."""
        self.model = model.with_parts({p.name: p.module for p in self.parts})
        choices = self.choices(self.model)
        full = self.full()
        target = self.budget * choices.times(full) / self.uncut_ms
        best: Candidate | None = None
        floors = {**self.search.kept(1.0), **dict.fromkeys((p.name for p in self.parts), 0)}
        low, high = choices.times(floors), choices.times(full)
        seen: dict[tuple[int, ...], Candidate] = {}
        for _ in range(CORRECTIONS):
            kept = allocate(choices, target, self.starts(choices, target, ratio)) or floors
            kept = self.search.followed(kept)
            key = tuple(kept.values())
            if key in seen:
                found = seen[key]
            else:
                found = seen[key] = self.timed(kept, predicted=choices.times(kept))
            if found.ms <= self.budget:
                best = found if best is None or found.ms > best.ms else best
                low = max(low, target)
            else:
                high = min(high, target)
            if best is not None and best.ms >= (1 - GAP) * self.budget:
                return best
            target = self.corrected(target * self.budget / found.ms, low, high)
        best = best or self.least(floors)
        return self.widened(choices, best)

    @staticmethod
    def corrected(target: float, low: float, high: float) -> float:
        """The next budget of the model: proportional, inside what is known to be too much or
        too little."""
        margin = 0.02 * (high - low)
        return target if low + margin < target < high - margin else (low + high) / 2

    def least(self, floors: Kept) -> Candidate:
        """The network at its floors.

        Raises:
            InputError: it is slower than the budget.
        """
        found = self.timed(floors)
        if found.ms > self.budget:
            raise self.too_slow(found.ms)
        return found

    def widened(self, choices: Choices, best: Candidate) -> Candidate:
        """Give single groups their next width where a measurement says that there is time."""
        for kept in self.wider(choices, best.kept):
            found = self.timed(kept, predicted=choices.times(kept))
            if best.ms < found.ms <= self.budget:
                return found
        return best

    def wider(self, choices: Choices, kept: Kept) -> Iterator[Kept]:
        """One group at its next width, the likeliest to use up the budget first."""
        steps = []
        for name, options in choices.options.items():
            more = self.search.followed({**kept, name: next_above(options, kept[name])})
            if more != kept and choices.fits(more):
                steps.append((choices.loss(more), more))
        yield from [more for _, more in sorted(steps, key=lambda s: s[0])[:BISECTIONS]]

    def choices(self, model: LatencyModel) -> Choices:
        """Widths, losses and times of the search's free groups."""
        search = self.search
        options, losses = {}, {}
        for group in search.free:
            every = range(search.floors[group.name], group.units + 1)
            widths = sorted({search.rounded(group, units) for units in every})
            thin = -(-len(widths) // MOST_OPTIONS)
            options[group.name] = widths[:-1][::thin] + widths[-1:]
            sums = np.concatenate([[0.0], np.cumsum(search.losses(group))])
            losses[group.name] = {u: float(sums[group.units - u]) for u in options[group.name]}
        beside = {g.name: search.with_follower(g.name) for g in search.free}
        for part in self.parts:
            options[part.name], losses[part.name] = [0, 1], {0: part.loss, 1: 0.0}
            beside[part.name] = (part.name,)
        return Choices(
            options,
            losses,
            lambda kept: model.at(search.followed(kept)),
            lambda name, kept: model.of_groups(beside[name], search.followed(kept)),
            search.meets,
        )

    def starts(self, choices: Choices, target: float, ratio: float) -> list[Kept]:
        """The network given, and the ranking's widths at the model's budget."""
        low, high = ratio, 1.0
        for _ in range(12):
            middle = (low + high) / 2
            slow = choices.times(self.search.kept(middle)) > target
            low, high = (middle, high) if slow else (low, middle)
        full = self.full()
        ranked = {n: {**full, **self.search.kept(high)}[n] for n in choices.options}
        nearest = {n: min(choices.options[n], key=lambda o: (abs(o - u), o))
                   for n, u in ranked.items()}  # fmt: skip
        return [full, {**full, **nearest}]

    def full(self) -> Kept:
        """The network given."""
        return {**self.search.structure.full_widths(), **{p.name: 1 for p in self.parts}}

    def too_slow(self, least: float) -> InputError:
        """The budget is out of reach."""
        asked = f"{self.budget / self.uncut_ms:.3g} ({self.budget:.3g} ms)"
        return InputError(
            f"the budget cannot be met: latency can go down to {least / self.uncut_ms:.3f} of all "
            f"({least:.3g} ms), the budget is {asked}",
            why=self.search.in_the_way(),
            fix="choose a larger budget, or lower plan.floor and plan.min_channels",
            code="budget",
        )


def next_above(options: Any, units: int) -> int:
    """The next larger option, or the largest one."""
    return next((int(o) for o in options if o > units), int(options[-1]))
