"""The latency model of a network on this machine, its table kept in the user's cache folder."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from seprune.errors import InputError, UsageError
from seprune.graph.groups import NetworkStructure
from seprune.measure.latency_runtimes import EagerTimer, OnnxTimer
from seprune.measure.latency_table import (
    LatencyModel,
    TableKey,
    Timer,
    build_table,
    grid,
    open_table,
)
from seprune.measure.work_items import work_items
from seprune.runtime.paths import cache_folder
from seprune.runtime.progress import Track, silent
from seprune.runtime.text import shell_word


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
        InputError: the file is not a table, or says that the network takes no time.
    """
    key = key or TableKey.here("eager", batch=1)
    path = table_path(key)
    items = work_items(model, structure, inputs)
    table = open_table(path, key, note)
    with torch.random.fork_rng([]):  # random operands must not move the caller's random state
        build_table(table, grid(items), timer_of(key), path=path, track=track)
    made = LatencyModel(items, table)
    if not made.at(structure.full_widths()):  # somebody else's table; budgets are shares of it
        raise InputError(
            f"{path}: the whole network takes 0 ms",
            why="every operator of it has the time 0 in that table",
            fix=f"rm {shell_word(path)}, and it is measured anew",
        )
    return made


def table_path(key: TableKey) -> Path:
    """Where the table of this key is kept."""
    return cache_folder("latency") / key.file_name()


def adopt(path: Path, key: TableKey, note: Callable[[str], None]) -> None:
    """Add the times of an exported table to the one that is kept, if it is of the same key.

    Args:
        note: is given a sentence where it is of something else.

    Raises:
        InputError: there is no such file, or it is not a table.
    """
    if not path.is_file():
        raise InputError(
            f"{path}: no such file",
            why="a latency table is to be read from it",
            fix=f"seprune latency-table export {shell_word(path)} on a machine that has one",
        )
    kept = open_table(table_path(key), key, note)
    kept.times = {**open_table(path, key, note).times, **kept.times}
    kept.save(table_path(key))


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
