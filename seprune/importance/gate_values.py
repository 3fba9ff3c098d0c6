"""Statistics of one gate that criteria rank its channels by."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor


def statistic(name: str) -> Callable[[Mapping[str, Tensor]], Tensor]:
    """The statistic of that name."""
    return lambda values: values[name]


def _signed(values: Mapping[str, Tensor]) -> bool:
    """Whether a gate takes negative values (tanh, no activation): then its size is what counts."""
    return bool((values["minimum"] < 0).any())


def mean_of(values: Mapping[str, Tensor]) -> Tensor:
    """E[g], or sqrt(E[g^2]) of a gate that takes negative values."""
    if _signed(values):
        return (values["mean"].square() + values["variance"]).sqrt()
    return values["mean"]


def maximum_of(values: Mapping[str, Tensor]) -> Tensor:
    """The largest value, or the largest size of one."""
    if _signed(values):
        return torch.maximum(values["maximum"].abs(), values["minimum"].abs())
    return values["maximum"]


def class_spread(values: Mapping[str, Tensor]) -> Tensor:
    """The largest of the class means, or the largest size of one."""
    means = values["class_mean"]
    return (means.abs() if _signed(values) else means).max(0).values
