"""How long work tells that it advances, without knowing who draws the bar."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Protocol, TypeVar

T = TypeVar("T")


class Track(Protocol):
    """Gives the items of an iterable on, one by one, and shows how far the work is."""

    def __call__(
        self,
        iterable: Iterable[T],
        *,
        label: str,
        total: int,
        unit: str = "images",
        live: Callable[[], str] | None = None,
    ) -> Iterator[T]:
        """Give the items of `iterable` on.

        Args:
            iterable: the work.
            label: what is being done.
            total: how many items `iterable` will give.
            unit: what one item is.
            live: asked again and again for the newest numbers to show beside it.
        """
        ...


def silent(
    iterable: Iterable[T],
    *,
    label: str,
    total: int,
    unit: str = "images",
    live: Callable[[], str] | None = None,
) -> Iterator[T]:
    """A `Track` that shows nothing."""
    return iter(iterable)
