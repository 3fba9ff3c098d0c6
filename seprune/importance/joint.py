"""What units of one group lose together: E[(sum of u)^2], not the sum of E[u^2]."""

from __future__ import annotations

import torch
from torch import Tensor


def joint_scores(squares: Tensor, whole: Tensor) -> Tensor:
    """Scores (units,): what each unit adds when units leave in ascending order of `squares`.

    Every two units are taken to correlate alike, E[u u'] = r sqrt(E[u^2] E[u'^2]), with the r in
    [0, 1] by which all of them together lose `whole`. Of equal units the last one leaves first.

    Args:
        squares: (units,), E[u^2].
        whole: (1,), E[(sum of u)^2] over all units of the group.
    """
    squares, root = squares.double(), squares.double().sqrt()
    between = root.sum() ** 2 - squares.sum()
    alike = ((whole.double() - squares.sum()) / between.clamp_min(1e-300)).clamp(0, 1)
    order = len(root) - 1 - squares.flip(0).argsort(stable=True)
    before = torch.empty_like(root)
    before[order] = root[order].cumsum(0) - root[order]
    return squares + 2 * alike * root * before
