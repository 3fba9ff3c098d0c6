"""What units of one group lose together: E[(sum of u)^2], not the sum of E[u^2]."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor


def joint_scores(squares: Tensor, of_sum: Tensor) -> Tensor:
    """Scores (units,): what each unit adds when units leave in ascending order of `squares`.

    Every two units are taken to correlate alike, E[u u'] = r sqrt(E[u^2] E[u'^2]), with the r in
    [0, 1] by which all of them together lose `of_sum`. Of equal units the last one leaves first.

    Args:
        squares: (units,), E[u^2].
        of_sum: (1,), E[(sum of u)^2] over all units of the group.
    """
    squares = squares.double()
    order = len(squares) - 1 - squares.flip(0).argsort(stable=True)
    scores = torch.empty_like(squares)
    scores[order] = _added(squares[order], correlation(squares, of_sum))
    return scores


def correlation(squares: Tensor, of_sum: Tensor) -> float:
    """The r of `joint_scores`; 0 where units cancel."""
    squares, root = squares.double(), squares.double().sqrt()
    between = root.sum() ** 2 - squares.sum()
    alike = (of_sum.double() - squares.sum()) / between.clamp_min(1e-300)
    return float(alike.clamp(0, 1))


def effects_in_order(rank: Tensor, squares: Tensor, alike: float) -> Tensor:
    """Scores (units,) of units that leave in ascending order of `rank`, in squared outputs.

    A score is what the unit adds when its turn comes. Where a later unit adds less than an earlier
    one, both get their mean (isotonic regression), so that the scores keep the order of `rank`.
    Of units of equal rank the last one leaves first.

    Args:
        squares: (units,), E[u^2]; `alike`: the r of `joint_scores`.
    """
    order = len(rank) - 1 - rank.flip(0).argsort(stable=True)
    scores = torch.empty(len(rank), dtype=torch.float64)
    scores[order] = _ascending(_added(squares.double()[order], alike))
    return scores


def _added(squares: Tensor, alike: float) -> Tensor:
    """What each unit adds to E[(sum of u)^2], in the order in which they leave."""
    root = squares.sqrt()
    return squares + 2 * alike * root * (root.cumsum(0) - root)


def _ascending(values: Tensor) -> Tensor:
    """The closest ascending sequence in least squares (pool adjacent violators).

    Equal neighbours differ by 1e-9 of their value, so that a sort keeps them in order.
    """
    means: list[float] = []
    sizes: list[int] = []
    for value in values.tolist():
        means.append(value)
        sizes.append(1)
        while len(means) > 1 and means[-2] > means[-1]:
            total = means[-2] * sizes[-2] + means[-1] * sizes[-1]
            sizes[-2:] = [sizes[-2] + sizes[-1]]
            means[-2:] = [total / sizes[-1]]
    found = np.repeat(means, sizes)
    return torch.from_numpy(found * (1 + 1e-9 * np.arange(len(found)) / max(1, len(found))))
