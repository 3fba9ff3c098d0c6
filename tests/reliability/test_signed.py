"""Files that were changed and signed again, so that no checksum refuses them.

Whatever seprune reads is read to the end or refused with a documented status, and the file stays as
it is. `benchmarks/fuzz_signed.py` does it 5,000 times, each within 10 s and 2 GB.
"""

from __future__ import annotations

import math
from collections import Counter

import pytest
from signed import SUBJECTS, Shooter, World

from seprune.recovery.finetune.checkpoints import Generation, load_generation, save_generation

QUICK = [name for name, subject in SUBJECTS.items() if not subject.slow]
SHOTS = -(-200 // len(QUICK))


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> World:
    return World(tmp_path_factory.mktemp("world"))


def shoot(world: World, name: str, folder, seeds) -> Counter[str]:
    shooter = Shooter(world, SUBJECTS[name], folder)
    return Counter(shooter.shoot(seed) for seed in seeds)


@pytest.mark.parametrize("name", QUICK)
def test_a_signed_change_is_read_or_refused(world, tmp_path, name):
    assert shoot(world, name, tmp_path / "files", range(SHOTS)).total() == SHOTS


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("name", SUBJECTS)
def test_many_signed_changes_are_read_or_refused(world, tmp_path, name):
    count = 20 if SUBJECTS[name].slow else 100
    shoot(world, name, tmp_path / "files", range(1000, 1000 + count))


@pytest.mark.parametrize(
    ("name", "code"),
    [
        ("report", "input"),
        ("plan", "plan"),
        ("statistics", "damaged"),
        ("annotations", "annotation"),
    ],
)
def test_the_changes_get_past_the_checksums(world, tmp_path, name, code):
    """They are refused for what they say, not for how they are signed."""
    found = shoot(world, name, tmp_path / "files", range(20))
    assert found[code] >= 5
    assert found["read"] >= 1


def test_a_state_may_hold_infinities(tmp_path):
    """A fine-tuning without a split has no best epoch before the first one."""
    save_generation(tmp_path, Generation({}, {"best": [-math.inf, 0.0], "loss": math.nan}))
    facts = load_generation(tmp_path).facts
    assert facts["best"] == [-math.inf, 0.0]
    assert math.isnan(facts["loss"])
