"""The device to work on, and the processes that `torchrun` started together.

Whatever they exchange travels by collectives, which fail after some time. Waiting for long work of
one process, and errors, go through the store of the process group: whoever waits there sees that
another process has failed.
"""

from __future__ import annotations

import atexit
import itertools
import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch import distributed as dist

from seprune.errors import (
    EnvironmentFault,
    PeerError,
    SepruneError,
    StoppedError,
    UsageError,
    first_line,
)
from seprune.runtime import launch
from seprune.runtime.launch import patience

T = TypeVar("T")
_FAILED, _ALIVE = "seprune/failed", "seprune/alive"
_CALLS = itertools.count()
_LOST = ("gloo/transport", "Connection closed by peer", "Connection reset", "NCCL")


def resolve_device(name: str | torch.device = "auto") -> torch.device:
    """The device called `name`; `auto` is this process's GPU, or the CPU where there is none.

    A device that was resolved before stays as it is.

    Raises:
        EnvironmentFault: the device is not there.
    """
    resolved = isinstance(name, torch.device)
    local = launch.local_rank()
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise EnvironmentFault(
            f"device {str(name)!r} is unknown",
            why=first_line(error),
            fix="use auto, cpu or cuda",
        ) from error
    there = {"cuda": torch.cuda.device_count(), "mps": int(torch.backends.mps.is_available())}
    count = there.get(device.type, 1)
    if (device.index or 0) >= count:
        kind = device.type.upper()
        raise EnvironmentFault(
            f"device {str(name)!r} was asked for, but there is no "
            + (f"{kind} device" if not count else f"{kind} device {device.index}"),
            why=f"torch {torch.__version__} sees {count or 'none'}",
            fix="use device auto or cpu, or see: seprune env",
        )
    if device.type != "cuda":
        return device
    if not resolved:
        _require_own(str(name), local)
    return torch.device("cuda", local) if device.index is None else device


def _require_own(name: str, local: int) -> None:
    """Of several processes on one machine each has a GPU to itself."""
    several = launch.world_size() > 1
    if several and name != "cuda":
        raise UsageError(
            f"device {name!r}: one GPU for several processes",
            why="every process takes the GPU of its own number",
            fix="use device auto or cuda",
        )
    if several and local >= torch.cuda.device_count():
        raise EnvironmentFault(
            f"process {local} of this machine has no GPU",
            why=f"torch sees {torch.cuda.device_count()}",
            fix=f"torchrun --nproc-per-node {torch.cuda.device_count()} ...",
        )


def out_of_memory(error: Exception) -> bool:
    """Whether memory was short, on a GPU or on the machine."""
    words = ("out of memory", "can't allocate", "cannot allocate memory", "not enough memory")
    known = isinstance(error, torch.OutOfMemoryError | MemoryError)
    return known or any(w in str(error).lower() for w in words)


def join(device: torch.device) -> tuple[int, int]:
    """(rank, number of processes); under `torchrun` the first call forms the process group."""
    if not dist.is_initialized():
        if launch.world_size() == 1:
            return 0, 1
        if device.type == "cuda":
            torch.cuda.set_device(device)
        launch.rank()  # what is no number is named before torch stumbles over it
        wait = timedelta(seconds=patience())
        try:
            dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=wait)
        except (dist.DistError, ValueError) as error:
            raise _gone(error) from error
        leaving = threading.Event()
        pulse = threading.Thread(target=_show_life, args=(leaving,), daemon=True)
        if dist.get_rank() == 0:
            pulse.start()
        atexit.register(_leave, leaving, pulse)
    return dist.get_rank(), dist.get_world_size()


def _show_life(leaving: threading.Event) -> None:
    """The first process counts while it lives, so that nobody waits for one that does not.

    What it works on may take hours. One that is stopped, or on a lost machine, does not count.
    """
    with suppress(RuntimeError):  # whoever kept the store has gone
        while not leaving.wait(patience() / 10):
            _store().add(_ALIVE, 1)


def _leave(leaving: threading.Event, pulse: threading.Thread) -> None:
    """Before the interpreter ends: a group or a thread that is still there may abort it."""
    leaving.set()
    if pulse.is_alive():
        pulse.join(timeout=5)
    if dist.is_initialized():
        dist.destroy_process_group()


def sum_over_processes(values: Tensor) -> Tensor:
    """The sum of `values` over all processes; a collective, so every process has to call it."""
    if dist.is_initialized():
        values = _reachable(values.clone())
        dist.all_reduce(values)
    return values


def gather_rows(values: Tensor) -> Tensor:
    """The rows of all processes, one process after the other; a collective."""
    if not dist.is_initialized():
        return values
    values = _reachable(values)
    rank, world = dist.get_rank(), dist.get_world_size()
    counts = torch.zeros(world, dtype=torch.int64, device=values.device)
    counts[rank] = len(values)
    sizes = sum_over_processes(counts).tolist()
    every = values.new_zeros(sum(sizes), *values.shape[1:])
    start = sum(sizes[:rank])
    every[start : start + len(values)] = values
    return sum_over_processes(every)


def _reachable(values: Tensor) -> Tensor:
    """On a GPU where collectives work on nothing else."""
    if dist.get_backend() == "nccl" and values.device.type == "cpu":
        return values.to(torch.device("cuda", torch.cuda.current_device()))
    return values


def same_as_first(model: nn.Module) -> None:
    """Give every process the first one's weights, to the last bit."""
    if dist.is_initialized():
        for tensor in model.state_dict().values():
            dist.broadcast(tensor, 0)


def first(work: Callable[[], T]) -> T:
    """What `work` gives in the first process; the others do not work but wait while that lives.

    Every process has to call it, and `work` must not call anything that all processes have to.
    """
    if not dist.is_initialized():
        return work()
    key, made = f"seprune/{next(_CALLS)}", list[Any]([None])
    if dist.get_rank() == 0:
        made = [work()]
        _store().set(key, "done")
    _await(key)
    dist.broadcast_object_list(made, 0)
    result: T = made[0]
    return result


def _await(key: str) -> None:
    """Until `key` is in the store, another process has failed, or the first one is silent.

    Silence is counted in pauses, not by a clock, which goes on while all processes are stopped.
    """
    store, pause, beats, silent = _store(), 0.001, 0, 0.0
    while not store.check([key]):
        if store.check([_FAILED]):
            raise _fellow(json.loads(store.get(_FAILED)))
        if silent > patience():
            raise _gone(TimeoutError(f"the first one has been silent for {silent:.0f} s"))
        time.sleep(pause)
        before, beats = beats, store.add(_ALIVE, 0)
        silent = silent + pause if beats == before else 0.0
        pause = min(2 * pause, 0.2)


@contextmanager
def united() -> Iterator[None]:
    """An error in one process ends all of them with that error; nobody leaves before the others.

    Raises:
        PeerError: another process failed first.
        EnvironmentFault: another one has gone without a word, or does not answer.
    """
    try:
        yield
    except (Exception, StoppedError) as error:
        if not dist.is_initialized() or isinstance(error, PeerError):
            raise
        own = _gone(error) if _lost(error) else error
        try:
            first = _publish(own)
        except StoppedError:  # a signal, just now; it comes only once
            first = _publish(own)
        if first["process"] == dist.get_rank() and isinstance(own, (SepruneError, StoppedError)):
            own.process = first["process"]
        elif first["process"] != dist.get_rank() and first["what"] != str(_parts(own)["what"]):
            raise _fellow(first) from None
        raise own from (None if own is error else error)
    if dist.is_initialized():
        dist.barrier()


def _publish(error: Exception | StoppedError) -> dict[str, Any]:
    """Publish what ended this process; returns what the first one that failed has published."""
    own = json.dumps({"process": dist.get_rank(), **_parts(error)})
    try:
        fault: dict[str, Any] = json.loads(_store().compare_set(_FAILED, "", own))
    except dist.DistError:  # the process that kept the store has gone
        fault = json.loads(own)
    return fault


def _parts(error: Exception | StoppedError) -> dict[str, Any]:
    if isinstance(error, (SepruneError, StoppedError)):
        names = ("what", "why", "fix", "code", "exit_status")
        return {name: getattr(error, name) for name in names}
    what = f"{type(error).__name__}: {error}"
    return {"what": what, "why": "", "fix": "", "code": "bug", "exit_status": 1}


def _fellow(fault: dict[str, Any]) -> PeerError:
    process = fault["process"]
    what = f"process {process} of {dist.get_world_size()}: {fault['what']}"
    error = PeerError(what, **{k: fault[k] for k in ("why", "fix", "code", "exit_status")})
    error.process = process
    return error


def _lost(error: Exception | StoppedError) -> bool:
    """Whether a collective failed because a process at the other end did."""
    if isinstance(error, (SepruneError, StoppedError)) or not isinstance(error, RuntimeError):
        return False
    return isinstance(error, dist.DistError) or any(word in str(error) for word in _LOST)


def _gone(error: BaseException) -> EnvironmentFault:
    return EnvironmentFault(
        f"another of the {launch.world_size()} processes ended without a word, or hangs",
        why=f"{first_line(error)}; most often one was killed for memory, or a machine was lost",
        fix="run the same command again; it goes on, also with fewer processes",
        code="process",
    )


def _store() -> Any:
    return dist.distributed_c10d._get_default_store()
