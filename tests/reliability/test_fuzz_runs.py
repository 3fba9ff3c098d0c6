"""Damaged bytes anywhere in a finished run: found, and what is read is right or refused."""

from __future__ import annotations

import random
import shutil
from collections.abc import Iterator

import pytest
from child import Child
from damage import KINDS, Damaged, damage, random_steps
from harness import Subject, reported, result
from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st

FEW, MANY = 150, 5000
STEPS = st.lists(
    st.tuples(
        st.sampled_from(KINDS),
        st.floats(0, 1),
        st.integers(0, 7),
        st.binary(min_size=1, max_size=40),
    ),
    min_size=1,
    max_size=3,
)
QUIET = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow]


@pytest.fixture(scope="module")
def damaged(tiny_run, tmp_path_factory) -> Iterator[Damaged]:
    run = tmp_path_factory.mktemp("damaged") / "run"
    shutil.copytree(tiny_run.home / "whole", run)
    checker = Child("checker.py")
    yield Damaged(run, checker)
    checker.close()


def fuzz(examples: int, damaged: Damaged) -> None:
    @seed(0)
    @settings(max_examples=examples, deadline=None, database=None, suppress_health_check=QUIET)
    @given(st.sampled_from(sorted(damaged.good)), STEPS)
    def attack(name, steps):
        damaged.check(name, steps)

    attack()


def test_the_run_has_every_kind_of_file(damaged):
    names = {name.rpartition("/")[2] for name in damaged.good}
    assert names >= {
        *("recipe.yaml", "environment.json", "journal.jsonl", "statistics.safetensors"),
        *("importance.csv", "plan.json", "report.json", "report.csv", "config.json"),
        *("model.safetensors", "SHA256SUMS", "README.md", "metrics.jsonl"),
        *("state-000001.safetensors", "state-000001.sha256"),
    }


@pytest.mark.fault(6)
def test_damage_is_found_and_nothing_wrong_is_read(damaged):
    fuzz(FEW, damaged)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.fault(6)
def test_much_damage_is_found_and_nothing_wrong_is_read(damaged):
    fuzz(MANY, damaged)


@pytest.mark.fault(6)
@pytest.mark.parametrize("kind", KINDS)
def test_every_file_is_damaged_once_in_each_way(damaged, kind):
    for name in damaged.good:
        assert damaged.check(name, [(kind, 0.4, 3, b"\xa5" * 7)])


def go_on(subject: Subject, name: str, steps: list) -> None:
    """The same command after the damage: the right result, or a documented status."""
    out = subject.home / f"damaged-{random.getrandbits(60):x}"
    shutil.copytree(subject.home / "whole", out)
    path = out / name
    path.write_bytes(damage(path.read_bytes(), steps))
    done = subject.run(out)
    if done.status:
        reported(done, 2, 3)
    else:
        assert result(out) == subject.result, (name, steps)
    shutil.rmtree(out)


@pytest.mark.fault(6)
@pytest.mark.parametrize(
    "name", ["journal.jsonl", "recipe.yaml", "trained/SHA256SUMS", "statistics.safetensors"]
)
def test_the_same_command_mends_what_is_damaged(tiny_run, name):
    go_on(tiny_run, name, [("flip", 0.3, 2, b"x")])


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.fault(6)
def test_the_same_command_mends_much_that_is_damaged(tiny_run):
    source = random.Random(0)
    whole = tiny_run.home / "whole"
    names = [p.relative_to(whole) for p in sorted(whole.rglob("*")) if p.is_file()]
    for _ in range(60):
        go_on(tiny_run, str(source.choice(names)), random_steps(source, empty=0.01))
