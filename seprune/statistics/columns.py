"""The columns of a table of gates: whose channel each is, its rank, and its histogram bin."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

Columns = slice | Tensor

BINS = 256
_COLUMN_BITS = 19  # ranking packs (gate, float32 value, column) into one int64

# histogram axis -> (value to [0, 1], [0, 1] to value); bounded activations get equal bins
_Scale = tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]
_AXES: dict[str, _Scale] = {
    "unit": (lambda x: x, lambda t: t),
    "symmetric": (lambda x: (x + 1) / 2, lambda t: 2 * t - 1),
    "positive": (lambda x: x / (1 + x.abs()), lambda t: t / (1 - t)),
    "line": (
        lambda x: (1 + x / (1 + x.abs())) / 2,
        lambda t: (2 * t - 1) / (1 - (2 * t - 1).abs()),
    ),
}
_AXIS_OF = {
    "sigmoid": "unit",
    "hardsigmoid": "unit",
    "softmax": "unit",
    "tanh": "symmetric",
    "relu": "positive",
}


@dataclass(frozen=True)
class ColumnLayout:
    """Which columns belong to which gate; `classes` is 0 where there are no labels."""

    names: tuple[str, ...]
    channels: tuple[int, ...]
    activations: tuple[str, ...]
    classes: int
    device: torch.device

    @property
    def width(self) -> int:
        return sum(self.channels)

    @cached_property
    def starts(self) -> list[int]:
        return [sum(self.channels[:i]) for i in range(len(self.channels))]

    @cached_property
    def owner(self) -> Tensor:
        """The gate of each column."""
        counts = torch.tensor(self.channels, device=self.device, dtype=torch.long)
        return torch.arange(len(self.channels), device=self.device).repeat_interleave(counts)

    @cached_property
    def key_base(self) -> Tensor:
        columns = torch.arange(self.width, device=self.device)
        return (self.owner << (32 + _COLUMN_BITS)) + columns

    @cached_property
    def first_column(self) -> Tensor:
        return torch.tensor(self.starts, device=self.device, dtype=torch.long)[self.owner]

    @cached_property
    def middle_rank(self) -> Tensor:
        """The mean rank of each column's gate."""
        sizes = torch.tensor(self.channels, device=self.device, dtype=torch.long)
        return (sizes[self.owner] + 1) / 2

    @cached_property
    def axes(self) -> list[tuple[str, Columns]]:
        """Histogram axis -> its columns; one slice where all gates share an axis, as they do."""
        kinds = [_AXIS_OF.get(a, "line") for a in self.activations]
        if len(set(kinds)) == 1:
            return [(kinds[0], slice(None))]
        owner = self.owner.cpu()
        picks = {k: [i for i, kind in enumerate(kinds) if kind == k] for k in set(kinds)}
        return [
            (k, torch.isin(owner, torch.tensor(v)).nonzero()[:, 0].to(self.device))
            for k, v in sorted(picks.items())
        ]

    def columns(self, gates: Sequence[int]) -> Columns:
        """The columns of some gates, in their order."""
        if list(gates) == list(range(len(self.names))):
            return slice(None)
        spans = [torch.arange(self.starts[g], self.starts[g] + self.channels[g]) for g in gates]
        return torch.cat(spans).to(self.device)


def midranks(layout: ColumnLayout, x_BC: Tensor, columns: Columns = slice(None)) -> Tensor:
    """Rank (1 = smallest) of each channel among its gate's channels; ties share their mean rank.

    Values are compared in float32, the precision that gates have.
    """
    bits = (x_BC.float() + 0.0).view(torch.int32)  # + 0.0 makes -0.0 equal 0.0
    ordered = (bits ^ ((bits >> 31) & 0x7FFFFFFF)).long()
    packed = (ordered << _COLUMN_BITS) + layout.key_base[columns]
    if packed.device.type == "cpu":
        packed.numpy().sort(axis=1)  # vectorised, several times faster than torch's on CPU
    else:
        packed = packed.sort(dim=1).values
    column, value = packed & (2**_COLUMN_BITS - 1), packed >> _COLUMN_BITS
    place = torch.arange(packed.shape[1], device=packed.device).expand_as(packed)
    rank = _share_ties(value, place)
    full = rank.new_empty(len(x_BC), layout.width).scatter_(1, column, rank)[:, columns]
    if isinstance(columns, slice):
        return full - layout.first_column + 1
    owner = layout.owner[columns]
    begins = torch.searchsorted(owner.contiguous(), owner.contiguous())
    return full - begins + 1


def _share_ties(value: Tensor, place: Tensor) -> Tensor:
    """The mean position of each run of equal values in sorted rows."""
    fresh = torch.ones_like(value, dtype=torch.bool)
    torch.ne(value[:, 1:], value[:, :-1], out=fresh[:, 1:])
    if value.device.type == "cpu" and bool(fresh.all()):  # asking a GPU would stall it
        return place.double()
    last = torch.ones_like(fresh)
    last[:, :-1] = fresh[:, 1:]
    first_place = torch.where(fresh, place, 0).cummax(1).values
    last_place = torch.where(last, place, value.shape[1]).flip(1).cummin(1).values.flip(1)
    return (first_place + last_place).double() / 2


def bins(layout: ColumnLayout, x_BC: Tensor, columns: Columns = slice(None)) -> Tensor:
    """The place of each value in the flattened (columns, BINS) histogram."""
    wanted = torch.arange(layout.width, device=layout.device)[columns]
    axis_BC = x_BC
    for name, members in layout.axes:
        there = _AXES[name][0](x_BC)
        if isinstance(members, slice):
            axis_BC = there
        else:
            axis_BC = torch.where(torch.isin(wanted, members), there, axis_BC)
    place = (axis_BC * BINS).nan_to_num(0.0).clamp(0, BINS - 1).long()
    return place + wanted * BINS


def bin_edges(layout: ColumnLayout, minimum: Tensor, maximum: Tensor) -> Tensor:
    """(columns, BINS + 1) edges, cut to what was seen; values beyond an axis fill its end bins."""
    axis = torch.linspace(0, 1, BINS + 1, dtype=torch.float64, device=layout.device)
    edges = axis.repeat(layout.width, 1)
    for name, members in layout.axes:
        edges[members] = _AXES[name][1](axis)
    low, high = minimum[:, None], maximum[:, None]
    edges = torch.maximum(torch.minimum(edges, high), low)
    edges[:, :1], edges[:, -1:] = low, high
    return edges
