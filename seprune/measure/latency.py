"""How long a network takes: measured side by side, never estimated."""

from __future__ import annotations

import contextlib
import copy
import platform
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from seprune.errors import EnvironmentFault
from seprune.measure.flops import quietly

if TYPE_CHECKING:  # torch is imported where it is used: reports read `Latency` without it
    import torch
    from torch import nn

WARM_UP = 3
ENOUGH_ROUNDS = 5
PATIENCE_SECONDS = 20.0
LONGEST_SECONDS = 120.0
"""A batch size whose shortest measurement would take longer is left out, with a note."""


@dataclass(frozen=True)
class Latency:
    """Time of one forward pass of `batch` images; `median_ms` is None where it did not fit."""

    name: str
    batch: int
    median_ms: float | None
    spread_ms: float | None  # interquartile range
    device: str
    threads: int
    runtime: str = "eager"
    note: str = ""

    @property
    def noisy(self) -> bool:
        """Whether the time varied by more than itself: other work on the machine was measured."""
        return (self.spread_ms or 0.0) > (self.median_ms or 0.0)


@dataclass(frozen=True)
class LayerTime:
    """Time spent in one leaf layer during a forward pass, and its share of the whole pass."""

    name: str
    kind: str
    ms: float
    share: float


def latency(
    models: Mapping[str, Callable[..., Any]],
    shape: Sequence[int],
    *,
    batch_sizes: Sequence[int] = (1, 64),
    device: str = "cpu",
    repeats: int = 30,
    runtime: str = "eager",
) -> list[Latency]:
    """Median and spread of the forward pass, the models taking turns in one process.

    Args:
        models: modules, or other callables (an ONNX Runtime session), by name.
        shape: of one image, e.g. (3, 224, 224).
        repeats: rounds; fewer (but 5) where they would take more than 20 s a batch size.
        runtime: what the numbers are filed under.

    Raises:
        EnvironmentFault: no such device, or out of memory at the smallest batch size.
    """
    import torch

    place, smallest = _device(device), min(batch_sizes)
    results: list[Latency] = []
    with torch.no_grad(), contextlib.ExitStack() as stack:
        calls = {name: _ready(model, place, stack) for name, model in models.items()}
        for batch in sorted(set(batch_sizes)):
            note = _too_long(results, batch)
            times: Mapping[str, Sequence[float]] = {}
            if not note:
                times, note = _try_batch(calls, noise((batch, *shape), place), repeats)
            if note and batch == smallest:
                raise EnvironmentFault(
                    f"latency: {note} at batch {batch} on {device}",
                    why=f"images of {'x'.join(map(str, shape))} need more than is free",
                    fix="use a smaller input, or measure on another device",
                )
            for name in calls:
                middle, spread = _summary(times[name]) if not note else (None, None)
                where = (device_name(place), torch.get_num_threads(), runtime, note)
                results.append(Latency(name, batch, middle, spread, *where))
    return results


def _too_long(smaller: Sequence[Latency], batch: int) -> str:
    """A note where the fewest rounds would take too long, judged by smaller batch sizes."""
    known = {x.name: x.median_ms / x.batch for x in smaller if x.median_ms is not None}
    seconds = sum(known.values()) * batch * (WARM_UP + ENOUGH_ROUNDS) / 1e3
    return "" if seconds <= LONGEST_SECONDS else f"it would have taken about {seconds:.0f} s"


def layer_times(
    model: nn.Module,
    shape: Sequence[int],
    *,
    batch: int = 1,
    device: str = "cpu",
    repeats: int = 10,
) -> list[LayerTime]:
    """Time per leaf layer, slowest first; what runs outside of layers is `(between layers)`."""
    import torch

    place = _device(device)
    rounds: list[dict[str, float]] = []
    with torch.no_grad(), contextlib.ExitStack() as stack:
        model = _ready(model, place, stack)
        kinds = {name: m for name, m in model.named_modules() if not any(m.children())}
        current = stack.enter_context(_stopwatches(kinds, place))
        images = noise((batch, *shape), place)
        for _ in range(WARM_UP + repeats):
            current.clear()
            total = _timed(model, images, place)
            rounds.append({**current, "(between layers)": total - sum(current.values())})
    medians = {
        name: max(0.0, float(np.median([r.get(name, 0.0) for r in rounds[WARM_UP:]])))
        for name in rounds[-1]
    }
    total = sum(medians.values()) or 1.0
    found = [
        LayerTime(name, type(kinds[name]).__name__ if name in kinds else "", ms, ms / total)
        for name, ms in medians.items()
    ]
    return sorted(found, key=lambda layer: -layer.ms)


def speed_warning(
    pairs: Sequence[tuple[Latency, Latency]],
    *,
    macs_before: int,
    macs_after: int,
    layers: Sequence[LayerTime] = (),
    causes: Sequence[str] = (),
) -> str | None:
    """A sentence where the time won is less than half of what the MACs promise, else None.

    Args:
        pairs: of the dense and the smaller network, one for each runtime.
        layers: of the smaller network, slowest first.
        causes: sentences on why, and what to do about it.
    """
    promised = macs_before / macs_after
    slow = [
        f"{before.median_ms / after.median_ms:.2f}x as fast at batch {after.batch} "
        f"({after.runtime})"
        for before, after in pairs
        if before.median_ms and after.median_ms
        if before.median_ms / after.median_ms - 1 < (promised - 1) / 2
    ]
    if not slow:
        return None
    after = pairs[0][1]
    eaters = ", ".join(f"{layer.name} {layer.share:.0%}" for layer in layers[:5])
    return (
        f"{after.name}: {', '.join(slow)} on {after.device}, where the MACs promise "
        f"{promised:.2f}x"
        + (f"; the time goes to {eaters}" if eaters else "")
        + "".join(f"; {cause}" for cause in causes)
    )


def device_name(device: str | torch.device) -> str:
    """`NVIDIA H200` or the processor's model, as people call it."""
    import torch

    device = torch.device(device)
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    if device.type != "cpu":
        return str(device)
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _device(name: str) -> torch.device:
    import torch

    device = torch.device(name)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise EnvironmentFault(
            f"device {name!r} is not there", why="torch sees no CUDA device", fix="--device cpu"
        )
    return device


def _ready(model: Callable[..., Any], device: torch.device, stack: contextlib.ExitStack) -> Any:
    """The model in evaluation mode on `device`; a copy where it lives on another device."""
    import torch

    if not isinstance(model, torch.nn.Module):
        return model
    weight = next(model.parameters(), None)
    if weight is not None and weight.device.type != device.type:
        model = copy.deepcopy(model).to(device)
    stack.enter_context(quietly(model))
    return model


def noise(shape: tuple[int, ...], device: torch.device | str = "cpu") -> torch.Tensor:
    """Images from a generator of their own: measuring must not move the run's random state."""
    import torch

    return torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(device)


def _try_batch(
    calls: Mapping[str, Callable[..., Any]], images: torch.Tensor, repeats: int
) -> tuple[dict[str, list[float]], str]:
    """Milliseconds by name, and a note where the batch did not fit."""
    import torch

    from seprune.runtime.distributed import out_of_memory

    try:
        return take_turns(calls, images, repeats), ""
    except (RuntimeError, MemoryError) as error:
        if not out_of_memory(error):
            raise
        if images.is_cuda:
            torch.cuda.empty_cache()
        return {}, "out of memory"


def undisturbed_clock(device: torch.device | str) -> Callable[[], float]:
    """Seconds of this thread alone where one thread of the CPU does all the work.

    What other processes take of its core does not count then.
    """
    import torch

    alone = torch.device(device).type == "cpu" and torch.get_num_threads() == 1
    fine = time.get_clock_info("thread_time").resolution <= 1e-6
    return time.thread_time if alone and fine else time.perf_counter


def take_turns(
    calls: Mapping[str, Callable[..., Any]],
    images: torch.Tensor,
    repeats: int,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, list[float]]:
    """Milliseconds of each call in each round, after some to warm up."""
    for _ in range(WARM_UP):
        for call in calls.values():
            _timed(call, images, images.device)
    times: dict[str, list[float]] = {name: [] for name in calls}
    began = time.perf_counter()
    for number in range(repeats):
        if number >= ENOUGH_ROUNDS and time.perf_counter() - began > PATIENCE_SECONDS:
            break
        for name in list(calls)[:: 1 if number % 2 else -1]:  # nobody always goes first
            times[name].append(_timed(calls[name], images, images.device, clock))
    return times


def _timed(
    call: Callable[..., Any],
    images: torch.Tensor,
    device: torch.device,
    clock: Callable[[], float] = time.perf_counter,
) -> float:
    """Milliseconds of one call, the device's queue empty before and after."""
    _wait(device)
    began = clock()
    call(images)
    _wait(device)
    return (clock() - began) * 1e3


def _wait(device: torch.device) -> None:
    import torch

    if device.type == "cuda":
        torch.cuda.synchronize(device)


@contextlib.contextmanager
def _stopwatches(
    layers: Mapping[str, nn.Module], device: torch.device
) -> Iterator[dict[str, float]]:
    """Milliseconds by layer, summed over the calls since it was last cleared."""
    spent: dict[str, float] = {}
    began: dict[str, float] = {}
    handles = []

    def start(name: str) -> None:
        _wait(device)
        began[name] = time.perf_counter()

    def stop(name: str) -> None:
        _wait(device)
        spent[name] = spent.get(name, 0.0) + (time.perf_counter() - began[name]) * 1e3

    for name, layer in layers.items():
        handles.append(layer.register_forward_pre_hook(lambda *_, name=name: start(name)))
        handles.append(layer.register_forward_hook(lambda *_, name=name: stop(name)))
    try:
        yield spent
    finally:
        for handle in handles:
            handle.remove()


def _summary(times: Sequence[float]) -> tuple[float, float]:
    low, middle, high = np.percentile(times, [25, 50, 75])
    return float(middle), float(high - low)
