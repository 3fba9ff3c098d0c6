"""seprune inside torch-pruning's own pruners."""

from __future__ import annotations

from typing import Any

import torch
import torch_pruning as tp
from torch import Tensor


class GateImportance(tp.importance.Importance):  # type: ignore[misc]
    """Gate statistics as an importance for any torch-pruning pruner.

    Channels that several gates scale get the mean of their scores; a group that no gate scales
    gets None, which torch-pruning reads as "leave it whole".

    Args:
        statistics: what `collect_statistics` returned.
        statistic: the per-channel value to use.
    """

    def __init__(self, statistics: Any, statistic: str = "mean") -> None:
        self.by_layer: dict[str, list[Tensor]] = {}
        for gate in statistics.gates:
            values = statistics.values[gate.name][statistic]
            for layer in gate.scales:
                if len(gate.scales) == 1:
                    self.by_layer.setdefault(layer, []).append(values)

    def __call__(self, group: Any, **_: Any) -> Tensor | None:
        scores = []
        for dependency, indices in group:
            name = str(dependency.target.name).split(" (")[0]
            if "out_channels" not in getattr(dependency.handler, "__name__", ""):
                continue
            for values in self.by_layer.get(name, []):
                if len(indices) <= len(values):
                    scores.append(values[list(indices)].float())
        same = [s for s in scores if len(s) == len(scores[0])]
        return torch.stack(same).mean(0) if same else None
