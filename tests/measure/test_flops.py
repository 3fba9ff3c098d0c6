"""MACs against closed forms and published numbers; latency's plain-data side."""

import math
import time

import pytest
import torch
from torch import nn

from seprune.errors import EnvironmentFault, InputError
from seprune.measure import latency as latency_module
from seprune.measure.flops import Cost, count, not_counted
from seprune.measure.latency import (
    Latency,
    LayerTime,
    latency,
    layer_times,
    speed_warning,
    undisturbed_clock,
)


def small_net() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1, bias=False),
        nn.BatchNorm2d(8),
        nn.Conv2d(8, 8, 3, padding=1, groups=8, bias=False),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(8, 10),
    )


def test_macs_are_the_closed_form_of_every_layer() -> None:
    dense, depthwise, linear = 8 * 3 * 9 * 64, 8 * 1 * 9 * 64, 80
    assert count(small_net(), torch.zeros(1, 3, 8, 8)) == Cost(
        macs=dense + depthwise + linear, params=8 * 3 * 9 + 16 + 8 * 9 + 90
    )


def test_a_batch_counts_as_one_image() -> None:
    net = small_net()
    assert count(net, torch.zeros(5, 3, 8, 8)) == count(net, torch.zeros(1, 3, 8, 8))


def test_several_inputs_come_as_a_tuple() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.left, self.right = nn.Linear(4, 3), nn.Linear(6, 3)

        def forward(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
            return self.left(a) + self.right(b)

    assert count(Two(), (torch.zeros(2, 4), torch.zeros(2, 6))).macs == 12 + 18


def test_the_model_is_left_as_found() -> None:
    net = small_net().train()
    net[1].eval()
    before = {k: v.clone() for k, v in net.state_dict().items()}
    count(net, torch.ones(1, 3, 8, 8))
    latency({"net": net}, (3, 8, 8), batch_sizes=(1,), repeats=1)
    layer_times(net, (3, 8, 8), repeats=1)
    assert net.training
    assert net[0].training
    assert not net[1].training
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in net.modules())


def test_measuring_does_not_move_the_random_state() -> None:
    net = small_net()
    before = torch.get_rng_state()
    latency({"net": net}, (3, 8, 8), batch_sizes=(1, 2), repeats=1)
    assert torch.equal(torch.get_rng_state(), before)


def test_tied_weights_count_once() -> None:
    layer = nn.Linear(4, 4, bias=False)
    assert count(nn.Sequential(layer, layer), torch.zeros(1, 4)) == Cost(macs=32, params=16)


@pytest.mark.parametrize(
    ("name", "millions"),
    [("mobilenet_v3_small", 56.51), ("efficientnet_b0", 385.81), ("regnet_y_400mf", 401.84)],
)
def test_macs_equal_the_numbers_torchvision_publishes(name: str, millions: float) -> None:
    from torchvision.models import get_model

    cost = count(get_model(name).to("meta"), torch.zeros(1, 3, 224, 224))
    assert round(cost.macs / 1e6, 2) == millions


def test_a_wrong_input_is_explained() -> None:
    with pytest.raises(InputError) as caught:
        count(small_net(), torch.zeros(1, 1, 8, 8))
    assert caught.value.what == "Sequential does not run on an input of shape (1, 1, 8, 8)"
    assert "expected input[1, 1, 8, 8] to have 3 channels" in caught.value.why
    assert "--input 3x224x224" in caught.value.fix


def test_operators_without_a_formula_are_named() -> None:
    names = not_counted(small_net().append(nn.Hardswish()), torch.zeros(1, 3, 8, 8))
    assert "aten.hardswish" in names
    assert "aten.convolution" not in names
    assert "aten.view" not in names


def test_latency_has_a_row_for_every_model_and_batch_size() -> None:
    nets = {"baseline": small_net(), "pruned": small_net()}
    rows = latency(nets, (3, 8, 8), batch_sizes=(4, 1), repeats=3)
    assert [(r.name, r.batch) for r in rows] == [
        ("baseline", 1),
        ("pruned", 1),
        ("baseline", 4),
        ("pruned", 4),
    ]
    for row in rows:
        assert row.median_ms is not None
        assert row.median_ms > 0
        assert row.spread_ms is not None
        assert row.spread_ms >= 0
        assert row.threads == torch.get_num_threads()
        assert row.device
        assert row.runtime == "eager"


def test_one_thread_is_timed_without_what_others_take_of_its_core(monkeypatch) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    clock = undisturbed_clock("cpu")
    began = clock()
    time.sleep(0.05)  # as when another process has the core
    assert clock() - began < 0.02
    while clock() - began < 0.03:  # work counts
        pass
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    assert undisturbed_clock("cpu") is time.perf_counter
    assert undisturbed_clock("cuda") is time.perf_counter


def test_models_take_turns() -> None:
    order: list[str] = []
    calls = {name: lambda _, name=name: order.append(name) for name in "ab"}
    latency(calls, (1,), batch_sizes=(1,), repeats=4, runtime="onnxruntime")
    assert order == ["a", "b"] * 3 + ["b", "a", "a", "b", "b", "a", "a", "b"]


def hungry(limit: int) -> nn.Module:
    class Hungry(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            if len(x) > limit:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")
            return x

    return Hungry()


def test_a_batch_that_does_not_fit_is_skipped_and_reported() -> None:
    rows = latency({"net": hungry(8)}, (3,), batch_sizes=(1, 64), repeats=1)
    assert rows[0].median_ms is not None
    assert (rows[1].batch, rows[1].median_ms, rows[1].note) == (64, None, "out of memory")


def test_out_of_memory_at_the_smallest_batch_is_an_error() -> None:
    with pytest.raises(EnvironmentFault) as caught:
        latency({"net": hungry(0)}, (3, 8, 8), batch_sizes=(1, 2), repeats=1)
    assert caught.value.what == "latency: out of memory at batch 1 on cpu"
    assert "3x8x8" in caught.value.why
    assert caught.value.fix


def test_a_batch_that_would_take_too_long_is_left_out_and_reported(monkeypatch) -> None:
    monkeypatch.setattr(latency_module, "LONGEST_SECONDS", 0.03)
    nap = {"net": lambda _: time.sleep(0.002)}
    rows = latency(nap, (1,), batch_sizes=(1, 64), repeats=1)
    assert rows[0].median_ms is not None
    assert rows[1].median_ms is None
    assert rows[1].note.startswith("it would have taken about ")


def test_other_errors_are_not_taken_for_lack_of_memory() -> None:
    with pytest.raises(RuntimeError, match="expected input"):
        latency({"net": small_net()}, (1, 8, 8), batch_sizes=(1,), repeats=1)


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a CUDA device")
def test_a_missing_device_is_an_error() -> None:
    with pytest.raises(EnvironmentFault, match="device 'cuda' is not there") as caught:
        latency({"net": small_net()}, (3, 8, 8), device="cuda")
    assert caught.value.fix == "--device cpu"


def test_layer_times_add_up_to_the_pass() -> None:
    layers = layer_times(small_net(), (3, 8, 8), repeats=3)
    assert {layer.name for layer in layers} == {*"012345", "(between layers)"}
    assert math.isclose(sum(layer.share for layer in layers), 1.0)
    assert [layer.ms for layer in layers] == sorted((x.ms for x in layers), reverse=True)
    assert {x.kind for x in layers if x.name == "0"} == {"Conv2d"}


def row(name: str, ms: float | None) -> Latency:
    return Latency(name, 1, ms, 0.1, "Testor 3000", 2)


@pytest.mark.parametrize(
    ("before", "after", "warned"),
    [(10.0, 8.0, True), (10.0, 6.0, False), (10.0, 11.0, True), (None, 8.0, False)],
)
def test_a_warning_below_half_of_the_promised_gain(
    before: float | None, after: float, warned: bool
) -> None:
    warning = speed_warning(
        [(row("baseline", before), row("pruned", after))], macs_before=200, macs_after=100
    )
    assert (warning is not None) == warned


def test_the_warning_names_the_layers_that_eat_the_time() -> None:
    warning = speed_warning(
        [(row("baseline", 10.0), row("pruned", 8.0))],
        macs_before=200,
        macs_after=100,
        layers=[LayerTime("conv1", "Conv2d", 6.0, 0.75)],
    )
    assert warning == (
        "pruned: 1.25x as fast at batch 1 (eager) on Testor 3000, where the MACs promise 2.00x; "
        "the time goes to conv1 75%"
    )
