"""Latency tables: measured times of single operators, and a network's time from its widths."""

from __future__ import annotations

import bisect
import importlib.metadata
import itertools
import os
import re
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from seprune.errors import InputError, UsageError
from seprune.measure.latency import device_name
from seprune.measure.latency_runtimes import require_onnx
from seprune.measure.openvino_runtime import require_openvino
from seprune.measure.work_items import Operator, WorkItem
from seprune.runtime.files import write_json
from seprune.runtime.progress import Track, silent
from seprune.runtime.text import shell_word, within
from seprune.runtime.transaction import clear
from seprune.runtime.typed import read_typed

SHARES = (1 / 8, 1 / 4, 3 / 8, 1 / 2, 3 / 4, 1)  # of a width, in multiples of 16
FORMAT = 1
RUNTIMES = ("eager", "compiled", "onnx", "openvino")
SAVE_SECONDS = 5.0  # between two writes of a table that is being built
Timer = Callable[[Operator], float]


@dataclass(frozen=True)
class TableKey:
    """What a table's times depend on, beside the operators."""

    device: str
    runtime: str
    version: str
    threads: int
    batch: int
    dtype: str = "float32"

    @property
    def place(self) -> str:
        """The kind of device as torch names it: threads are counted on the CPU only."""
        return "cpu" if self.threads else "cuda"

    @classmethod
    def here(cls, runtime: str, *, batch: int, device: str = "cpu") -> TableKey:
        """The key of this machine. `compiled` uses the table of `eager`, `openvino` that of `onnx`.

        Raises:
            UsageError: an unknown runtime.
            EnvironmentFault: the runtime is not installed.
        """
        if runtime not in RUNTIMES:
            raise UsageError(
                f"unknown runtime '{runtime}'",
                why=f"known: {', '.join(RUNTIMES)}",
                fix="--runtime eager",
            )
        if runtime == "openvino":
            require_openvino()
        runtime = {"compiled": "eager", "openvino": "onnx"}.get(runtime, runtime)
        if runtime == "onnx":
            require_onnx()
        package = "onnxruntime" if runtime == "onnx" else "torch"
        threads = torch.get_num_threads() if device == "cpu" else 0
        version = importlib.metadata.version(package)
        return cls(device_name(device), runtime, version, threads, batch)

    def file_name(self) -> str:
        """A file name made of all parts."""
        parts = (*map(str, asdict(self).values()),)
        return re.sub(r"[^A-Za-z0-9.]+", "-", "_".join(parts)).strip("-").lower() + ".json"


@dataclass
class LatencyTable:
    """Milliseconds by operator.

    Attributes:
        note: why a file that was there is not used; not kept.
    """

    key: TableKey
    times: dict[str, float] = field(default_factory=dict)
    note: str = ""

    def save(self, path: Path) -> None:
        """Write the table as JSON."""
        write_json(path, {"format": FORMAT, "key": asdict(self.key), "times": self.times})

    @classmethod
    def load(cls, path: Path) -> LatencyTable:
        """Read a table.

        Raises:
            InputError: not a latency table.
        """
        fix = f"remove it, and it is measured anew: rm {shell_word(path)}"
        content = read_typed(_TableFile, path, fix=fix, code="damaged")
        return cls(content.key, content.times)


@dataclass(frozen=True)
class _TableFile:
    """A `LatencyTable` as JSON."""

    format: int
    key: TableKey
    times: dict[str, float]

    def __post_init__(self) -> None:
        if self.format != FORMAT or not all(0 <= ms < 1e9 for ms in self.times.values()):
            raise ValueError("not a latency table of this format, or a time that cannot be")


def open_table(path: Path, key: TableKey, note: Callable[[str], None]) -> LatencyTable:
    """The table at `path`, or an empty one where there is none or it is of something else."""
    if not path.is_file():
        return LatencyTable(key)
    if os.access(path.parent, os.W_OK):  # a complete table is not written again
        clear(path.parent)
    table = LatencyTable.load(path)
    if table.key != key:
        pairs = zip(asdict(table.key).items(), asdict(key).values())
        other = [f"{name} {a} instead of {b}" for (name, a), b in pairs if a != b]
        text = f"{path} is of {', '.join(other)}: measured anew"
        note(text)
        return LatencyTable(key, note=text)
    return table


def build_table(
    table: LatencyTable,
    operators: Sequence[Operator],
    timer: Timer,
    *,
    path: Path | None = None,
    track: Track = silent,
) -> LatencyTable:
    """Measure the operators that the table lacks, in place.

    Args:
        path: written every few seconds and at the end, so that a build that was stopped goes on.
    """
    missing = [o for o in dict.fromkeys(operators) if o.name() not in table.times]
    saved = time.monotonic()
    try:
        for operator in track(missing, label="latency", total=len(missing), unit="operators"):
            table.times[operator.name()] = timer(operator)
            if path is not None and time.monotonic() - saved > SAVE_SECONDS:
                _add_to(path, table)
                saved = time.monotonic()
    finally:
        if path is not None and missing:
            _add_to(path, table)
    return table


def _add_to(path: Path, table: LatencyTable) -> None:
    """Save the table with what another process has measured for the same key meanwhile."""
    with suppress(InputError):  # none is there yet
        other = LatencyTable.load(path)
        if other.key == table.key:
            table.times = {**other.times, **table.times}
    table.save(path)


class LatencyModel:
    """Milliseconds of a network by the units that its groups keep, from a table.

    Between widths that were measured, times are interpolated linearly in each side. Modules that
    can be taken out count like groups of one unit under their names in `parts`.

    Args:
        parts: name -> path of the module.
    """

    def __init__(
        self,
        items: Sequence[WorkItem],
        table: LatencyTable,
        parts: Mapping[str, str] | None = None,
    ) -> None:
        self.items, self.table, self.parts = list(items), table, dict(parts or {})
        self.beside: dict[tuple[str, ...], tuple[list[WorkItem], list[str]]] = {}
        self.known: dict[tuple[int, int, int], float] = {}
        self.sums: dict[tuple[object, ...], float] = {}  # of groups, at widths
        self.holders = {
            id(item): tuple(n for n, path in self.parts.items() if within(item.module, path))
            for item in self.items
        }

    def with_parts(self, parts: Mapping[str, str]) -> LatencyModel:
        """The same with modules that can be taken out."""
        return LatencyModel(self.items, self.table, parts)

    def at(self, kept: Mapping[str, int]) -> float:
        """Milliseconds of the network."""
        return sum(self.time(item, kept) for item in self.items)

    def of_groups(self, names: tuple[str, ...], kept: Mapping[str, int]) -> float:
        """Milliseconds of everything that depends on the width of one of these groups."""
        if names not in self.beside:
            follow = {id(i): i.groups.union(self.holders[id(i)]) for i in self.items}
            items = [i for i in self.items if not follow[id(i)].isdisjoint(names)]
            self.beside[names] = items, sorted(set().union(*(follow[id(i)] for i in items)))
        items, followed = self.beside[names]
        key = (names, *[kept.get(name) for name in followed])
        if key not in self.sums:
            self.sums[key] = sum(self.time(item, kept) for item in items)
        return self.sums[key]

    def time(self, item: WorkItem, kept: Mapping[str, int]) -> float:
        """Milliseconds of one operator."""
        if any(kept.get(part) == 0 for part in self.holders[id(item)]):
            return 0.0
        inputs, outputs = item.inputs.at(kept), item.outputs.at(kept)
        key = (id(item), inputs, outputs)
        if key not in self.known:
            self.known[key] = self.interpolated(item, inputs, outputs)
        return self.known[key]

    def interpolated(self, item: WorkItem, inputs: int, outputs: int) -> float:
        """Milliseconds between up to four widths that were measured."""
        one_side = item.operator.groups > 1 or item.operator.kind not in ("conv", "linear")
        low_in, high_in, share_in = _between(widths(item.inputs.total, item.inputs.units), inputs)
        if one_side:
            low, high = (self.table.times[item.operator.at(n, n).name()] for n in (low_in, high_in))
            return low + share_in * (high - low)
        low_out, high_out, share_out = _between(
            widths(item.outputs.total, item.outputs.units), outputs
        )

        def at(a: int, b: int) -> float:
            return self.table.times[item.operator.at(a, b).name()]

        below = at(low_in, low_out) + share_out * (at(low_in, high_out) - at(low_in, low_out))
        above = at(high_in, low_out) + share_out * (at(high_in, high_out) - at(high_in, low_out))
        return below + share_in * (above - below)


def widths(total: int, units: Sequence[Any]) -> list[int]:
    """The widths of a side that are measured, ascending; all of it where nothing is cut."""
    if not units:
        return [total]
    step = 16 if total >= 96 else 8 if total >= 32 else 1
    return sorted({min(total, max(1, round(total * s / step)) * step) for s in SHARES} | {total})


def grid(items: Sequence[WorkItem]) -> list[Operator]:
    """Every operator that the model of these work items looks up, each once."""
    found: dict[Operator, None] = {}
    for item in items:
        ins = widths(item.inputs.total, item.inputs.units)
        if item.operator.groups > 1 or item.operator.kind not in ("conv", "linear"):
            found.update(dict.fromkeys(item.operator.at(n, n) for n in ins))
            continue
        outs = widths(item.outputs.total, item.outputs.units)
        found.update(dict.fromkeys(item.operator.at(a, b) for a, b in itertools.product(ins, outs)))
    return list(found)


def _between(measured: Sequence[int], width: int) -> tuple[int, int, float]:
    """The neighbours of a width among those measured, and its place between them."""
    at = bisect.bisect_left(measured, width)
    if at == 0:
        return measured[0], measured[0], 0.0
    if at == len(measured):
        return measured[-1], measured[-1], 0.0
    low, high = measured[at - 1], measured[at]
    return low, high, (width - low) / (high - low)
