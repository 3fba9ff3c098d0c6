"""Times of networks in turns, with a clock of exact values."""

from __future__ import annotations

from contextlib import ExitStack

import pytest
import torch

from seprune.errors import EnvironmentFault, InputError
from seprune.pipeline import network_timer, stages, timing
from seprune.pipeline.context import Context, Runtime
from seprune.pipeline.inputs import open_both
from seprune.pipeline.network_timer import NetworkTimer
from seprune.pipeline.settings import CutSettings
from seprune.pruning.plan import plan_of
from seprune.recipe import recipe_of
from seprune.recipe.budget import Budget


@pytest.fixture(scope="module")
def work() -> tuple[Context, CutSettings]:
    recipe = recipe_of(
        {"name": "x", "model": {"name": "seprune/se_resnet20"}, "data": {"source": "digits"},
         "importance": {"criterion": "l2"}, "prune": {"recover": "none"}, "device": "cpu"}
    )  # fmt: skip
    context = Context(*open_both(recipe), Runtime(torch.device("cpu")))
    return context, CutSettings.of(recipe)


@pytest.fixture(scope="module")
def context(work) -> Context:
    return work[0]


@pytest.fixture(scope="module")
def settings(work) -> CutSettings:
    return work[1]


def half(context: Context):
    keep = {g.name: range(g.units // 2) for g in context.structure.groups if g.prunable}
    return plan_of(context.structure.groups, keep, {})


def test_a_machine_that_slows_down_does_not_move_the_result(context, settings, monkeypatch):
    speed = iter([1.0, 3.0])

    def take_turns(calls, images, rounds, clock):
        assert images.shape == (1, *context.network.shape)
        now = next(speed)
        small = 4.0 if calls["small"] is not calls["dense"] else 10.0
        disturbed = [1.0, 7.0, 2.0, 9.0, 3.0] * (rounds // 5)  # other processes only add time
        return {name: [time * now * d for d in disturbed] for name, time in
                (("dense", 10.0), ("small", small))}  # fmt: skip

    monkeypatch.setattr(network_timer, "take_turns", take_turns)
    monkeypatch.setattr(network_timer, "LEAST_SECONDS", 0.0)
    timer = NetworkTimer(context, settings.plan, ExitStack())
    assert timer(plan_of(context.structure.groups, {}, {})) == 10.0
    assert timer(half(context)) == pytest.approx(4.0)


def test_a_noisy_machine_is_refused_with_its_spread(context, settings, monkeypatch):
    asked = []

    def take_turns(calls, images, rounds, clock):
        asked.append(rounds)
        return {"dense": [10.0] * rounds, "small": [2.0, 2.0, 3.5, 3.5] * (rounds // 4)}

    monkeypatch.setattr(network_timer, "take_turns", take_turns)
    monkeypatch.setattr(network_timer, "MOST_SECONDS", 0.0)
    with pytest.raises(EnvironmentFault, match="too busy for a latency budget") as caught:
        NetworkTimer(context, settings.plan, ExitStack())(half(context))
    assert asked == [40] * 8
    assert "both halves of 320 rounds differ by 75%" in (caught.value.why or "")
    assert "--macs 0.5" in (caught.value.fix or "")


def test_a_network_that_the_runtime_cannot_run_offers_eager(context, settings, monkeypatch):
    monkeypatch.setattr(timing, "ready", lambda *_: "no operator aten::strange in ONNX")
    with pytest.raises(InputError, match="the runtime 'eager' cannot run this network") as caught:
        NetworkTimer(context, settings.plan, ExitStack())(half(context))
    assert caught.value.why == "no operator aten::strange in ONNX"
    assert caught.value.fix == "--runtime eager, or plan.runtime: eager"


@pytest.mark.parametrize("written", [0.6, "6ms"])
def test_a_recipe_in_time_is_met_with_a_table_of_the_cache(
    context, settings, monkeypatch, tmp_path, written
):
    """A device whose every operator takes a time by its widths, and 1.1 of the sum together."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(
        "seprune.measure.latency_model.timer_of",
        lambda key: lambda op: op.inputs * op.outputs * op.size[0] / op.groups / 1e6,
    )
    timer, model = network_timer.latency_of(context, settings.plan, ExitStack())
    assert isinstance(timer, NetworkTimer)
    scale = 10 / model.at(context.structure.full_widths())

    def measure(plan):
        kept = {g.name: len(g.keep) for g in plan.groups}
        return 1.1 * scale * model.at(kept) - 1.0

    monkeypatch.setattr(stages, "latency_of", lambda *_: (measure, model))
    made = stages.plan(
        context, settings, stages.rank(context, settings, None), Budget.parse(latency=written)
    )
    share = 0.6 * 10.0
    assert 0.97 * share <= measure(made) <= share
    assert made.facts["latency"]["reached"] == pytest.approx(measure(made) / 10.0)


def test_the_random_state_does_not_move(context, settings, monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(
        "seprune.measure.latency_model.timer_of", lambda key: lambda op: float(torch.rand(1))
    )
    before = torch.get_rng_state()
    network_timer.latency_of(context, settings.plan, ExitStack())
    assert torch.equal(torch.get_rng_state(), before)
