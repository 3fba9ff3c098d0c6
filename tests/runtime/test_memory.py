"""What memory there is, and giving back what nobody uses."""

from __future__ import annotations

import sys
import threading
from pathlib import Path

import pytest

from seprune.runtime.memory import Ceiling, free_in_group, free_on_machine, resident


def test_what_a_machine_has_free_is_what_programs_can_still_have(tmp_path: Path) -> None:
    (tmp_path / "meminfo").write_text("MemTotal: 900 kB\nMemFree: 1 kB\nMemAvailable: 700 kB\n")
    assert free_on_machine(tmp_path / "meminfo") == 700 << 10
    assert free_on_machine(tmp_path / "none") is None


def test_the_tightest_of_the_groups_around_a_process_counts_and_caches_are_free(
    tmp_path: Path,
) -> None:
    """Version 2: the process's own group has no limit, the one around it has 1,000 bytes."""
    (tmp_path / "self").write_text("0::/outer/inner\n")
    inner = tmp_path / "outer" / "inner"
    inner.mkdir(parents=True)
    (inner / "memory.max").write_text("max\n")
    (inner / "memory.current").write_text("300\n")
    assert free_in_group(tmp_path, tmp_path / "self") is None
    (tmp_path / "outer" / "memory.max").write_text("1000\n")
    (tmp_path / "outer" / "memory.current").write_text("900\n")
    (tmp_path / "outer" / "memory.stat").write_text("anon 650\ninactive_file 250\n")
    assert free_in_group(tmp_path, tmp_path / "self") == 350


def test_groups_of_the_first_version_count_too(tmp_path: Path) -> None:
    (tmp_path / "self").write_text("4:memory:/job\n3:cpu,cpuacct:/job\n")
    job = tmp_path / "memory" / "job"
    job.mkdir(parents=True)
    (job / "memory.limit_in_bytes").write_text("5000\n")
    (job / "memory.usage_in_bytes").write_text("6000\n")
    assert free_in_group(tmp_path, tmp_path / "self") == 0


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="only Linux says what is held")
def test_memory_that_ended_threads_have_freed_goes_back_above_the_ceiling() -> None:
    pins: list[bytearray] = []  # at the end of each thread's memory, which nothing gives back

    def work() -> None:
        held = [bytearray(b"x") * 100_000 for _ in range(200)]
        pins.append(bytearray(b"x") * 50_000)
        held.clear()

    low, high = Ceiling(1 << 20), Ceiling(1 << 40)
    for thread in [threading.Thread(target=work) for _ in range(4)]:
        thread.start()
        thread.join()
    before = resident()
    high.keep()
    assert before is not None
    assert (resident() or 0) > before - (2 << 20)
    low.keep()
    assert (resident() or 0) < before - (10 << 20)
