"""Where channels may be removed: which groups are not pruned and why, and which rank together."""

from __future__ import annotations

import fnmatch
from dataclasses import dataclass, replace
from typing import Any, Literal

from seprune.graph.groups import ChannelGroup, NetworkStructure
from seprune.importance import Importance
from seprune.pruning.removals import Part

NARROW = 64  # channels
WIDE_FLOOR = 0.2
SCALED = "SE hidden width: follows its channels"


@dataclass(frozen=True)
class Allocation:
    """Where channels may be removed.

    Attributes:
        scope: `global`, `isomorphic`, `uniform`, `cost_aware`, `sensitivity` (cost-aware, by scores
            that `ablation.weighed` made), or `auto`: `cost_aware` where scores add up, else
            `global`.
        floor: fraction of every group that stays; `min_channels`: channels that stay, by default
            2 where allocation is cost-aware, else 8: a ranking by scores alone is not to be
            trusted with the last ones.
        round_to: widths are multiples of this where a group has that many channels; None: of what
            is fast on CPUs, see `fast_multiple`.
        protect: globs of layers and groups that are not pruned.
        bottleneck: SE hidden widths: `keep`, `scale` with the channels they gate, or `rank`.
        parts: gates and blocks that a latency budget may take out, where scores are additive.
    """

    scope: Literal["auto", "global", "uniform", "isomorphic", "cost_aware", "sensitivity"] = "auto"
    floor: float = 0.1
    min_channels: int | None = None
    round_to: int | None = 1
    protect: tuple[str, ...] = ()
    bottleneck: Literal["keep", "scale", "rank"] = "keep"
    parts: tuple[Part, ...] = ()

    def settled(self, importance: Importance) -> Allocation:
        """The same with `auto` decided for these scores."""
        if self.scope != "auto":
            return self
        return replace(self, scope="cost_aware" if importance.additive else "global")

    def others(self) -> dict[str, Allocation]:
        """Allocations by name to be tried beside this one, where `scope` is open.

        A ranking empties some groups down to their floors, which a network that nothing recovers
        stands least of all.
        """
        if self.scope != "auto":
            return {}
        wide = replace(self, floor=max(self.floor, WIDE_FLOOR))
        return {f"floor {WIDE_FLOOR}": wide, "global": replace(self, scope="global")}

    @property
    def cost_aware(self) -> bool:
        """Whether units go in the order of score per cost."""
        return self.scope in ("cost_aware", "sensitivity")

    def multiple(self, channels: int) -> int:
        """What the width of a dependency group of so many channels is a multiple of."""
        return self.round_to or fast_multiple(channels)

    @property
    def fewest(self) -> int:
        """Channels of every group that stay."""
        return self.min_channels or (2 if self.cost_aware else 8)


def fast_multiple(channels: int) -> int:
    """16, or 8 in groups so narrow that 16 would leave hardly a choice.

    ONNX Runtime and oneDNN compute channels in blocks of 16 where the CPU has AVX-512: at half of
    the MACs, multiples of 16 were the fastest on all networks measured (docs/latency.md).
    """
    return 16 if channels >= NARROW else 8


def why_uncut(group: ChannelGroup, importance: Importance, allocation: Allocation) -> str | None:
    """Why a group is not pruned, or None."""
    if not group.prunable:
        return group.reason
    names = {group.name, *group.layers}
    for pattern in allocation.protect:
        if any(fnmatch.fnmatchcase(name, pattern) for name in names):
            return f"protected by '{pattern}'"
    if group.role == "bottleneck" and allocation.bottleneck != "rank":
        return "SE hidden width: kept" if allocation.bottleneck == "keep" else SCALED
    return None if group.name in importance.scores else "it has no score"


def kind(group: ChannelGroup) -> tuple[Any, ...]:
    """Groups of the same width and the same kinds of layers are of one kind (2403.14729)."""
    leaves = tuple(sorted({m.layer.rpartition(".")[2] + m.side for m in group.members}))
    return (group.role, group.units, leaves)


def followers(structure: NetworkStructure) -> dict[str, ChannelGroup]:
    """For every gated group the bottleneck of its gate."""
    hidden = {layer: g for g in structure.groups if g.role == "bottleneck" for layer in g.layers}
    found = {}
    for group in structure.groups:
        for link in group.gates:
            gate = next(g for g in structure.gates if g.name == link.gate)
            for layer in gate.excitation:
                if layer in hidden and hidden[layer].name != group.name:
                    found[group.name] = hidden[layer]
    return found
