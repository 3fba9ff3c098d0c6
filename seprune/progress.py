"""How long work tells that it advances, without knowing who draws the bar."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Protocol, TypeVar

T = TypeVar("T")


class Track(Protocol):
    """Gives the items of `iterable` on, one by one, and shows the way to `total`.

    Args:
        iterable: the work.
        label: what is being done; may carry the last metrics.
        total: how many items `iterable` will give.
        unit: what one item is.
    """

    def __call__(
        self, iterable: Iterable[T], *, label: str, total: int, unit: str = "images"
    ) -> Iterator[T]: ...


def silent(iterable: Iterable[T], *, label: str, total: int, unit: str = "images") -> Iterator[T]:
    """A `Track` that shows nothing."""
    return iter(iterable)
