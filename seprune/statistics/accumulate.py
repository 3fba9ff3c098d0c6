"""Exact streaming statistics over columns of numbers: every update is a few operations, no sync.

A column is one channel of one gate. All gates of a forward pass are updated together as one
(B, columns) float64 tensor; `State` is a plain dict of tensors, so that it can be saved, moved and
merged. Nothing in a state grows with the number of samples.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from seprune.statistics.columns import BINS, ColumnLayout, Columns, bin_edges, bins, midranks

State = dict[str, Tensor]

QUANTILES = {f"q{p:02d}": p / 100 for p in (1, 5, 25, 50, 75, 95, 99)}
LOW, HIGH = 0.05, 0.95
NEVER = 2**62  # batch index of a fault that has not happened


def new_state(layout: ColumnLayout) -> State:
    """The state before the first sample."""
    width, gates, device = layout.width, len(layout.names), layout.device

    def full(value: float, *shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
        return torch.full(shape, value, dtype=dtype, device=device)

    zeros = ("count", "mean", "m2", "low", "high", "rank", "rank_square", "before", "after")
    state = {key: full(0.0, width) for key in zeros}
    state["minimum"], state["maximum"] = full(torch.inf, width), full(-torch.inf, width)
    state["histogram"] = full(0, width, BINS, dtype=torch.int32)
    state["class_count"] = full(0.0, layout.classes, gates)
    state["class_sum"] = full(0.0, layout.classes, width)
    state["strange"] = full(0, 1, dtype=torch.int64)  # labels that are no class
    state["first_bad"] = full(NEVER, gates, dtype=torch.int64)
    return state


@dataclass(frozen=True)
class Observed:
    """Calls of some gates: values_BC and energy_BC (mean square of the features) in float64.

    `batch` says which batch the rows are of: one number, or one for each row.
    """

    gates: tuple[int, ...]
    values_BC: Tensor
    energy_BC: Tensor
    labels_B: Tensor | None
    batch: int | Tensor


def together(parts: Sequence[Observed]) -> Observed:
    """Calls of the same gates as one."""
    labels = [p.labels_B for p in parts if p.labels_B is not None]
    rows = [torch.as_tensor(p.batch).expand(len(p.values_BC)) for p in parts]
    return Observed(
        parts[0].gates,
        torch.cat([p.values_BC for p in parts]),
        torch.cat([p.energy_BC for p in parts]),
        torch.cat(labels) if labels else None,
        torch.cat(rows).to(parts[0].values_BC.device),
    )


def update(state: State, layout: ColumnLayout, seen: Observed) -> None:
    """Add the samples of one call to `state`, in place."""
    columns, x = layout.columns(seen.gates), seen.values_BC
    old, n = {k: state[k][columns] for k in ("count", "mean", "m2")}, len(x)
    mean = x.mean(0)
    spread = (x - mean).square_().sum(0)
    for key, value in _chan(old, {"count": torch.full_like(mean, n), "mean": mean, "m2": spread}):
        state[key][columns] = value
    state["minimum"][columns] = torch.minimum(state["minimum"][columns], x.amin(0))
    state["maximum"][columns] = torch.maximum(state["maximum"][columns], x.amax(0))
    deviation = midranks(layout, x, columns) - layout.middle_rank[columns]
    sums = {
        "low": (x < LOW).sum(0),
        "high": (x > HIGH).sum(0),
        "rank": deviation.sum(0),
        "rank_square": deviation.square().sum(0),
        "before": seen.energy_BC.sum(0),
        "after": (x.square() * seen.energy_BC).sum(0),
    }
    for key, value in sums.items():
        state[key][columns] += value
    filled = bins(layout, x, columns).view(-1)
    one = torch.ones((), dtype=torch.int32, device=layout.device).expand_as(filled)
    state["histogram"].view(-1).index_add_(0, filled, one)
    _update_classes(state, layout, seen)
    _note_faults(state, layout, seen)


def _update_classes(state: State, layout: ColumnLayout, seen: Observed) -> None:
    labels = seen.labels_B
    if labels is None or not layout.classes:
        return
    columns = layout.columns(seen.gates)
    state["strange"] += ((labels < 0) | (labels >= layout.classes)).sum()
    labels = labels.clamp(0, layout.classes - 1)
    one = torch.ones((), dtype=torch.float64, device=layout.device)
    if isinstance(columns, slice):
        state["class_sum"].index_add_(0, labels, seen.values_BC)
        state["class_count"].index_add_(0, labels, one.expand(len(labels), len(seen.gates)))
        return
    state["class_sum"].index_put_((labels[:, None], columns[None]), seen.values_BC, True)
    gates = torch.tensor(seen.gates, device=layout.device)
    state["class_count"].index_put_((labels[:, None], gates[None]), one, True)


def _note_faults(state: State, layout: ColumnLayout, seen: Observed) -> None:
    """Remember the first batch in which a gate was not finite."""
    columns = layout.columns(seen.gates)
    bad = ~torch.isfinite(seen.values_BC)
    rows = torch.as_tensor(seen.batch, device=layout.device).expand(len(bad))
    batch = torch.where(bad, rows[:, None], NEVER).amin(0)
    state["first_bad"].scatter_reduce_(0, layout.owner[columns], batch, "amin")


def _chan(a: State, b: State) -> list[tuple[str, Tensor]]:
    """Mean and sum of squared deviations of two sets together (Chan et al. 1979)."""
    count = a["count"] + b["count"]
    share = b["count"] / count.clamp(min=1)
    delta = b["mean"] - a["mean"]
    mean = a["mean"] + delta * share
    return [
        ("count", count),
        ("mean", mean),
        ("m2", a["m2"] + b["m2"] + delta.square() * a["count"] * share),
    ]


_EXTREMES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "minimum": torch.minimum,
    "maximum": torch.maximum,
    "first_bad": torch.minimum,
}


def merge(a: State, b: State) -> State:
    """The state of the samples of `a` and `b` together."""
    merged = {key: _EXTREMES.get(key, torch.add)(a[key], b[key]) for key in a}
    return merged | dict(_chan(a, b)) if "m2" in a else merged


def all_reduce(state: State) -> State:
    """`merge` over all processes, without holding more than one extra state."""
    lowest, highest = dist.ReduceOp.MIN, dist.ReduceOp.MAX
    ops = {"minimum": lowest, "maximum": highest, "first_bad": lowest}
    total = {k: v.clone() for k, v in state.items()}
    for key in sorted(set(total) - {"mean", "m2"}):
        dist.all_reduce(total[key], ops.get(key, dist.ReduceOp.SUM))
    if "m2" in state:
        total["mean"] = state["mean"] * state["count"]
        dist.all_reduce(total["mean"])
        total["mean"] /= total["count"].clamp(min=1)
        away = state["mean"] - total["mean"]
        total["m2"] = state["m2"] + state["count"] * away.square()
        dist.all_reduce(total["m2"])
    return total


def quantiles(state: State, layout: ColumnLayout) -> dict[str, Tensor]:
    """Quantiles of each column from its histogram, and the width of the widest bin they fell in.

    Linear within a bin, so each is wrong by less than `quantile_error`.
    """
    edges = bin_edges(layout, state["minimum"], state["maximum"])
    below = torch.nn.functional.pad(state["histogram"].double().cumsum(1), (1, 0))
    total = below[:, -1:]
    found, error = {}, torch.zeros_like(total)
    for name, q in QUANTILES.items():
        target = (q * total).contiguous()
        bins = torch.searchsorted(below[:, 1:].contiguous(), target).clamp(max=BINS - 1)
        left, right = edges.gather(1, bins), edges.gather(1, bins + 1)
        inside = below.gather(1, bins + 1) - below.gather(1, bins)
        part = (target - below.gather(1, bins)) / inside.clamp(min=1)
        found[name] = (left + (right - left) * part.clamp(0, 1))[:, 0]
        error = torch.maximum(error, right - left)
    return found | {"quantile_error": error[:, 0]}


def summarise(state: State, layout: ColumnLayout) -> list[dict[str, Tensor]]:
    """Per gate the named statistics of docs/importance.md, float64 on CPU."""
    n = state["count"].clamp(min=1)
    table = {key: state[key] for key in ("count", "mean", "minimum", "maximum")}
    table |= {"variance": state["m2"] / n, "low": state["low"] / n, "high": state["high"] / n}
    table |= {"rank": _relative_rank(state, layout), "energy_before": state["before"] / n}
    table |= {"energy_after": state["after"] / n} | quantiles(state, layout)
    table = {key: value.cpu() for key, value in table.items()}
    classes = {key: state[key].cpu() for key in ("class_count", "class_sum")}
    agreement = _agreement(state, layout)
    out = []
    for gate, (start, size) in enumerate(zip(layout.starts, layout.channels)):
        own = {k: v[start : start + size].clone() for k, v in table.items()}
        if bool(own["energy_before"].isnan().any()):  # a gate whose features cannot be seen
            del own["energy_before"], own["energy_after"]
        own["rank_agreement"] = agreement[gate]
        if layout.classes:
            sums = classes["class_sum"][:, start : start + size]
            own |= _by_class(own, classes["class_count"][:, gate].clone(), sums)
        out.append(own)
    return out


def _by_class(own: dict[str, Tensor], count: Tensor, sums: Tensor) -> dict[str, Tensor]:
    """Class means (the overall mean where a class has no sample) and the split of the variance."""
    mean = torch.where(count[:, None] > 0, sums / count.clamp(min=1)[:, None], own["mean"])
    weight = count[:, None] / count.sum().clamp(min=1)
    between = (weight * (mean - own["mean"]).square()).sum(0)
    within = (own["variance"] - between).clamp(min=0)
    return {
        "class_count": count,
        "class_mean": mean,
        "between_class": between,
        "within_class": within,
    }


def _relative_rank(state: State, layout: ColumnLayout) -> Tensor:
    """The mean rank of each channel on (0, 1), whatever the number of channels of its gate."""
    mean = state["rank"] / state["count"].clamp(min=1) + layout.middle_rank
    return (mean - 0.5) / (2 * layout.middle_rank - 1)


def _agreement(state: State, layout: ColumnLayout) -> Tensor:
    """Kendall's W of each gate's channel ranks over samples, corrected for ties; (gates,)."""
    zero = torch.zeros(len(layout.names), dtype=torch.float64, device=layout.device)
    agreed = zero.index_add(0, layout.owner, state["rank"].square())
    counts = state["count"][torch.tensor(layout.starts, device=layout.device, dtype=torch.long)]
    possible = counts * zero.index_add(0, layout.owner, state["rank_square"])
    return torch.where(possible > 0, agreed / possible.clamp(min=1e-300), 0).cpu()


def new_effect(width: int, device: torch.device) -> State:
    """The state of the moments of `u` before the first sample."""
    zero = torch.zeros(width, dtype=torch.float64, device=device)
    return {key: zero.clone() for key in ("count", "sum", "absolute", "square")}


def update_effect(state: State, u_BC: Tensor, columns: Columns = slice(None)) -> None:
    """Add one `u` per sample and column to its moments, in place."""
    u = u_BC.double()
    state["count"][columns] += len(u)
    state["sum"][columns] += u.sum(0)
    state["absolute"][columns] += u.abs().sum(0)
    state["square"][columns] += u.square().sum(0)


def summarise_effect(state: State) -> State:
    """E[u], E|u| and E[u^2] of each column, on CPU."""
    n = state["count"].clamp(min=1)
    found = {
        "count": state["count"],
        "effect_mean": state["sum"] / n,
        "effect_absolute": state["absolute"] / n,
        "effect_square": state["square"] / n,
    }
    return {key: value.cpu() for key, value in found.items()}
