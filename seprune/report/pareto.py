"""Pareto fronts: who is beaten by nobody that costs at most as much."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple


class Point(NamedTuple):
    """A network where fronts are looked for.

    Attributes:
        contest: what it has in common with those that it is compared with.
        value: more is better.
    """

    contest: tuple[str, ...]
    cost: float
    value: float


def on_front(points: Sequence[Point | None]) -> list[bool]:
    """Of every point whether none of its contest costs at most as much and beats it; None never."""
    known = [point for point in points if point is not None]
    return [point is not None and not any(_beats(q, point) for q in known) for point in points]


def _beats(one: Point, other: Point) -> bool:
    better = one.cost <= other.cost and one.value >= other.value
    return one.contest == other.contest and better and one != other
