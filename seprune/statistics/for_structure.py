"""Which unit gates and couplings give a score to every dependency group of a structure."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch

from seprune.graph.groups import NetworkStructure
from seprune.statistics.gate_gradients import Couplings, UnitGate


def units_and_couplings(
    structure: NetworkStructure,
) -> tuple[Mapping[str, UnitGate], Couplings]:
    """The unit gates by name, and which channels of which gates share a group's unit."""
    units: dict[str, UnitGate] = {}
    couplings = {}
    for group in structure.groups:
        members = []
        for source in group.sources:
            index = np.full(source.total, -1)
            index[source.index] = np.arange(group.units)[:, None]
            members.append((source.name, torch.from_numpy(index)))
            if source.tap is not None and source.kind != "gate":
                units[source.name] = UnitGate(source.tap, source.channel_dim, source.total)
        if members:
            couplings[group.name] = members
    return units, couplings
