"""Latencies of a run by runtime: everybody has a row, whoever cannot run has a note."""

from __future__ import annotations

import pytest
import torch

from seprune.measure.latency import Latency, LayerTime
from seprune.pipeline import timing
from seprune.pipeline.context import Context, Runtime
from seprune.pipeline.network import LoadedNetwork, open_network
from seprune.pipeline.timing import TimingSetup
from seprune.recipe import recipe_of
from seprune.recipe.sections import ReportSection
from seprune.report import Measurement

BASE, CUT = ("baseline", None), ("pruned", "macs 0.5")


def setup(latency: object) -> tuple[ReportSection, LoadedNetwork, TimingSetup]:
    values = {"name": "t", "model": {"name": "seprune/se_resnet8", "input": [3, 8, 8]},
              "data": {"source": "digits"}, "report": {"latency": latency, "batch_sizes": [1, 2]},
              "device": "cpu"}  # fmt: skip
    recipe = recipe_of(values)
    network = open_network(recipe.model)
    context = Context(network, None, Runtime(torch.device("cpu")))
    return recipe.report, network, TimingSetup.of(context, recipe.report.batch_sizes)


def measured(latency: object) -> dict[tuple[str, str | None], list[Latency]]:
    section, network, made = setup(latency)
    rows = [
        Measurement(*key, {"top1": 0.9}, 0.1, 10, 0, macs=macs, params=1)
        for key, macs in ((BASE, 200), (CUT, 100))
    ]
    networks = dict.fromkeys((BASE, CUT), network.model)
    runtimes = timing.runtimes(section, made)
    found = timing.with_latency(rows, networks, made, runtimes=runtimes)
    return {(m.stage, m.budget): m.latency for m in found}


def test_a_compiler_that_fails_is_a_note_and_the_rest_is_measured(monkeypatch):
    def broken(*_: object, **__: object) -> None:
        raise RuntimeError("no working C++ compiler\nmore of it")

    monkeypatch.setattr(torch, "compile", broken)
    found = measured(["eager", "compiled"])
    for key in (BASE, CUT):
        assert [(x.runtime, x.batch) for x in found[key]] == [
            ("eager", 1), ("eager", 2), ("compiled", 1), ("compiled", 2)
        ]  # fmt: skip
        assert all(x.median_ms for x in found[key][:2])
        assert {(x.median_ms, x.note) for x in found[key][2:]} == {
            (None, "RuntimeError: no working C++ compiler")
        }


@pytest.mark.slow
def test_onnx_runtime_is_measured_where_it_is_installed():
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    found = measured(True)
    assert {x.runtime for x in found[CUT]} == {"eager", "onnx"}
    assert all(x.median_ms for x in found[CUT])


def test_a_missing_onnx_runtime_is_named_only_where_it_was_asked_for(monkeypatch):
    monkeypatch.setattr(timing.importlib.util, "find_spec", lambda _: None)
    assert {x.runtime for x in measured(True)[BASE]} == {"eager"}

    def missing() -> None:
        raise timing.SepruneError("ONNX export needs packages", why="No module named 'onnx'")

    monkeypatch.setattr("seprune.export.onnx.onnx_runtime", missing)
    asked = measured(["onnx"])[BASE]
    assert {x.note for x in asked} == {"ONNX export needs packages: No module named 'onnx'"}


@pytest.mark.slow
def test_compiled_networks_are_measured(recwarn):
    found = measured(["compiled"])
    assert [x.note for x in found[BASE]] in (["", ""], [found[BASE][0].note] * 2)
    if not found[BASE][0].note:
        assert all(x.median_ms for x in found[BASE] + found[CUT])


def test_a_warning_tells_of_every_runtime_at_its_largest_batch():
    def rows(name: str, *times: float | None) -> list[Latency]:
        keys = [("eager", 1), ("eager", 64), ("onnx", 1), ("onnx", 64)]
        return [Latency(name, b, t, 0.1, "X", 1, r) for (r, b), t in zip(keys, times)]

    _, network, made = setup(True)
    dense = Measurement(*BASE, {"top1": 0.9}, 0.1, 1, 0, macs=200, params=1,
                        latency=rows("baseline", 1.0, 10.0, 1.0, 10.0))  # fmt: skip
    cut = Measurement(*CUT, {"top1": 0.9}, 0.1, 1, 0, macs=100, params=1,
                      latency=rows("pruned macs 0.5", 0.1, 8.0, 0.9, None))  # fmt: skip
    networks = dict.fromkeys((BASE, CUT), network.model)
    (warning,) = timing.slow([dense, cut], networks, made)
    assert warning.startswith(
        "pruned macs 0.5: 1.25x as fast at batch 64 (eager), 1.11x as fast at batch 1 (onnx) on X, "
        "where the MACs promise 2.00x; the time goes to "
    )
    assert "conv" in warning
    assert "round_to" not in warning


def conv(out: int) -> torch.nn.Module:
    return torch.nn.Sequential(torch.nn.Conv2d(3, out, 1), torch.nn.Linear(4, 4))


def test_a_warning_names_what_keeps_the_network_slow_and_what_mends_it():
    layers = [LayerTime("gate", "Linear", 2.0, 0.2), LayerTime("0", "Conv2d", 8.0, 0.8)]

    def why(out: int, gates: tuple[str, ...] = (), batch: int = 8) -> list[str]:
        return timing.why_slow(conv(32), conv(out), layers, gates, batch)

    assert why(17) == [
        "1 of 1 cut layers have widths that are no multiples of 8: plan.round_to=16 mends it"
    ]
    assert why(16, ("gate",)) == [
        "the gates' layers take 20%, and hardly any MACs: plan.latency=0.5 counts them"
    ]
    assert why(16) == []
    assert why(16, batch=1) == [
        "at batch 1 the calls of the layers cost time as well: plan.latency=0.5 counts them"
    ]


def test_the_runtime_of_a_latency_budget_is_measured_too():
    section, _, made = setup(["eager"])
    assert timing.runtimes(section, made, "onnx", "eager") == ("eager", "onnx")
