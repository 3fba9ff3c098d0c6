"""What whoever starts the processes says in the environment: `torchrun`, a cluster, a user.

Every function raises UsageError where its variable is set to something else.
"""

from __future__ import annotations

import math
import os

from seprune.errors import UsageError

PATIENCE = 600.0
"""Seconds that a process waits in a collective, or for a sign of life of the first one."""
LONGEST = 1e8  # seconds; what a clock can add to the time


def world_size() -> int:
    """How many processes work together."""
    return max(_number("WORLD_SIZE", 1), 1)


def rank() -> int:
    """The number of this process among them; 0 where it is alone, whatever a cluster numbers."""
    return _number("RANK", 0) if world_size() > 1 else 0


def local_rank() -> int:
    """Its number among those of this machine."""
    return _number("LOCAL_RANK", 0)


def local_world_size() -> int:
    """How many of them are on this machine."""
    return max(_number("LOCAL_WORLD_SIZE", 1), 1)


def patience() -> float:
    """Seconds without a word from another process, after which it counts as gone."""
    text = os.environ.get("SEPRUNE_TIMEOUT") or str(PATIENCE)
    try:
        seconds = float(text)
    except ValueError:
        seconds = math.nan
    if not 0 < seconds <= LONGEST:
        raise _odd("SEPRUNE_TIMEOUT", text, "seconds")
    return seconds


def _number(name: str, default: int) -> int:
    text = os.environ.get(name, "").strip() or str(default)
    if not (text.isascii() and text.isdecimal()) or len(text) > 9:
        raise _odd(name, text, "a whole number, as torchrun sets it")
    return int(text)


def _odd(name: str, text: str, wanted: str) -> UsageError:
    return UsageError(
        f"{name}={text[:80]!r}: not {wanted}",
        why="the environment variable is set to it",
        fix=f"unset {name}",
    )
