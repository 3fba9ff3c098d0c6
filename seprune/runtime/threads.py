"""How many threads a process works with on the CPU: what it may use, and what a trial finds.

More threads than free cores wait for each other at the end of every operator: on a machine that
others use too, two can be ten times slower than one.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from seprune.runtime.typed import fits

CGROUPS = Path("/sys/fs/cgroup")
TRIAL_SECONDS = 0.3  # for each number of threads
GAIN = 1.05  # by which more threads have to be faster than fewer
_USED: list[Threads] = []  # the one choice that this process works with, once it is made


@dataclass(frozen=True)
class Threads:
    """How many threads, of how many cores that the process may use, and why.

    Attributes:
        rates: steps per second that the trial found, by the number of threads.
    """

    count: int
    cores: int
    why: str
    rates: dict[str, float]

    @classmethod
    def of(cls, plain: Any, cores: int) -> Threads | None:
        """What `plain` gave, if it is that and this machine still has the cores."""
        if not fits(cls, plain):
            return None
        read = cls(**{f.name: plain[f.name] for f in fields(cls)})
        return read if 1 <= read.count <= cores == read.cores else None

    def plain(self) -> dict[str, Any]:
        """As environment.json has it."""
        return asdict(self)

    def __str__(self) -> str:
        cores = f"{self.cores} core" + "s" * (self.cores != 1)
        return f"threads: {self.count}, {cores} to use ({self.why})"


def usable_cores(cgroups: Path = CGROUPS) -> int:
    """Cores that this process may use: its affinity and the quota of its control group."""
    try:
        allowed = len(os.sched_getaffinity(0))
    except AttributeError:  # not on macOS and Windows
        allowed = os.cpu_count() or 1
    return max(1, min(allowed, math.floor(cpu_quota(cgroups) or allowed)))


def cpu_quota(cgroups: Path = CGROUPS) -> float | None:
    """CPU seconds a second that the control group allows (versions 2 and 1), or None."""
    pairs = (
        (cgroups / "cpu.max", None),
        (cgroups / "cpu" / "cpu.cfs_quota_us", cgroups / "cpu" / "cpu.cfs_period_us"),
    )
    for quota, period in pairs:
        try:
            words = quota.read_text().split() + (period.read_text().split() if period else [])
            if len(words) == 2 and words[0] not in ("max", "-1"):
                return int(words[0]) / int(words[1])
        except (OSError, ValueError, ZeroDivisionError):
            continue  # no such control group here
    return None


def choose_threads(
    asked: int | str,
    *,
    kept: Any = None,
    rate: Callable[[int], float] | None = None,
) -> Threads:
    """The number of threads to work with.

    Args:
        asked: a number, or `auto`: what `OMP_NUM_THREADS` says, else `kept`, else a trial.
        kept: the choice of an earlier part of the same work, as `plain` gave it.
        rate: steps per second with so many threads; a small convolutional network if None.
    """
    cores = usable_cores()
    if isinstance(asked, int):
        return Threads(asked, cores, "as the recipe says", {})
    given = os.environ.get("OMP_NUM_THREADS", "")
    if given.isdecimal() and int(given) > 0:
        return Threads(int(given), cores, "OMP_NUM_THREADS", {})
    if (before := Threads.of(kept, cores)) is not None:
        return before
    if cores == 1:
        return Threads(1, cores, "the only core", {})
    rates = tried(rate or steps_per_second, cores)
    best = 1
    for count, found in rates.items():
        best = count if found > GAIN * rates[best] else best
    shown = ", ".join(f"{n}: {r:.3g}/s" for n, r in rates.items())
    return Threads(best, cores, f"steps of a trial by threads: {shown}",
                   {str(n): r for n, r in rates.items()})  # fmt: skip


def tried(rate: Callable[[int], float], cores: int) -> dict[int, float]:
    """Rates of 1, 2, 4, ... threads and of one for each core, until more are slower."""
    counts = sorted({2**n for n in range(cores.bit_length()) if 2**n <= cores} | {cores})
    rates: dict[int, float] = {}
    for count in counts:
        rates[count] = rate(count)
        if rates[count] < max(rates.values()) / GAIN:
            break
    return rates


def steps_per_second(count: int) -> float:
    """Training steps of a small convolutional network with so many threads.

    The number of threads and the random state are as before afterwards.
    """
    import torch
    from torch import nn

    before = torch.get_num_threads()
    with torch.random.fork_rng([]), torch.enable_grad():
        layers = [nn.Conv2d(3, 32, 3), nn.BatchNorm2d(32), nn.ReLU(), nn.Conv2d(32, 32, 3)]
        network, images = nn.Sequential(*layers), torch.zeros(16, 3, 32, 32)
        torch.set_num_threads(count)
        try:
            network(images).sum().backward()  # to warm up
            began, steps = time.perf_counter(), 0
            while steps < 2 or time.perf_counter() - began < TRIAL_SECONDS:
                network(images).sum().backward()
                steps += 1
            return steps / (time.perf_counter() - began)
        finally:
            torch.set_num_threads(before)


def use_threads(choice: Threads) -> None:
    """Let torch, and what starts with as many threads as torch has, work with so many."""
    import torch

    torch.set_num_threads(choice.count)
    _USED[:] = [choice]


def used_threads() -> Threads | None:
    """The choice that this process works with; None where nobody chose."""
    return _USED[0] if _USED else None
