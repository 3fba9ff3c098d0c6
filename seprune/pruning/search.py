"""How many units of which groups may stay: scores and a budget become a plan.

Units are removed from the lowest score on, in one ranking (`global`), in one for each kind of
group (`isomorphic`), in each group alone (`uniform`), or in one by score per cost (`cost_aware`),
until every target is met. Costs come from the structure's terms, so that a candidate takes
microseconds.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from seprune.errors import InputError, UsageError
from seprune.graph.groups import ChannelGroup, NetworkStructure
from seprune.importance import Importance
from seprune.measure.latency_table import LatencyModel
from seprune.pruning.constraints import SCALED, Allocation, followers, kind, why_uncut
from seprune.pruning.greedy import GreedyDescent
from seprune.pruning.latency_budget import LatencySearch, Measure
from seprune.pruning.limits import Budget, limits
from seprune.pruning.pair_moves import pair_moves
from seprune.pruning.plan import PruningPlan, plan_of

Kept = dict[str, int]
SLACK = 0.002  # of a budget may stay unused
FAR = 0.05  # of it: widths are then too coarse


def make_plan(
    structure: NetworkStructure,
    importance: Importance,
    *,
    allocation: Allocation | None = None,
    measure: Measure | None = None,
    times: LatencyModel | None = None,
    **budget: float | str,
) -> PruningPlan:
    """The plan that keeps the best-scored units within all budgets.

    Args:
        measure: milliseconds of a plan's network on the device at hand, for `latency`.
        times: a model of them: widths are then chosen by what they lose per time, and few plans
            are measured; without one, every candidate is.
        budget: `macs`, `params`, `latency`: a fraction kept (0.5), an amount ("1.0G", "4ms") or,
            for the first two, a number of units (int).

    Raises:
        UsageError: an unknown budget, or none at all.
        InputError: a budget that is out of range or cannot be met; names the reachable minimum
            and what prevents it.
    """
    parsed = Budget.parse(**budget)
    allocation = allocation or Allocation()
    return plan_within(
        structure, importance, parsed, allocation=allocation, measure=measure, times=times
    )


def plan_within(
    structure: NetworkStructure,
    importance: Importance,
    budget: Budget,
    *,
    allocation: Allocation,
    measure: Measure | None = None,
    times: LatencyModel | None = None,
) -> PruningPlan:
    """`make_plan` for a budget that has been parsed."""
    search, ratio = _solved(structure, importance, allocation, limits(structure, budget))
    if budget.latency is not None:
        if measure is None:
            raise UsageError(
                "a latency budget needs a device to measure on",
                why="no function that measures was given",
                fix="make_plan(..., measure=...)",
            )
        by_time = LatencySearch(search, budget.latency, measure)
        return by_time.plan(
            by_time.modelled(times, ratio) if times is not None else by_time.measured(ratio)
        )
    return search.plan(search.refill(search.kept(ratio)))


def _solved(
    structure: NetworkStructure,
    importance: Importance,
    allocation: Allocation,
    targets: Mapping[str, int],
) -> tuple[Search, float]:
    """The search and its ratio: where the multiples are left open, in the largest ones that come
    near the targets. In narrow networks those of fast widths may be far apart."""
    for multiple in (None, 8, 4, 2) if allocation.round_to is None and targets else ():
        finer = replace(allocation, round_to=multiple)
        search = Search(structure, importance, finer, targets)
        if search.meets(search.kept(1.0)):
            ratio = search.solve()
            if search.slack(search.refill(search.kept(ratio))) <= FAR:
                return search, ratio
    last = replace(allocation, round_to=1) if targets and not allocation.round_to else allocation
    search = Search(structure, importance, last, targets)
    return search, search.solve()


class Search:
    def __init__(
        self,
        structure: NetworkStructure,
        importance: Importance,
        allocation: Allocation,
        targets: Mapping[str, int],
    ) -> None:
        allocation = allocation.settled(importance)
        self.structure, self.allocation, self.targets = structure, allocation, targets
        self.importance = importance
        self.reasons = {g.name: why_uncut(g, importance, allocation) for g in structure.groups}
        self.free = [g for g in structure.groups if self.reasons[g.name] is None]
        self.followers = followers(structure) if allocation.bottleneck == "scale" else {}
        self.order = {g.name: _ascending(importance, g) for g in structure.groups}
        self.floors = {g.name: self.least(g) for g in structure.groups}
        self.ranks = self.ranked()
        self.path = self.cost_aware() if allocation.cost_aware else []
        self.history: list[dict[str, Any]] = []

    # -- candidates ---------------------------------------------------------------------------

    def least(self, group: ChannelGroup) -> int:
        each = group.channels // group.units
        by_channels = -(-min(self.allocation.fewest, group.channels) // each)
        return max(1, by_channels, int(np.ceil(self.allocation.floor * group.units)))

    def ranked(self) -> dict[str, np.ndarray[Any, np.dtype[np.float64]]]:
        """For every free group the ratio at which each of its units goes, ascending."""
        ranks = {}
        for scope in self.scopes():
            scores = np.concatenate([self.sorted_scores(g) for g in scope])
            places = np.concatenate([np.arange(g.units) for g in scope])
            owners = np.concatenate([np.full(g.units, i) for i, g in enumerate(scope)])
            order = np.lexsort((places, owners, scores))  # ties: by group, then by channel
            ratio = np.empty(len(scores))
            ratio[order] = (np.arange(len(scores)) + 1) / len(scores)
            for i, group in enumerate(scope):
                ranks[group.name] = np.sort(ratio[owners == i])
        return ranks

    def sorted_scores(self, group: ChannelGroup) -> np.ndarray[Any, np.dtype[np.float64]]:
        scores = self.importance.scores[group.name].numpy()
        return np.asarray(scores[self.order[group.name]])

    def scopes(self) -> list[list[ChannelGroup]]:
        if self.allocation.scope == "global":
            return [self.free] if self.free else []
        key = (lambda g: g.name) if self.allocation.scope == "uniform" else kind
        scopes: dict[Any, list[ChannelGroup]] = {}
        for group in self.free:
            scopes.setdefault(key(group), []).append(group)
        return list(scopes.values())

    def cost_aware(self) -> list[Kept]:
        """The widths from the whole network down to the floors, in the order of score per cost."""
        groups = {g.name: g for g in self.free}
        terms = self.structure.params if set(self.targets) == {"params"} else self.structure.macs
        return GreedyDescent(
            self.structure,
            terms,
            {name: self.sorted_scores(g) for name, g in groups.items()},
            {name: self.stride(g) for name, g in groups.items()},
            lambda name, units: self.rounded(groups[name], max(self.floors[name], units)),
        ).path()

    def kept(self, ratio: float) -> Kept:
        """Units that stay in every group when `ratio` of each scope, or of the path, is to go."""
        kept = self.structure.full_widths()
        if self.path:
            kept = dict(self.path[int(np.ceil(ratio * (len(self.path) - 1) - 1e-6))])
        for group in () if self.path else self.free:
            gone = int(np.searchsorted(self.ranks[group.name], ratio + 1e-12, side="right"))
            kept[group.name] = self.rounded(group, max(self.floors[group.name], group.units - gone))
        return self.followed(kept)

    def followed(self, kept: Kept) -> Kept:
        """The same widths, hidden widths of excitations scaled with the channels they gate."""
        found, full = dict(kept), self.structure.full_widths()
        for name, follower in self.followers.items():
            if self.reasons[follower.name] == SCALED:
                share = kept[name] / full[name]
                found[follower.name] = max(1, int(np.ceil(share * follower.units)))
        return found

    def with_follower(self, name: str) -> tuple[str, ...]:
        """A group and the one whose width follows it."""
        follower = self.followers.get(name)
        scaled = follower is not None and self.reasons[follower.name] == SCALED
        return (name, follower.name) if scaled and follower is not None else (name,)

    def losses(self, group: ChannelGroup) -> np.ndarray[Any, np.dtype[np.float64]]:
        """What each unit's removal loses, the first to go first.

        Scores that do not add up across groups count by their place in the ranking.
        """
        return self.sorted_scores(group) if self.allocation.cost_aware else self.ranks[group.name]

    def rounded(self, group: ChannelGroup, units: int) -> int:
        """The next width up that is a multiple of `round_to` channels, if the group has one."""
        step = self.stride(group)
        return min(group.units, -(-units // step) * step)

    def stride(self, group: ChannelGroup) -> int:
        """Units between two widths that are multiples of `round_to`.

        1 where units of several channels leave hardly such a width (9 of a shuffled convolution).
        """
        each = group.channels // group.units
        multiple = self.allocation.multiple(group.channels)
        step = multiple // math.gcd(multiple, each)
        return 1 if each > 1 and 2 * step > group.units else step

    # -- search -------------------------------------------------------------------------------

    def cost(self, kept: Kept) -> dict[str, int]:
        found = {"macs": self.structure.macs_at(kept), "params": self.structure.params_at(kept)}
        return {name: found[name] for name in self.targets}

    def meets(self, kept: Kept) -> bool:
        cost = self.cost(kept)
        return all(cost[name] <= target for name, target in self.targets.items())

    def solve(self) -> float:
        """The smallest ratio that meets all targets."""
        if not self.targets:
            return 0.0
        ratios = np.unique(np.concatenate([[0.0], *self.ranks.values()]))
        if self.path:
            ratios = np.linspace(0, 1, len(self.path))
        if not self.meets(self.kept(1.0)):
            raise self.unreachable()
        low, high = 0, len(ratios) - 1
        while low < high:
            middle = (low + high) // 2
            kept = self.kept(float(ratios[middle]))
            self.history.append({"ratio": float(ratios[middle]), **self.cost(kept)})
            low, high = (low, middle) if self.meets(kept) else (middle + 1, high)
        return float(ratios[low])

    def refill(self, kept: Kept) -> Kept:
        """Give back what the last step took too much: best-scored units, until the gap is small."""
        while self.targets and self.slack(kept) > SLACK:
            # hidden widths of excitations cost next to nothing: they would fill no gap
            short = [g for g in self.free if kept[g.name] < g.units and g.role == "features"]
            before = kept
            for group in sorted(short, key=self.next_score(kept), reverse=True):
                more = {**kept, group.name: self.rounded(group, kept[group.name] + 1)}
                if self.meets(more):
                    kept = more
            if kept is before:
                break
        # without a path losses do not add up, so pairs cannot be compared
        return pair_moves(self, kept, until=SLACK) if self.targets and self.path else kept

    def slack(self, kept: Kept) -> float:
        """How far the tightest budget is from being used up, as a fraction of it."""
        cost = self.cost(kept)
        return min(1 - cost[name] / target for name, target in self.targets.items())

    def next_score(self, kept: Kept) -> Callable[[ChannelGroup], float]:
        def score(group: ChannelGroup) -> float:
            own = float(self.sorted_scores(group)[group.units - kept[group.name] - 1])
            return own / self.price(group, kept) if self.path else own

        return score

    def price(self, group: ChannelGroup, kept: Kept) -> float:
        """What one more unit of a group costs."""
        more, now = self.cost({**kept, group.name: kept[group.name] + 1}), self.cost(kept)
        return max(1.0, float(more[min(more)] - now[min(now)]))

    def plan(self, kept: Kept) -> PruningPlan:
        keep = {
            g.name: self.order[g.name][g.units - kept[g.name] :].tolist()
            for g in self.structure.groups
        }
        full = self.structure.full_widths()
        facts = {
            "targets": dict(self.targets),
            "criterion": self.importance.criterion,
            "allocation": self.allocation.scope,
            "macs": [self.structure.macs_at(full), self.structure.macs_at(kept)],
            "params": [self.structure.params_at(full), self.structure.params_at(kept)],
        }
        plan = plan_of(self.structure.groups, keep, facts)
        return plan.annotated(self.reasons, self.history)

    def unreachable(self) -> InputError:
        cost, parts = self.cost(self.kept(1.0)), []
        uncut = self.cost(self.structure.full_widths())
        for name, target in self.targets.items():
            if cost[name] > target:
                full = uncut[name]
                parts.append(
                    f"{name} can go down to {cost[name]:,} ({cost[name] / full:.3f} of all), "
                    f"the budget is {target:,} ({target / full:.3f})"
                )
        return InputError(
            "the budget cannot be met: " + "; ".join(parts),
            why=self.in_the_way(),
            fix="choose a larger budget, or lower plan.floor and plan.min_channels",
            code="budget",
        )

    def in_the_way(self) -> str:
        uncut = [f"{n} ({r})" for n, r in self.reasons.items() if r is not None]
        what = f"{len(uncut)} groups are not pruned: {'; '.join(uncut[:4])}" if uncut else ""
        steps = sorted({self.allocation.multiple(g.channels) for g in self.free} - {1})
        rounded = f", in multiples of {' or '.join(map(str, steps))}" if steps else ""
        return (
            f"every group keeps at least {self.allocation.floor:.0%} and "
            f"{self.allocation.fewest} channels{rounded}. {what}"
        ).strip()


def _ascending(importance: Importance, group: ChannelGroup) -> np.ndarray[Any, np.dtype[np.int64]]:
    """Units from the lowest score on; ties by channel, the first one goes last."""
    if group.name not in importance.scores:
        return np.arange(group.units)
    scores = importance.scores[group.name].numpy()
    return np.lexsort((-np.arange(group.units), scores))
