"""What a network loses without a part of one dependency group: measured, not estimated.

The lowest-scored units of one group at a time are masked where they are read, which is what a cut
would do, and the network answers some images of the validation split. Nothing is recovered, and
nothing else is cut.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from seprune.errors import InputError, UsageError
from seprune.graph.groups import ChannelGroup, NetworkStructure
from seprune.importance import Importance
from seprune.measure.metrics import Evaluation, evaluate
from seprune.runtime.distributed import join, resolve_device
from seprune.runtime.inference import evaluating
from seprune.runtime.progress import Track, silent
from seprune.runtime.text import null_for_nan, shell_word
from seprune.runtime.typed import Positive, read_typed
from seprune.statistics.batches import open_batches
from seprune.tasks import Task

SHARES = (0.1, 0.3, 0.5)


@dataclass(frozen=True)
class SensitivityOptions:
    """`shares`: of each group that are taken away; `device`: `auto`, `cpu`, `cuda`, ...

    `task`: by default what the targets look like.
    """

    shares: tuple[float, ...] = SHARES
    device: str | torch.device = "auto"
    task: Task | None = None


@dataclass(frozen=True)
class AblationLoss:
    """The network without `removed` units of a group.

    `value` is that of the metric that decides in the task.
    """

    removed: int
    value: float
    loss: float


@dataclass(frozen=True)
class GroupSensitivity:
    """One dependency group: a `AblationLoss` for each share, in their order."""

    group: str
    units: int
    macs: int  # of one sample that one unit is worth, everything else being whole
    losses: tuple[AblationLoss, ...]


@dataclass(frozen=True)
class Sensitivity:
    """All groups that have a score, beside the uncut network on the same images."""

    criterion: str
    shares: tuple[float, ...]
    images: int
    metric: str
    value: float
    loss: float
    groups: tuple[GroupSensitivity, ...]

    def plain(self) -> dict[str, Any]:
        """Plain JSON types."""
        rows = [
            {"group": g.group, "units": g.units, "macs": g.macs,
             "removed": [x.removed for x in g.losses], "value": [x.value for x in g.losses],
             "loss": null_for_nan([x.loss for x in g.losses])}
            for g in self.groups
        ]  # fmt: skip
        facts = {"criterion": self.criterion, "shares": list(self.shares), "images": self.images}
        dense = {"metric": self.metric, "value": self.value, "loss": self.loss}
        return {**facts, **dense, "groups": rows}

    @classmethod
    def load(cls, path: Path) -> Sensitivity:
        """What `plain` gave, out of a JSON file.

        Raises:
            InputError: it is not that.
        """
        read = read_typed(_Plain, path, fix=f"remove it: rm {shell_word(path)}", code="damaged")
        groups = tuple(
            GroupSensitivity(
                row.group, row.units, row.macs,
                tuple(map(AblationLoss, row.removed, row.value, map(_or_nan, row.loss))),
            )
            for row in read.groups
        )  # fmt: skip
        return cls(
            read.criterion, read.shares, read.images, read.metric, read.value, read.loss, groups
        )


@dataclass(frozen=True)
class _Row:
    """A `GroupSensitivity` as JSON."""

    group: str
    units: Positive
    macs: int
    removed: list[Positive]
    value: list[float]
    loss: list[float | None]

    def __post_init__(self) -> None:
        if not 0 < len(self.removed) == len(self.value) == len(self.loss):
            raise ValueError("lists of different lengths")


@dataclass(frozen=True)
class _Plain:
    """A `Sensitivity` as JSON."""

    criterion: str
    shares: tuple[float, ...]
    images: Positive
    metric: str
    value: float
    loss: float
    groups: list[_Row]


def _or_nan(number: float | None) -> float:
    return math.nan if number is None else number


def measure_sensitivity(
    model: nn.Module,
    structure: NetworkStructure,
    importance: Importance,
    loader: Iterable[Any],
    *,
    options: SensitivityOptions | None = None,
    track: Track = silent,
) -> Sensitivity:
    """Top-1 and loss without the lowest-scored shares of each group, one group at a time.

    Args:
        loader: batches of (images, labels) of a split that neither calibrates nor reports; they
            are gone through once for every group and share, so a few hundred images will do.

    Raises:
        UsageError: a share that is not between 0 and 1.
        InputError: no images, or no group with a score.
    """
    options = options or SensitivityOptions()
    shares = options.shares
    wrong = [share for share in shares if not 0 < share < 1]
    if wrong or not shares:
        raise UsageError(
            f"{wrong[0] if wrong else 'nothing'} is no share of a group",
            why="a share says how much of a group is taken away, between 0 and 1",
            fix="for example 0.1,0.3,0.5",
        )
    groups = [g for g in structure.groups if g.prunable and g.name in importance.scores]
    if not groups:
        raise InputError(
            "no dependency group has a score",
            why="none of them can be cut, or the criterion has nothing to say about them",
            fix="see: seprune inspect MODEL",
        )
    place = resolve_device(options.device)
    with evaluating(model, place):
        task, _, batches = open_batches(
            loader, place, *join(place), task=options.task, labelled=True
        )
        answer = partial(evaluate, model, list(batches), task=task, device=str(place))
        uncut = answer()
        work = itertools.product(groups, shares)
        total, found = len(groups) * len(shares), []
        for group, share in track(work, label="masking", total=total, unit="cuts"):
            gone = lowest(importance, group, share)
            with masked(model, group, gone):
                found.append(_loss(len(gone), answer()))
    rows = (
        GroupSensitivity(g.name, g.units, _macs(structure, g), tuple(found[i : i + len(shares)]))
        for g, i in zip(groups, range(0, total, len(shares)))
    )
    return Sensitivity(
        criterion=importance.criterion,
        shares=shares,
        images=uncut.count,
        metric=uncut.metric,
        value=uncut.value,
        loss=uncut.loss,
        groups=tuple(rows),
    )


def weighed(importance: Importance, found: Sensitivity) -> Importance:
    """The scores in the measured currency: what each unit adds to the loss when its turn comes.

    Within a group the order stays. Between two shares the loss is a straight line, made convex
    from below (no later unit costs less); after the last share its slope goes on growing as it did
    before. Groups that were not measured are left out.
    """
    scores = {}
    for row in found.groups:
        own = importance.scores.get(row.group)
        if own is not None and len(own) == row.units:
            slopes = torch.from_numpy(_slopes(row, found.loss))
            scores[row.group] = torch.empty_like(slopes).index_copy_(
                0, own.argsort(stable=True), slopes
            )
    return Importance(importance.criterion, scores, additive=True)


def _slopes(row: GroupSensitivity, uncut: float) -> np.ndarray[Any, np.dtype[np.float64]]:
    """AblationLoss per unit of the group, in the order of removal."""
    removed = np.array([0, *(x.removed for x in row.losses)], dtype=float)
    losses = np.array([uncut, *(x.loss for x in row.losses)], dtype=float)
    losses[~np.isfinite(losses)] = 1e9  # an answer that is not finite: the group stays
    removed, first = np.unique(removed, return_index=True)
    slopes = np.maximum.accumulate(np.maximum(np.diff(losses[first]) / np.diff(removed), 0))
    middles = (removed[1:] + removed[:-1]) / 2
    growth = 0.0
    if len(slopes) > 1:
        growth = float((slopes[-1] - slopes[-2]) / (middles[-1] - middles[-2]))
    ranks = np.arange(row.units) + 0.5
    found = slopes[np.minimum(np.searchsorted(removed[1:], ranks), len(slopes) - 1)]
    beyond = np.maximum(ranks - removed[-1], 0)
    ties = 1e-12 * ranks  # the order within the group survives
    return np.asarray(found + growth * beyond + ties)


def lowest(importance: Importance, group: ChannelGroup, share: float) -> list[int]:
    """The units of a share of a group (one at least, never all) with the lowest scores."""
    count = min(max(1, round(share * group.units)), group.units - 1)
    order = importance.scores[group.name].argsort(stable=True)
    return sorted(order[:count].tolist())


@contextmanager
def masked(model: nn.Module, group: ChannelGroup, gone: Sequence[int]) -> Iterator[None]:
    """The units `gone` of a group are masked while the context is open.

    Their channels are zero where layers read them, and in bare parameters; the answer is that of
    the cut network but for layers that look at all channels together (GroupNorm).
    """
    modules, parameters = dict(model.named_modules()), dict(model.named_parameters())
    handles, changed = [], []
    try:
        for member in group.members:
            index = torch.from_numpy(member.index[list(gone)].reshape(-1))
            if member.side == "in" and member.layer in modules:
                layer = modules[member.layer]
                dim = -1 if isinstance(layer, nn.Linear) else 1
                handles.append(layer.register_forward_pre_hook(partial(_zero, index, dim)))
            elif member.side.startswith("dim") and member.layer in parameters:
                parameter = parameters[member.layer]
                changed.append((parameter, parameter.detach().clone()))
                with torch.no_grad():
                    parameter.index_fill_(int(member.side[3:]), index.to(parameter.device), 0)
        yield
    finally:
        for handle in handles:
            handle.remove()
        with torch.no_grad():
            for parameter, before in reversed(changed):
                parameter.copy_(before)


def _zero(index: Tensor, dim: int, _module: nn.Module, inputs: tuple[Any, ...]) -> Any:
    return (inputs[0].index_fill(dim, index.to(inputs[0].device), 0), *inputs[1:])


def _loss(removed: int, found: Evaluation) -> AblationLoss:
    return AblationLoss(removed, found.value, found.loss)


def _macs(structure: NetworkStructure, group: ChannelGroup) -> int:
    full = structure.full_widths()
    less = {**full, group.name: group.units - 1}
    return structure.macs_at(full) - structure.macs_at(less)
