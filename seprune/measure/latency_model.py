"""The latency model of a network on this machine, its table kept in the user's cache folder."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from seprune.errors import UsageError
from seprune.graph.groups import NetworkStructure
from seprune.measure.latency_table import (
    LatencyModel,
    TableKey,
    Timer,
    build_table,
    cache_folder,
    grid,
    open_table,
)
from seprune.measure.timers import EagerTimer, OnnxTimer
from seprune.measure.work_items import work_items
from seprune.runtime.progress import Track, silent

RUNTIMES = ("eager", "compiled", "onnx")


def latency_model(
    model: nn.Module,
    structure: NetworkStructure,
    inputs: Any,
    *,
    key: TableKey | None = None,
    track: Track = silent,
    note: Callable[[str], None] = lambda text: None,
) -> LatencyModel:
    """Milliseconds of `model` by its groups' widths; what the table lacks is measured first.

    The table lies in the user's cache folder, where networks share it.

    Args:
        inputs: one example.
        key: runtime, batch size and device; eager PyTorch at batch 1 on the CPU by default.
        note: is given a sentence where a table is of something else.

    Raises:
        EnvironmentFault: the runtime is not installed.
        InputError: the file is not a table.
    """
    key = key or TableKey.here("eager", batch=1)
    path = cache_folder() / key.file_name()
    items = work_items(model, structure, inputs)
    table = open_table(path, key, note)
    with torch.random.fork_rng([]):  # random operands must not move the caller's random state
        build_table(table, grid(items), timer_of(key), path=path, track=track)
    return LatencyModel(items, table)


def timer_of(key: TableKey) -> Timer:
    """What measures single operators for such a table.

    Raises:
        UsageError: ONNX Runtime on another device than the CPU.
        EnvironmentFault: the runtime is not installed.
    """
    if key.runtime != "onnx":
        return EagerTimer(key.batch, key.place)
    if key.place != "cpu":
        raise UsageError(
            f"the runtime 'onnx' is not measured on {key.place}",
            why="ONNX Runtime is measured on the CPU only",
            fix="--device cpu, or --runtime eager",
        )
    return OnnxTimer(key.batch, key.threads)
