"""How much memory work may take: a share of what the machine, the cgroup or the GPU has free."""

from __future__ import annotations

import ctypes
import os
from contextlib import suppress
from pathlib import Path

import torch

from seprune.errors import UsageError
from seprune.runtime import launch

_GPU_SHARE = 0.8  # of what is free; a GPU is rarely shared
_CPU_SHARE = 0.5
_UNKNOWN = 4 << 30  # where the system does not say
_GROUPS = Path("/sys/fs/cgroup")
_MACHINE = Path("/proc/meminfo")


def memory_budget(device: torch.device, memory: int | str = "auto") -> int:
    """Bytes that one process may use on `device`: `memory` itself, or a share of what is free.

    Processes that share a machine share its memory.

    Raises:
        UsageError: `memory` is neither bytes nor `auto`.
    """
    if memory != "auto":
        return _given(memory)
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(_GPU_SHARE * (free + unused))
    found = (free_on_machine(), free_in_group())
    processes = launch.local_world_size()
    return int(_CPU_SHARE * min((n for n in found if n is not None), default=_UNKNOWN)) // processes


def _given(memory: object) -> int:
    if isinstance(memory, int) and not isinstance(memory, bool) and memory > 0:
        return memory
    raise UsageError(
        f"memory={memory!r} is no number of bytes",
        why="a memory budget is a whole number of bytes above 0, or auto",
        fix=f"give memory={4 << 30}, or memory=auto",
    )


class Ceiling:
    """Keeps this process within so many bytes beyond what it holds at first, as far as it can.

    Every thread frees memory for itself: what many of them have worked with stays with the
    process, though nobody uses it.

    Args:
        budget: bytes.
    """

    def __init__(self, budget: int) -> None:
        held = resident()
        self.limit = None if held is None else held + budget

    def keep(self) -> None:
        """Give back what is free, if the process holds too much."""
        held = resident()
        if held is not None and self.limit is not None and held > self.limit:
            give_back()


def resident(path: Path = Path("/proc/self/statm")) -> int | None:
    """Bytes of memory that this process holds; None where the system does not say."""
    numbers = _text(path).split()
    return int(numbers[1]) * os.sysconf("SC_PAGE_SIZE") if len(numbers) > 1 else None


def give_back() -> None:
    """Return to the system what the allocator keeps of freed memory, where it can (glibc)."""
    with suppress(AttributeError, OSError, TypeError):
        ctypes.CDLL(None).malloc_trim(0)


def free_on_machine(path: Path = _MACHINE) -> int | None:
    """Bytes that programs can still have, None where the system does not say."""
    for line in _text(path).splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) << 10
    return None


def free_in_group(root: Path = _GROUPS, own: Path = Path("/proc/self/cgroup")) -> int | None:
    """Bytes below the tightest limit of this process's control groups; None without a limit.

    File caches count as free: the kernel drops them first.
    """
    found = []
    for folder, names in _groups(root, own):
        limit, used = (_text(folder / name).strip() for name in names)
        if limit.isdigit() and used.isdigit():
            found.append(max(0, int(limit) - int(used) + _file_cache(folder)))
    return min(found, default=None)


def _groups(root: Path, own: Path) -> list[tuple[Path, tuple[str, str]]]:
    """Folders of this process's groups and of those around them, for both versions of cgroups."""
    found: list[tuple[Path, tuple[str, str]]] = []
    for line in _text(own).splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers and "memory" not in controllers.split(","):
            continue
        top = root / "memory" if controllers else root
        names = ("memory.limit_in_bytes", "memory.usage_in_bytes")
        inner = top / path.lstrip("/")
        folders = [inner, *(p for p in inner.parents if p.is_relative_to(top))]
        found += [(f, names if controllers else ("memory.max", "memory.current")) for f in folders]
    return found


def _file_cache(folder: Path) -> int:
    lines = (line.split() for line in _text(folder / "memory.stat").splitlines())
    return sum(int(n) for name, n in lines if name in ("inactive_file", "total_inactive_file"))


def _text(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""
