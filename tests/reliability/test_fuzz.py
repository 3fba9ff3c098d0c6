"""Damaged bytes anywhere in an input: the right result or a refusal, never anything else.

FUZZ_CASES=2000 makes every kind longer; benchmarks/fuzz.py counts.
"""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
from child import Child
from damage import HOW, TARGETS, Range
from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st

FEW, MANY = int(os.environ.get("FUZZ_CASES", "25")), 3000
WEIGHTS = [".pth", ".safetensors", ".pth of torch < 1.6"]


@pytest.fixture(scope="module")
def reader() -> Iterator[Child]:
    started = Child("reader.py")
    yield started
    started.close()


DAMAGE = st.lists(
    st.tuples(
        st.sampled_from(HOW),
        st.floats(0, 1),
        st.integers(0, 7),
        st.binary(min_size=1, max_size=40),
    ),
    min_size=1,
    max_size=3,
)


def fuzz(examples: int, range_: Range) -> None:
    quiet = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow]

    @seed(0)
    @settings(max_examples=examples, deadline=None, database=None, suppress_health_check=quiet)
    @given(DAMAGE)
    def attack(steps):
        range_.shoot(steps)

    attack()


@pytest.mark.parametrize("name", TARGETS)
def test_damage_is_refused_or_harmless(reader, tmp_path, name):
    fuzz(FEW, Range(TARGETS[name], tmp_path / "x", reader))


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("name", TARGETS)
def test_much_damage_is_refused_or_harmless(reader, tmp_path, name):
    fuzz(MANY, Range(TARGETS[name], tmp_path / "x", reader))


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("name", WEIGHTS)
def test_every_bit_flipped_once(reader, tmp_path, name):
    range_ = Range(TARGETS[name], tmp_path / "x", reader)
    size = len(range_.content)
    for offset in range(size):
        for bit in range(8):
            range_.shoot([("flip", (offset + 0.5) / size, bit, b"x")])
