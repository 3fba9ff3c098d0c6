"""How many images go through a network at once, by the memory that there is."""

from __future__ import annotations

from typing import Literal

import torch

from seprune.errors import UsageError
from seprune.graph.trace import Trace
from seprune.measure.activations import peak_bytes, saved_bytes
from seprune.runtime.memory import memory_budget

_COPIES = 2  # of what a pass keeps: its values, and those that hooks and kernels add for a while


def most_images(
    trace: Trace,
    device: torch.device,
    *,
    memory: int | Literal["auto"],
    derivatives: bool,
) -> int:
    """Images at once for which forward, and backward with `derivatives`, fit into `memory`.

    Args:
        trace: of one pass.
        memory: bytes, or `auto`: a share of what the machine, the cgroup or the GPU has free.

    Raises:
        UsageError: not even one image fits.
    """
    one = _COPIES * (saved_bytes(trace) if derivatives else peak_bytes(trace))
    budget = memory_budget(device, memory)
    if one > budget and memory != "auto":
        raise UsageError(
            f"memory={budget:,} bytes is too little for one image",
            why=f"one image needs {one:,} bytes in one pass of this network",
            fix=f"give memory={one} or more, or memory=auto",
        )
    return max(1, budget // max(1, one))
