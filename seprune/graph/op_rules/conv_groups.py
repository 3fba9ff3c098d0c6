"""Grouped convolutions keep as many channels in every conv group: which of them go together.

Channels that other layers tie (a shuffle, a sum, a concatenation) may already be as many in every
conv group; only what is not is matched here, so that no more than necessary goes as one.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from seprune.graph.channel_ids import FIXED, Walker, joined, solve

Array = np.ndarray[Any, np.dtype[np.int64]]


def even_out(walker: Walker) -> None:
    """Tie channels until whatever goes takes the same number out of every conv group.

    Every side is evened out on top of the one before: unions of even classes stay even.
    """
    classes = solve(walker.result)
    for ids, where in walker.result.even:
        rows = torch.where(ids > 0, classes[ids.clamp_min(0)], FIXED)
        pairs = torch.from_numpy(partners(rows.numpy()))
        if len(pairs):
            walker.tie(pairs[:, 0], pairs[:, 1], where)
            classes = joined(len(classes), pairs[(pairs > 0).all(1)])[classes]


def partners(rows: Array) -> Array:
    """Pairs (n, 2) of classes to tie; `rows` (conv groups, channels of each) holds the classes.

    Classes that stand in every row equally often need no partner. Those that stand m times in one
    row and nowhere else are matched, the k-th of a row with the k-th of each other row. What is
    left has as many positions in every row and is tied position by position.
    """
    names, place = np.unique(rows, return_inverse=True)
    place = place.reshape(rows.shape)
    counts = np.stack([np.bincount(row, minlength=len(names)) for row in place], 1)
    done = (counts == counts[:, :1]).all(1)
    pairs = []
    for times in np.unique(counts[_alone(counts)].max(1, initial=0)):
        matched = _matched(place, np.flatnonzero(_alone(counts) & (counts.max(1) == times)))
        done[matched] = True
        pairs.append(_pairs(matched))
    rest = place[~done[place]].reshape(len(rows), -1)
    pairs.append(_pairs(rest))
    return np.asarray(names[np.concatenate(pairs)], dtype=np.int64)


def _alone(counts: Array) -> np.ndarray[Any, np.dtype[np.bool_]]:
    """Which classes stand in a single row."""
    return np.asarray((counts > 0).sum(1) == 1)


def _matched(place: Array, chosen: Array) -> Array:
    """(rows, matches): the chosen classes of every row by first position, as many as all have."""
    queues = []
    for row in place:
        found, first = np.unique(row, return_index=True)
        mine = np.isin(found, chosen)
        queues.append(found[mine][np.argsort(first[mine])])
    shortest = min(map(len, queues))
    return np.stack([queue[:shortest] for queue in queues])


def _pairs(rows: Array) -> Array:
    """Every row with the first."""
    first = np.broadcast_to(rows[:1], rows[1:].shape)
    return np.stack([first.reshape(-1), rows[1:].reshape(-1)], 1)
