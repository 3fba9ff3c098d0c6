"""Whether statistics are as wide as the network that they are to score."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from torch import Tensor, nn

from seprune.errors import InputError
from seprune.graph.groups import NetworkStructure
from seprune.statistics import GateStatistics

NOT_CHANNELS = ("rank_agreement", "effect_sum_square", "class_count")


def require_fit(
    structure: NetworkStructure, statistics: GateStatistics, model: nn.Module | None
) -> None:
    """Refuse statistics of other widths, whatever network they say they are of.

    Raises:
        InputError: names the first table that does not fit.
    """
    for owner, own, shape in _tables(structure, statistics, model):
        for name, tensor in own.items():
            if name not in NOT_CHANNELS and tuple(tensor.shape[-len(shape) :]) != shape:
                raise InputError(
                    f"the statistics do not fit this network: {owner}, {name}",
                    why=f"its shape is {tuple(tensor.shape)}, {shape} is needed",
                    fix="collect again for this model: seprune collect",
                    code="statistics",
                )


def _tables(
    structure: NetworkStructure, statistics: GateStatistics, model: nn.Module | None
) -> Iterator[tuple[str, Mapping[str, Tensor], tuple[int, ...]]]:
    """Each table of the statistics that scores are made of, and the shape that it should have."""
    for gate in structure.gates:
        yield gate.name, statistics.values.get(gate.name, {}), (gate.channels,)
    for group in structure.groups:
        yield group.name, statistics.groups.get(group.name, {}), (group.units,)
        for source in group.sources:
            if source.kind != "gate":
                yield source.name, statistics.units.get(source.name, {}), (source.total,)
    for name, weight in model.named_parameters() if model is not None else ():
        yield name, statistics.weights.get(name, {}), tuple(weight.shape[:2])
