"""What a network costs at any widths: MACs and parameters as products of widths."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor, nn

from seprune.graph.channel_ids import ChannelIds


@dataclass(frozen=True)
class Term:
    """A cost that is proportional to the width of every factor.

    A factor is (fixed positions, {group: positions per unit}, all positions).
    """

    cost: int
    factors: tuple[tuple[int, Mapping[str, int], int], ...]
    layer: str = ""

    def at(self, kept: Mapping[str, int]) -> int:
        """The cost with `kept` units in each group."""
        top, bottom = self.cost, 1
        for fixed, groups, total in self.factors:
            top *= fixed + sum(each * kept[name] for name, each in groups.items())
            bottom *= total
        return top // bottom


class CostTerms:
    """The cost terms of a recorded pass.

    Args:
        classes: of every channel id.
        owner: the group of every class that has one.
        units: of every group.
    """

    def __init__(
        self,
        channel_ids: ChannelIds,
        classes: np.ndarray[Any, np.dtype[np.int64]],
        owner: Mapping[int, str],
        units: Mapping[str, int],
    ) -> None:
        self.channel_ids, self.classes = channel_ids, classes
        self.owner, self.units = owner, units

    def macs(self) -> tuple[Term, ...]:
        """Multiply-accumulates of one sample."""
        return tuple(
            Term(cost.macs, tuple(self.factor(f) for f in cost.factors), cost.layer)
            for cost in self.channel_ids.costs
        )

    def params(self, model: nn.Module) -> tuple[Term, ...]:
        """Parameters, each tensor once."""
        sides = {(s.layer, s.side): s.ids for s in self.channel_ids.slots}
        terms = []
        for path, parameter in model.named_parameters():
            owner, _, leaf = path.rpartition(".")
            dims = [(path, f"dim{d}") for d in range(parameter.dim())]
            factors = [sides[side] for side in dims if side in sides]
            module = self._of_module(sides, owner, leaf, tuple(parameter.shape))
            # a weight that the forward also reads by name has both kinds of sides
            known = [self.classes_of(factor) for factor in factors]
            for ids in module:
                if not any(np.array_equal(self.classes_of(ids), other) for other in known):
                    factors.append(ids)
            terms.append(Term(parameter.numel(), tuple(self.factor(f) for f in factors), path))
        return tuple(terms)

    def _of_module(
        self, sides: Mapping[tuple[str, str], Tensor], owner: str, leaf: str, shape: tuple[int, ...]
    ) -> list[Tensor]:
        """The sides of a layer along which one of its parameters lies."""
        out, into = sides.get((owner, "out")), sides.get((owner, "in"))
        turned = owner in self.channel_ids.transposed_groups and leaf == "weight"
        found = [out] if out is not None and (turned or len(out) in shape[:2]) else []
        if leaf != "weight" or into is None or owner in self.channel_ids.by_conv_group:
            return found
        # a weight that is used in slices has inputs, and no outputs of its length
        return [*found, into] if found or (len(shape) > 1 and len(into) == shape[1]) else []

    def classes_of(self, ids: Tensor) -> np.ndarray[Any, np.dtype[np.int64]]:
        """The class at every position of a side."""
        found: np.ndarray[Any, np.dtype[np.int64]] = self.classes[ids.clamp_min(0).numpy()]
        return found

    def factor(self, ids: Tensor) -> tuple[int, Mapping[str, int], int]:
        """(fixed positions, {group: positions per unit}, all positions) of a side."""
        counts: dict[str, int] = {}
        classes = self.classes_of(ids)
        for number, count in zip(*np.unique(classes, return_counts=True)):
            name = self.owner.get(int(number), "")
            counts[name] = counts.get(name, 0) + int(count)
        fixed = counts.pop("", 0)
        return fixed, {n: c // self.units[n] for n, c in counts.items()}, len(classes)
