"""How long the networks of a run take, by runtime; and where the speed falls short of the MACs."""

from __future__ import annotations

import contextlib
import copy
import importlib.util
import tempfile
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeGuard

import torch
from torch import nn

from seprune.errors import SepruneError, first_line
from seprune.export.onnx import Run, export_model, open_onnx, open_openvino
from seprune.measure.latency import (
    Latency,
    LayerTime,
    latency,
    layer_times,
    noise,
    speed_warning,
)
from seprune.pipeline.context import Context
from seprune.recipe.sections import ReportSection
from seprune.report import Measurement
from seprune.runtime.distributed import out_of_memory

Key = tuple[str, str | None]
"""Stage and budget of a measurement."""
READERS: dict[str, Callable[[Path | bytes], Run]] = {
    "onnx": open_onnx, "openvino": open_openvino
}  # fmt: skip
"""Runtimes that read ONNX files."""
LAYER_SECONDS = 10.0  # for the times of single layers
ROUNDS = 10
GATES_SHARE = 0.1  # of the time that makes gates worth naming


@dataclass(frozen=True)
class TimingSetup:
    """What networks are timed with: the size of an image, the device, images at once."""

    shape: tuple[int, int, int]
    device: str
    batch_sizes: tuple[int, ...]

    @classmethod
    def of(cls, context: Context, batch_sizes: tuple[int, ...]) -> TimingSetup:
        """On the images and the device of a context."""
        return cls(context.network.shape, str(context.runtime.device), batch_sizes)


def with_latency(
    measurements: Sequence[Measurement],
    networks: Mapping[Key, nn.Module],
    setup: TimingSetup,
    *,
    runtimes: Sequence[str],
) -> list[Measurement]:
    """The measurements with latencies; in each runtime all networks take turns."""
    named = {f"{stage} {budget or ''}".strip(): (stage, budget) for stage, budget in networks}
    models = {name: networks[key] for name, key in named.items()}
    times = [row for runtime in runtimes for row in _measure(models, runtime, setup)]
    return [
        replace(m, latency=[t for t in times if named[t.name] == (m.stage, m.budget)])
        for m in measurements
    ]


def slow(
    measurements: Sequence[Measurement],
    networks: Mapping[Key, nn.Module],
    setup: TimingSetup,
    *,
    excitations: Collection[str] = (),
) -> list[str]:
    """A sentence for each network whose speed falls short: where the time goes, why, what to do.

    Args:
        excitations: layers between squeeze and gate.
    """
    dense = next(m for m in measurements if m.stage == "baseline")
    notes = []
    for m in measurements:
        pairs = _pairs(dense, m)
        if m is dense or not pairs or m.macs >= dense.macs:
            continue
        costs: dict[str, Any] = {"macs_before": dense.macs, "macs_after": m.macs}
        if speed_warning(pairs, **costs) is not None:
            model, batch = networks[m.stage, m.budget], pairs[0][1].batch
            layers = _layers(model, pairs[0][1], setup)
            causes = why_slow(networks["baseline", None], model, layers, excitations, batch)
            notes.append(speed_warning(pairs, layers=layers, causes=causes, **costs) or "")
    return notes


def why_slow(
    dense: nn.Module,
    small: nn.Module,
    layers: Sequence[LayerTime],
    excitations: Collection[str],
    batch: int,
) -> list[str]:
    """What keeps a cut network from the speed that its MACs promise, and what mends it."""
    full = {n: m.weight.shape[0] for n, m in dense.named_modules() if _has_width(m)}
    now = {n: m.weight.shape[0] for n, m in small.named_modules() if _has_width(m)}
    cut = [width for name, width in now.items() if width < full.get(name, 0)]
    odd = [width for width in cut if width % 8]
    share = sum(layer.share for layer in layers if layer.name in excitations)
    causes = []
    if 2 * len(odd) > len(cut):
        causes.append(f"{len(odd)} of {len(cut)} cut layers have widths that are no multiples of 8:"
                      " plan.round_to=16 mends it")  # fmt: skip
    if share > GATES_SHARE:
        causes.append(f"the gates' layers take {share:.0%}, and hardly any MACs: plan.latency=0.5 "
                      "counts them")  # fmt: skip
    if batch == 1 and not causes:
        causes.append("at batch 1 the calls of the layers cost time as well: plan.latency=0.5 "
                      "counts them")  # fmt: skip
    return causes


def _has_width(module: nn.Module) -> TypeGuard[nn.Conv2d | nn.Linear]:
    return isinstance(module, nn.Conv2d | nn.Linear)


def runtimes(section: ReportSection, setup: TimingSetup, *also: str) -> Sequence[str]:
    """Those that the recipe lists; else eager, and ONNX Runtime where it can run here.

    Args:
        also: that a latency budget is on.
    """
    asked = section.latency
    if not isinstance(asked, bool):
        return tuple(dict.fromkeys((*asked, *also)))
    there = all(importlib.util.find_spec(n) for n in ("onnx", "onnxscript", "onnxruntime"))
    usual = ("eager", "onnx") if there and setup.device == "cpu" else ("eager",)
    return tuple(dict.fromkeys((*usual, *also)))


def _measure(models: Mapping[str, nn.Module], runtime: str, setup: TimingSetup) -> list[Latency]:
    """Rows of one runtime; a network that it cannot run has rows with a note."""
    calls: dict[str, Callable[..., Any]] = {}
    notes: dict[str, str] = {}
    with contextlib.ExitStack() as stack:
        for name, model in models.items():
            made = ready(model, runtime, setup, stack)
            if isinstance(made, str):
                notes[name] = made
            else:
                calls[name] = made
        sizes, shape = setup.batch_sizes, setup.shape
        rows = (
            latency(calls, shape, batch_sizes=sizes, device=setup.device, runtime=runtime)
            if calls
            else []
        )
    threads = torch.get_num_threads()
    return rows + [
        Latency(name, batch, None, None, setup.device, threads, runtime, note)
        for name, note in notes.items()
        for batch in sizes
    ]


def ready(
    model: nn.Module, runtime: str, setup: TimingSetup, stack: contextlib.ExitStack
) -> Callable[..., Any] | str:
    """The network as this runtime calls it, or why it cannot."""
    if runtime == "eager":
        return model
    try:
        if runtime == "compiled":
            return _compiled(model, setup, stack)
        return _exported(model, setup, stack, READERS[runtime])
    except SepruneError as error:
        return ": ".join(filter(None, (error.what, error.why)))
    except Exception as error:  # a compiler and its backends raise whatever they like
        return f"{type(error).__name__}: {first_line(error)}"


def _compiled(
    model: nn.Module, setup: TimingSetup, stack: contextlib.ExitStack
) -> Callable[..., Any] | str:
    """Compiled for each batch size; all of it happens here, so that it fails here if it does."""
    limits: dict[str, Any] = {"recompile_limit": 256, "fail_on_recompile_limit_hit": True}
    stack.enter_context(torch._dynamo.config.patch(**limits))
    stack.callback(torch._dynamo.reset)
    placed = copy.deepcopy(model).eval().to(setup.device)
    call: Callable[..., Any] = torch.compile(placed, dynamic=False)
    with torch.no_grad():
        for batch in setup.batch_sizes:
            try:
                call(noise((batch, *setup.shape), setup.device))
            except (RuntimeError, MemoryError) as error:
                if not out_of_memory(error):
                    raise
    return lambda images: call(images)  # a module would be copied and moved once more


def _exported(
    model: nn.Module,
    setup: TimingSetup,
    stack: contextlib.ExitStack,
    reader: Callable[[Path], Run],
) -> Callable[..., Any] | str:
    """In a runtime that reads ONNX files."""
    if setup.device != "cpu":
        return "ONNX Runtime and OpenVINO are measured on the CPU only"
    folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="seprune-"))
    return reader(export_model(model, setup.shape, Path(folder) / "network.onnx").path)


def _pairs(dense: Measurement, m: Measurement) -> list[tuple[Latency, Latency]]:
    """Dense and smaller network in each runtime, at the largest batch that both ran: there the
    overhead counts least."""
    timed = (x for x in dense.latency if x.median_ms is not None and not x.noisy)
    known = {(x.runtime, x.batch): x for x in timed}
    largest: dict[str, tuple[Latency, Latency]] = {}
    for x in sorted(m.latency, key=lambda x: x.batch):
        if x.median_ms is not None and not x.noisy and (x.runtime, x.batch) in known:
            largest[x.runtime] = known[x.runtime, x.batch], x
    return list(largest.values())


def _layers(model: nn.Module, timed: Latency, setup: TimingSetup) -> Any:
    rounds = int(LAYER_SECONDS * 1e3 / (timed.median_ms or 1.0))
    batch = timed.batch if rounds else 1
    repeats = max(1, min(ROUNDS, rounds))
    return layer_times(model, setup.shape, batch=batch, device=setup.device, repeats=repeats)
