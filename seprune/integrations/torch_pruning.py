"""seprune's scores inside torch-pruning's own pruners."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch_pruning as tp
from torch import Tensor, nn

from seprune.errors import InputError
from seprune.graph.groups import NetworkStructure
from seprune.importance.criteria import Scoring, score
from seprune.statistics.result import GateStatistics

SQUARE = "effect_square"


class GateImportance(tp.importance.Importance):  # type: ignore[misc]
    """Gate statistics as an importance for any torch-pruning pruner; higher means keep.

    Every group of torch-pruning gets non-negative scores (channels,), never None: channels that
    the statistics cover, by the gates and unit gates of their layers, scattered to the channels of
    the group's root; a group that they do not cover by the magnitude of its weights, scaled to the
    mean of all scores. What a pruner removes in one step is followed in the next.

    Args:
        statistics: what `collect_statistics` returned. Collected with `structure`, they cover
            groups without a gate too.
        statistic: without a structure, the value per channel; default: `effect_square` where
            the statistics hold derivatives, else `mean`.
        structure: what `analyse` returned; then any criterion of seprune can be used.
        model: for criteria that look at weights.
        scoring: with a structure, how statistics become scores; default: `Scoring()` where the
            statistics hold derivatives, else `gate_mean`.

    Raises:
        InputError: a layer was cut by something that this importance did not see.
    """

    def __init__(
        self,
        statistics: GateStatistics,
        statistic: str | None = None,
        *,
        structure: NetworkStructure | None = None,
        model: nn.Module | None = None,
        scoring: Scoring | None = None,
    ) -> None:
        derivatives = statistics.gradients not in ("none", "weights")
        if structure is None:
            self.scores = _of_statistics(
                statistics, statistic or (SQUARE if derivatives else "mean")
            )
        else:
            scoring = scoring or Scoring("gate_logit" if derivatives else "gate_mean")
            self.scores = _of_structure(structure, statistics, model, scoring)
        self.left = {layer: torch.arange(len(s)) for layer, s in self.scores.items()}
        self.level = float(torch.cat([torch.zeros(1), *self.scores.values()]).mean()) or 1.0
        self.magnitude = tp.importance.GroupMagnitudeImportance(p=2, normalizer="mean")
        self.layouts: dict[str, list[tuple[str, Tensor, Tensor]]] = {}
        self.replayed = 0

    def __call__(self, group: Any, **_: Any) -> Tensor:
        graph = group._DG
        self._follow(graph.pruning_history())
        layout = [
            (name, torch.tensor(group[i].root_idxs), torch.tensor(list(indices)))
            for i, (dependency, indices) in enumerate(group)
            if (name := graph._module2name.get(dependency.target.module, "")) in self.left
            and "out_channels" in getattr(dependency.handler, "__name__", "")
        ]
        self.layouts[graph._module2name[group[0].dep.target.module]] = layout
        width = len(group[0].idxs)
        total, hits = torch.zeros(width), torch.zeros(width)
        for name, roots, channels in layout:
            self._require_followed(name, graph, channels)
            values = self.scores[name][self.left[name][channels]]
            total.scatter_add_(0, roots, values)
            hits.scatter_add_(0, roots, torch.ones(len(roots)))
        if not bool((hits > 0).all()):
            found: Tensor = self.magnitude(group).detach().cpu().float() * self.level
            return torch.where(hits > 0, total / hits.clamp_min(1), found)
        return total / hits

    def _follow(self, history: Sequence[Sequence[Any]]) -> None:
        """Leave out the channels that pruners removed since the last call."""
        if len(history) < self.replayed:  # the importance serves another pruner now
            self.replayed = 0
        for root, is_out, removed in history[self.replayed :]:
            gone = torch.tensor(list(removed))
            for name, roots, channels in self.layouts.get(root, []) if is_out else []:
                cut = channels[torch.isin(roots, gone)]
                stays = ~torch.isin(torch.arange(len(self.left[name])), cut)
                self.left[name] = self.left[name][stays]
        self.replayed = len(history)

    def _require_followed(self, name: str, graph: Any, channels: Tensor) -> None:
        module = graph.model.get_submodule(name)
        has = int(getattr(module, "out_channels", getattr(module, "out_features", 0)) or 0)
        known = len(self.left[name])
        if has not in (0, known) or int(channels.max()) >= known:
            raise InputError(
                f"layer '{name}' has {has} outputs, and the statistics hold {known}",
                why="it was cut since they were collected, by something that this importance did "
                "not see",
                fix="collect statistics of the network as it is now",
                code="statistics",
            )


def _of_statistics(statistics: GateStatistics, statistic: str) -> dict[str, Tensor]:
    """Scores (channels,) by layer, from the gates that scale it alone and from its unit gates."""
    scores = {n: table[statistic] for n, table in statistics.units.items() if statistic in table}
    for gate in statistics.gates:
        if gate.runs and len(gate.scales) == 1 and gate.name in statistics.values:
            table = statistics.values[gate.name]
            if statistic not in table:
                raise InputError(
                    f"the statistics hold no '{statistic}'",
                    why=f"they hold {', '.join(sorted(table))}; derivatives are: "
                    f"{statistics.gradients}",
                    fix="collect_statistics(model, loader, structure=structure)",
                    code="statistics",
                )
            value = table[statistic]
            layer = gate.scales[0]
            same = layer in scores and len(scores[layer]) == len(value)
            scores[layer] = (scores[layer] + value) / 2 if same else value
    return {name: value.detach().cpu().float().clamp_min(0) for name, value in scores.items()}


def _of_structure(
    structure: NetworkStructure,
    statistics: GateStatistics,
    model: nn.Module | None,
    scoring: Scoring,
) -> dict[str, Tensor]:
    """Scores (channels,) by layer: each channel's unit."""
    found = score(structure, statistics, model=model, scoring=scoring).scores
    scores: dict[str, Tensor] = {}
    for group in structure.groups:
        for member in group.members if group.name in found else ():
            if member.side == "out":
                values = scores.setdefault(member.layer, torch.zeros(member.total))
                index = torch.from_numpy(member.index)
                values[index] = found[group.name].float()[:, None].expand(index.shape)
    return {name: value.clamp_min(0) for name, value in scores.items()}
