"""How many threads: cores by affinity and quota, and a trial with rates of exact values."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch

from seprune.pipeline.run_folder import kept_threads
from seprune.runtime import threads
from seprune.runtime.environment import environment
from seprune.runtime.threads import Threads, choose_threads, cpu_quota, tried, usable_cores


@pytest.fixture
def eight_cores(monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(threads, "usable_cores", lambda: 8)


@pytest.mark.parametrize(
    ("files", "quota", "cores"),
    [
        ({}, None, 6),
        ({"cpu.max": "max 100000"}, None, 6),
        ({"cpu.max": "250000 100000"}, 2.5, 2),
        ({"cpu.max": "50000 100000"}, 0.5, 1),
        ({"cpu.max": "1600000 100000"}, 16.0, 6),
        ({"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"}, None, 6),
        ({"cpu/cpu.cfs_quota_us": "300000", "cpu/cpu.cfs_period_us": "100000"}, 3.0, 3),
        ({"cpu.max": "what"}, None, 6),
    ],
)
def test_cores_by_affinity_and_quota(tmp_path: Path, monkeypatch, files, quota, cores):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(6)), raising=False)
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(f"{text}\n")
    assert cpu_quota(tmp_path) == quota
    assert usable_cores(tmp_path) == cores


@pytest.mark.parametrize(
    ("rates", "best", "tries"),
    [
        ({1: 354.0, 2: 20.0}, 1, [1, 2]),  # a machine that others use too
        ({1: 100.0, 2: 190.0, 4: 300.0, 8: 310.0}, 4, [1, 2, 4, 8]),
        ({1: 100.0, 2: 190.0, 4: 370.0, 8: 700.0}, 8, [1, 2, 4, 8]),
    ],
)
def test_a_trial_finds_the_fewest_threads_that_are_fastest(eight_cores, rates, best, tries):
    asked = []

    def rate(count: int) -> float:
        asked.append(count)
        return rates[count]

    choice = choose_threads("auto", rate=rate)
    assert (choice.count, asked) == (best, tries)
    assert choice.rates == {str(n): rates[n] for n in tries}
    assert str(choice).startswith(f"threads: {best}, 8 cores to use (steps of a trial by threads: ")
    assert f"2: {rates[2]:.3g}/s" in str(choice)
    assert tried(lambda n: float(n), 6) == {1: 1, 2: 2, 4: 4, 6: 6}


def test_what_is_asked_given_or_kept_needs_no_trial(eight_cores, monkeypatch):
    assert choose_threads(3, rate=pytest.fail).count == 3
    before = Threads(4, 8, "steps of a trial", {"1": 1.0, "4": 3.0})
    assert choose_threads("auto", kept=before.plain(), rate=pytest.fail) == before
    for useless in ({"count": 4}, [], None, {**before.plain(), "cores": 2},
                    {**before.plain(), "count": "4"}, {**before.plain(), "count": 9}):  # fmt: skip
        assert choose_threads("auto", kept=useless, rate=lambda n: 1.0).count == 1
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    assert choose_threads("auto", kept=before.plain(), rate=pytest.fail).why == "OMP_NUM_THREADS"
    monkeypatch.delenv("OMP_NUM_THREADS")
    monkeypatch.setattr(threads, "usable_cores", lambda: 1)
    assert choose_threads("auto", rate=pytest.fail) == Threads(1, 1, "the only core", {})


def test_the_choice_is_in_the_environment_and_is_found_again(tmp_path: Path, monkeypatch):
    monkeypatch.setattr(threads, "_USED", [])
    assert "threads" not in environment(tmp_path, devices=False)
    choice = Threads(1, usable_cores(), "as the recipe says", {})
    threads.use_threads(choice)
    assert torch.get_num_threads() == 1
    facts = environment(tmp_path, devices=False)
    (tmp_path / "environment.json").write_text(json.dumps(facts))
    assert kept_threads(tmp_path) == choice.plain()
    for text in ("[]", "{", "{}"):
        (tmp_path / "environment.json").write_text(text)
        assert kept_threads(tmp_path) is None
    assert kept_threads(tmp_path / "absent") is None


def test_a_trial_leaves_random_state_and_threads_alone(monkeypatch):
    monkeypatch.setattr(threads, "TRIAL_SECONDS", 0.0)
    before, count = torch.get_rng_state(), torch.get_num_threads()
    assert threads.steps_per_second(2) > 0
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.get_num_threads() == count
