"""The device to work on, and the processes that `torchrun` started together."""

from __future__ import annotations

import atexit
import os

import torch
from torch import Tensor
from torch import distributed as dist

from seprune.errors import EnvironmentFault


def resolve_device(name: str = "auto") -> torch.device:
    """The device called `name`; `auto` is this process's GPU, or the CPU where there is none.

    Raises:
        EnvironmentFault: the device is not there.
    """
    local = int(os.environ.get("LOCAL_RANK", "0"))
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise EnvironmentFault(
            f"device {name!r} is unknown",
            why=str(error).splitlines()[0],
            fix="use auto, cpu or cuda",
        ) from error
    there = {"cuda": torch.cuda.device_count(), "mps": int(torch.backends.mps.is_available())}
    count = there.get(device.type, 1)
    if (device.index or 0) >= count:
        kind = device.type.upper()
        raise EnvironmentFault(
            f"device {name!r} was asked for, but there is no "
            + (f"{kind} device" if not count else f"{kind} device {device.index}"),
            why=f"torch {torch.__version__} sees {count or 'none'}",
            fix="use device auto or cpu, or see: seprune env",
        )
    return torch.device("cuda", local) if name == "cuda" else device


def join(device: torch.device) -> tuple[int, int]:
    """(rank, number of processes); under `torchrun` the first call forms the process group."""
    if not dist.is_initialized():
        if int(os.environ.get("WORLD_SIZE", "1")) == 1:
            return 0, 1
        if device.type == "cuda":
            torch.cuda.set_device(device)
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
        atexit.register(_leave)  # a group that is still there at the end may abort the process
    return dist.get_rank(), dist.get_world_size()


def _leave() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


def sum_over_processes(values: Tensor) -> Tensor:
    """The sum of `values` over all processes; a collective, so every process has to call it."""
    if dist.is_initialized():
        values = values.clone()
        dist.all_reduce(values)
    return values
