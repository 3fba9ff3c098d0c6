"""Damaged bytes anywhere in a weights file: the right result or a refusal, never anything else."""

from __future__ import annotations

import json
import select
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import evil
import pytest
from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st

LIMIT_SECONDS = 10
FEW, MANY = 60, 3000
SUFFIXES = [".pth", ".safetensors", ".old"]


class Reader:
    """The long-lived child that reads the damaged files."""

    def __init__(self) -> None:
        command = [sys.executable, str(Path(__file__).with_name("reader.py"))]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        self.process = subprocess.Popen(command, text=True, bufsize=1, **pipes)

    def __call__(self, path: Path, limit: float = LIMIT_SECONDS) -> dict[str, object]:
        self.process.stdin.write(f"{path}\n")
        ready, _, _ = select.select([self.process.stdout], [], [], limit)
        assert ready, f"no answer within {limit} s"
        line = self.process.stdout.readline()
        if not line:
            self.process.wait()
            pytest.fail(f"status {self.process.returncode}: {self.process.stderr.read()[-3000:]}")
        return json.loads(line)


@pytest.fixture(scope="module")
def reader(tmp_path_factory) -> Iterator[Reader]:
    started = Reader()
    path = tmp_path_factory.mktemp("warm") / "w.pth"
    evil.good(path)
    started(path, limit=120)  # importing torch is not the file's fault
    yield started
    started.process.kill()
    started.process.wait()


DAMAGE = st.lists(
    st.tuples(
        st.sampled_from(["flip", "cut", "extend", "zero", "delete", "copy"]),
        st.floats(0, 1),
        st.integers(0, 7),
        st.binary(min_size=1, max_size=40),
    ),
    min_size=1,
    max_size=3,
)


def damage(content: bytes, steps: list[tuple[str, float, int, bytes]]) -> bytes:
    """Apply flips, cuts, insertions, zeroed, deleted and copied ranges."""
    changed = bytearray(content)
    for kind, where, bit, extra in steps:
        at = min(int(where * len(changed)), len(changed) - 1)
        end = at + len(extra)
        if not changed:
            break
        if kind == "flip":
            changed[at] ^= 1 << bit
        elif kind == "cut":
            del changed[at:]
        elif kind == "extend":
            changed[at:at] = extra
        elif kind == "zero":
            changed[at:end] = bytes(len(changed[at:end]))
        elif kind == "delete":
            del changed[at:end]
        else:
            changed[at:at] = changed[at // 2 : at // 2 + len(extra)]
    return bytes(changed)


def check(reader: Reader, path: Path, suffix: str, steps: list) -> None:
    whole = path / f"whole{suffix}"
    if not whole.exists():
        evil.good(whole)
    content = whole.read_bytes()
    broken = damage(content, steps)
    damaged = path / f"damaged{suffix}"
    damaged.write_bytes(broken)
    found = reader(damaged)
    assert damaged.read_bytes() == broken
    if "code" in found:
        assert (found["status"], found["parts"]) == (3, True)
    elif suffix == ".pth":
        # every byte that matters has a checksum
        assert found == reader(whole)


def fuzz(examples: int, suffix: str, reader: Reader, path: Path) -> None:
    quiet = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow]

    @seed(0)
    @settings(max_examples=examples, deadline=None, database=None, suppress_health_check=quiet)
    @given(DAMAGE)
    def attack(steps):
        check(reader, path, suffix, steps)

    attack()


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_damage_is_refused_or_harmless(reader, tmp_path, suffix):
    fuzz(FEW, suffix, reader, tmp_path)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("suffix", SUFFIXES)
def test_much_damage_is_refused_or_harmless(reader, tmp_path, suffix):
    fuzz(MANY, suffix, reader, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("suffix", SUFFIXES)
def test_every_bit_flipped_once(reader, tmp_path, suffix):
    evil.good(tmp_path / f"whole{suffix}")
    size = (tmp_path / f"whole{suffix}").stat().st_size
    for offset in range(size):
        for bit in range(8):
            check(reader, tmp_path, suffix, [("flip", (offset + 0.5) / size, bit, b"x")])
