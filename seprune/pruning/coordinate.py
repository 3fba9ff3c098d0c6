"""Allocation by time: the widths that lose least within a latency budget.

Times are stairs in the widths, so a descent that takes one unit after another stops at their edges.
For a price of time lambda, coordinate descent takes for each group in turn the width with the
least loss + lambda * time, until no group changes; the price is bisected until the budget is met;
pairs of groups are then changed together where that lowers the loss within the budget
(MDP, arXiv 2504.02168, solves the same problem as an integer program).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

Kept = dict[str, int]
SWEEPS = 20  # over all groups at one price; a handful is used
BISECTIONS = 30
MOVES = 200  # of one or two groups at the end


@dataclass(frozen=True)
class Choices:
    """What a search chooses from.

    Attributes:
        options: of every free group the numbers of units that may stay, ascending.
        losses: of every free group what it loses at each option.
        times: milliseconds at given widths.
        group_times: milliseconds of what depends on one group's width, at given widths.
        fits: whether all further budgets (MACs, parameters) are met.
    """

    options: Mapping[str, Sequence[int]]
    losses: Mapping[str, Mapping[int, float]]
    times: Callable[[Kept], float]
    group_times: Callable[[str, Kept], float]
    fits: Callable[[Kept], bool] = lambda kept: True

    def loss(self, kept: Kept) -> float:
        """The loss of the scores at given widths."""
        return sum(known[kept[name]] for name, known in self.losses.items())


def allocate(choices: Choices, budget: float, starts: Iterable[Kept]) -> Kept | None:
    """The widths with the least loss found within `budget` milliseconds, or None.

    Args:
        starts: widths to descend from, the uncut network among them; those within all budgets are
            candidates themselves.
    """
    starts = list(starts)

    def allowed(kept: Kept) -> bool:
        return choices.times(kept) <= budget and choices.fits(kept)

    candidates = [kept for kept in starts if allowed(kept)]
    floors = {**starts[0], **{name: options[0] for name, options in choices.options.items()}}
    for start in (*starts, floors):
        candidates += _bisected(choices, start, allowed)
    if allowed(floors):
        candidates.append(floors)
    if not candidates:
        return None
    ordered = sorted(candidates, key=lambda k: (choices.loss(k), choices.times(k)))
    distinct = [k for i, k in enumerate(ordered) if k not in ordered[:i]][:3]
    ended = [_pair_moves(choices, kept, allowed) for kept in distinct]
    return min(ended, key=lambda k: (choices.loss(k), choices.times(k)))


def _bisected(choices: Choices, start: Kept, allowed: Callable[[Kept], bool]) -> list[Kept]:
    """What the descent ends at for each price of the bisection, where that is allowed."""
    found: list[Kept] = []
    low, high = 0.0, (abs(choices.loss(start)) + 1e-9) / max(choices.times(start), 1e-12)
    for _ in range(60):  # until the price is high enough
        kept = descend(choices, start, high)
        if allowed(kept):
            found.append(kept)
            break
        low, high = high, high * 4
    for _ in range(BISECTIONS if found else 0):
        price = (low + high) / 2
        kept = descend(choices, start, price)
        if allowed(kept):
            found.append(kept)
            high = price
        else:
            low = price
    return found[-3:]


def descend(choices: Choices, start: Kept, price: float) -> Kept:
    """Group after group at the width with the least loss + price * time, until none changes."""
    kept = dict(start)
    for _ in range(SWEEPS):
        before = dict(kept)
        for name, options in choices.options.items():

            def total(units: int, name: str = name) -> float:
                time = choices.group_times(name, {**kept, name: units})
                return choices.losses[name][units] + price * time

            kept[name] = min(options, key=lambda units: (total(units), -units))
        if kept == before:
            break
    return kept


def _pair_moves(choices: Choices, kept: Kept, allowed: Callable[[Kept], bool]) -> Kept:
    """Widen single groups, and pairs with one narrower, while that lowers the loss."""
    names = list(choices.options)
    for _ in range(MOVES):
        better = _best_move(choices, kept, names, allowed)
        if better is None:
            return kept
        kept = better
    return kept


def _best_move(
    choices: Choices, kept: Kept, names: Sequence[str], allowed: Callable[[Kept], bool]
) -> Kept | None:
    """The allowed move of one or two groups that lowers the loss most."""
    now = choices.loss(kept)
    steps = [(n, u, choices.losses[n][u] - choices.losses[n][kept[n]])
             for n in names for u in _near(choices.options[n], kept[n])]  # fmt: skip
    moves: list[tuple[float, Kept]] = []
    for name, units, gain in steps:
        if gain < 0:
            moves.append((gain, {**kept, name: units}))
        for other, less, loss in steps:
            if other != name and gain < 0 < loss and gain + loss < 0:
                moves.append((gain + loss, {**kept, name: units, other: less}))
    for gain, move in sorted(moves, key=lambda m: m[0]):
        if now + gain < now - 1e-12 * max(1.0, abs(now)) and allowed(move):
            return move
    return None


def _near(options: Sequence[int], units: int) -> list[int]:
    """The two next widths on both sides; all of a few."""
    if len(options) <= 6:
        return [u for u in options if u != units]
    at = min(range(len(options)), key=lambda i: abs(options[i] - units))
    return [u for u in options[max(0, at - 2) : at + 3] if u != units]
