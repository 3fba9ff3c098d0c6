"""Which unit gates and couplings give a score to every dependency group of a structure."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from seprune.graph.groups import NetworkStructure
from seprune.statistics.gate_gradients import Couplings


def units_and_couplings(structure: NetworkStructure) -> tuple[Sequence[str], Couplings]:
    """Modules that get a unit gate, and which channels of which gates share a group's unit."""
    units: dict[str, None] = {}
    couplings = {}
    for group in structure.groups:
        members = []
        for source in group.sources:
            index = np.full(source.total, -1)
            index[source.index] = np.arange(group.units)[:, None]
            members.append((source.name, torch.from_numpy(index)))
            if source.kind == "unit":
                units[source.name] = None
        if members:
            couplings[group.name] = members
    return tuple(units), couplings
