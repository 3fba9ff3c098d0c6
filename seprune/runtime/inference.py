"""A model in evaluation mode on a device, and as it was afterwards."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from seprune.errors import EnvironmentFault, first_line
from seprune.runtime.distributed import out_of_memory


@contextmanager
def evaluating(model: nn.Module, device: torch.device | None = None) -> Iterator[None]:
    """`model` in eval mode, on `device` if given; afterwards modes and device are as before."""
    modes = [(module, module.training) for module in model.modules()]
    home = device_of(model)
    try:
        model.eval()
        if device is not None:
            model.to(device)
        yield
    except RuntimeError as error:
        if device is None or not out_of_memory(error):
            raise
        raise EnvironmentFault(
            f"out of memory on {device}",
            why=first_line(error),
            fix="choose a smaller data.batch_size, a smaller input, or another device",
        ) from error
    finally:
        if device is not None:
            model.to(home)
        for module, mode in modes:
            module.training = mode


def device_of(model: nn.Module) -> torch.device:
    """Where the model's parameters are; CPU if it has none."""
    return next((p.device for p in model.parameters()), torch.device("cpu"))


def autocast(device: torch.device, precision: str) -> Any:
    """The autocast context of `precision`: `no`, `bf16` or `fp16`."""
    dtype = torch.float16 if precision == "fp16" else torch.bfloat16
    return torch.autocast(device.type, dtype=dtype, enabled=precision != "no")
