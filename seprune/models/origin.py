"""Where a network came from: the name and arguments that it was built by, kept with the module."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import nn

_KEY = "_seprune_origin"  # in the module's own dict, so that copies of the module have it too


@dataclass(frozen=True)
class Origin:
    """The arguments of the `build` that made a network."""

    name: str
    classes: int | None = None
    input: tuple[int, int, int] | None = None
    args: Mapping[str, Any] = field(default_factory=dict)


def origin_of(model: nn.Module) -> Origin | None:
    """What `build` was asked for; None for a network that was not built by name."""
    found = vars(model).get(_KEY)
    return found if isinstance(found, Origin) else None


def remember(model: nn.Module, origin: Origin) -> nn.Module:
    """The model, which knows its origin from now on."""
    vars(model)[_KEY] = origin
    return model
