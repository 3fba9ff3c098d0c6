"""Torch's global random numbers: seeded for a while, and quickly."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


def seed_torch(seed: int, device: torch.device | str = "cpu") -> None:
    """Seed the global generator of the CPU, and of `device` if that is another.

    `torch.manual_seed` seeds those of all devices, and formats the stack for each kind of device
    that is not in use: longer than a small image takes to be augmented.
    """
    if torch.device(device).type == "cpu":
        torch.default_generator.manual_seed(seed)
    else:
        torch.manual_seed(seed)


@contextmanager
def cpu_random(seed: int) -> Iterator[None]:
    """Draw on the CPU from `seed` inside; the caller's generators are as before afterwards."""
    with torch.random.fork_rng(devices=[]):
        seed_torch(seed)
        yield
