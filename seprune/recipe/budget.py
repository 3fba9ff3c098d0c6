"""Budgets: how much of a network is kept, read once from what a recipe or a caller gives."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import Any

from seprune.errors import InputError, UsageError

_SUFFIX = {"K": 10**3, "M": 10**6, "G": 10**9}


@dataclass(frozen=True)
class Limit:
    """One limit of a budget.

    Attributes:
        value: a fraction kept (float, between 0 and 1) or an amount (int, or milliseconds).
        written: the value as it was given, for messages and names.
        milliseconds: whether it is an amount of time.
    """

    value: float | int
    written: str
    milliseconds: bool = False

    @property
    def is_fraction(self) -> bool:
        """Whether it is relative to the network."""
        return isinstance(self.value, float) and not self.milliseconds


@dataclass(frozen=True)
class Budget:
    """What a pruned network may cost. It has to meet every limit that is given.

    `macs` and `params` are fractions or amounts; `latency` is a fraction or milliseconds of one
    forward pass, measured on the runtime that the recipe names.
    """

    macs: Limit | None = None
    params: Limit | None = None
    latency: Limit | None = None

    @classmethod
    def parse(cls, **given: Any) -> Budget:
        """A budget from numbers and texts: 0.5, "20M", "1.5G", "4ms", or an int above 1.

        Raises:
            UsageError: an unknown name, no limit at all, or something that is not a number.
            InputError: a fraction that is not between 0 and 1.
        """
        given = {name: value for name, value in given.items() if value is not None}
        unknown = sorted(set(given) - set(BUDGETS))
        if unknown or not given:
            raise UsageError(
                f"unknown budget '{unknown[0]}'" if unknown else "no budget is given",
                why=f"budgets are {', '.join(BUDGETS)}",
                fix="give for example macs=0.5",
                code="budget",
            )
        return cls(**{name: parse_limit(name, value) for name, value in given.items()})

    def __iter__(self) -> Iterator[tuple[str, Limit]]:
        """The limits that are given, by name."""
        found = ((f.name, getattr(self, f.name)) for f in fields(self))
        return ((name, limit) for name, limit in found if limit is not None)

    def __str__(self) -> str:
        """As in `macs 0.5 latency 0.7`."""
        return " ".join(f"{name} {limit.written}" for name, limit in self)


BUDGETS = tuple(f.name for f in fields(Budget))


def parse_limit(name: str, given: float | str) -> Limit:
    """One limit; `name` is for the message.

    Raises:
        UsageError: not a number.
        InputError: neither an amount nor a fraction between 0 and 1.
    """
    text = str(given)
    if isinstance(given, int) and given > 1 and name != "latency":
        return Limit(given, text)
    if name == "latency" and text.endswith("ms"):
        time = _number(text[:-2].strip())
        if time:
            return Limit(time, text, milliseconds=True)
    scale = _SUFFIX.get(text[-1:].upper()) if name != "latency" else None
    number = _number(text[:-1] if scale else text)
    if number is None:
        raise UsageError(
            f"budget {name}={given} is not a number",
            why="a budget says how much is kept",
            fix=f"{name}=0.5 keeps half" + _amounts(name),
            code="budget",
        )
    if scale:
        return Limit(int(number * scale), text)
    if not 0 < number < 1:
        raise InputError(
            f"budget {name}={given} is no fraction between 0 and 1",
            why="a budget says how much is kept",
            fix=f"{name}=0.5 keeps half" + _amounts(name),
            code="budget",
        )
    return Limit(number, text)


def _amounts(name: str) -> str:
    return f"; an amount is written {name}={'4ms' if name == 'latency' else '1.0G'}"


def _number(text: str) -> float | None:
    try:
        number = float(text)
    except ValueError:
        return None
    return number if 0 <= number < float("inf") else None
