"""What units of one group lose together: E[(sum of u)^2], not the sum of E[u^2]."""

from __future__ import annotations

import torch
from torch import Tensor

_STEP = 1e-9  # a unit that goes later is worth this much more, relatively: the order survives


def joint_scores(pairs: Tensor) -> Tensor:
    """Scores (units,) whose ascending order is the order of elimination.

    Units leave one by one, each time the one that adds least to the loss of all that are gone;
    its score is what it adds, or what one before it added if that was more.

    Args:
        pairs: (units, units), E[u u'].
    """
    pairs = pairs.double()
    own, crossed = pairs.diagonal().clone(), torch.zeros(len(pairs), dtype=torch.float64)
    scores, here = torch.zeros_like(own), torch.ones(len(pairs), dtype=torch.bool)
    highest = 0.0
    for _ in range(len(pairs)):
        adds = torch.where(here, own + 2 * crossed, torch.inf)
        unit = int(adds.argmin())
        highest = max(highest * (1 + _STEP), float(adds[unit]))
        scores[unit] = highest
        crossed += pairs[:, unit]
        here[unit] = False
    return scores
