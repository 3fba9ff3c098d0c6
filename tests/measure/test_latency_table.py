"""Latency tables with a timer of exact values; the work of a network against that of its cut."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import seprune
from seprune.errors import EnvironmentFault, InputError, UsageError
from seprune.measure.latency_model import timer_of
from seprune.measure.latency_runtimes import EagerTimer, OnnxTimer, difference, shortest
from seprune.measure.latency_table import (
    LatencyModel,
    LatencyTable,
    TableKey,
    build_table,
    grid,
    open_table,
)
from seprune.measure.operator_model import operator_model
from seprune.measure.work_items import Operator, work_items
from seprune.models.loader import build
from seprune.pruning.analyse import analyse
from seprune.pruning.plan import plan_of
from seprune.pruning.prune import prune

KEY = TableKey("a processor", "eager", "2.14.0", 1, 1)


def exact(operator: Operator) -> float:
    """Bilinear in the widths, so that interpolation is exact."""
    area = operator.size[0] * operator.size[1]
    if operator.kind in ("conv", "linear") and operator.groups == 1:
        return 1e-6 * area * operator.inputs * operator.outputs + 1e-3
    return 1e-6 * area * operator.inputs + 1e-3


@pytest.fixture(scope="module")
def network():
    model = build("seprune/se_resnet20", classes=10).eval()
    images = torch.zeros(1, 3, 32, 32)
    structure = analyse(model, images)
    return model, images, structure, work_items(model, structure, images)


def cut_in_half(structure):
    return {g.name: max(1, g.units // 2) if g.prunable else g.units for g in structure.groups}


def test_widths_follow_the_cut(network):
    model, images, structure, items = network
    kept = cut_in_half(structure)
    plan = plan_of(structure.groups, {name: range(n) for name, n in kept.items()}, {})
    small = prune(model, plan).eval()
    found = work_items(small, analyse(small, images), images)
    assert [i.operator for i in found] == [i.at(kept) for i in items]
    assert items[0].operator.name() == "conv 3>16 32x32 k3x3 s1x1 p1x1 g1"


def test_a_network_takes_the_sum_of_its_operators(network):
    _, _, structure, items = network
    table = build_table(LatencyTable(KEY), grid(items), exact)
    model = LatencyModel(items, table)
    for kept in (structure.full_widths(), cut_in_half(structure)):
        assert model.at(kept) == pytest.approx(sum(exact(i.at(kept)) for i in items))
    name = next(g.name for g in structure.groups if g.prunable)
    less = {**structure.full_widths(), name: cut_in_half(structure)[name]}
    change = model.of_groups((name,), less) - model.of_groups((name,), structure.full_widths())
    assert model.at(less) - model.at(structure.full_widths()) == pytest.approx(change)


def test_a_build_that_was_stopped_goes_on(network, tmp_path: Path):
    operators = grid(network[3])
    path, measured = tmp_path / "table.json", []

    def stops(operator: Operator) -> float:
        if len(measured) == 5:
            raise KeyboardInterrupt
        measured.append(operator)
        return exact(operator)

    with pytest.raises(KeyboardInterrupt):
        build_table(LatencyTable(KEY), operators, stops, path=path)
    begun = open_table(path, KEY, pytest.fail)
    assert list(begun.times) == [o.name() for o in operators[:5]]
    rest = []
    build_table(begun, operators, lambda o: rest.append(o) or exact(o), path=path)
    assert rest == operators[5:]
    again = build_table(open_table(path, KEY, pytest.fail), operators, pytest.fail, path=path)
    assert again.times == {o.name(): exact(o) for o in operators}


def test_a_model_shares_its_table_in_the_cache_folder(network, tmp_path: Path, monkeypatch):
    model, images, structure, items = network
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr("seprune.measure.latency_model.timer_of", lambda key: exact)
    made = seprune.latency_model(model, structure, images, key=KEY)
    path = tmp_path / "seprune" / "latency" / KEY.file_name()
    assert LatencyTable.load(path).times == {o.name(): exact(o) for o in grid(items)}
    monkeypatch.setattr("seprune.measure.latency_model.timer_of", lambda key: pytest.fail)
    again = seprune.latency_model(model, structure, images, key=KEY)
    assert again.at(structure.full_widths()) == made.at(structure.full_widths()) > 0
    LatencyTable(KEY, dict.fromkeys(made.table.times, 0.0)).save(path)  # as somebody may send it
    with pytest.raises(InputError, match="takes 0 ms"):
        seprune.latency_model(model, structure, images, key=KEY)


def test_onnx_runtime_is_measured_on_the_cpu():
    with pytest.raises(UsageError, match="the runtime 'onnx' is not measured on cuda") as caught:
        timer_of(TableKey("a GPU", "onnx", "1", threads=0, batch=1))
    assert caught.value.fix == "--device cpu, or --runtime eager"


def test_a_table_of_another_machine_is_measured_anew(tmp_path: Path):
    path = tmp_path / "table.json"
    LatencyTable(KEY, {"conv": 1.0}).save(path)
    notes = []
    other = TableKey("another one", "eager", "2.14.1", 1, 1)
    table = open_table(path, other, notes.append)
    assert table.times == {}
    assert (
        notes
        == [table.note]
        == [
            f"{path} is of device a processor instead of another one, "
            "version 2.14.0 instead of 2.14.1: measured anew"
        ]
    )
    assert KEY.file_name() == "a-processor-eager-2.14.0-1-1-float32.json"


@pytest.mark.parametrize("content", [[], {}, {"format": 1, "key": {}, "times": {"conv": "x"}},
                                     {"format": 1, "key": {}, "times": {"conv": -1}}])  # fmt: skip
def test_a_file_that_is_no_table_is_refused(tmp_path: Path, content):
    path = tmp_path / "table.json"
    path.write_text(json.dumps(content))
    with pytest.raises(InputError, match="it is not what seprune writes") as caught:
        LatencyTable.load(path)
    assert "measured anew: rm" in (caught.value.fix or "")


def test_a_runtime_that_is_missing_names_its_extra(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "onnxruntime", None)
    with pytest.raises(EnvironmentFault, match="the runtime 'onnx' is not installed") as caught:
        OnnxTimer(1, 1)
    assert "pip install 'seprune[onnx]'" in (caught.value.fix or "")


def test_the_shortest_calls_count():
    ticks = iter([0.0, 0.009, 1.0, 1.012, 2.0, 2.005, 3.0, 3.011, 4.0, 4.006, 5.0, 5.020])
    assert difference(lambda: None, lambda: None, lambda: next(ticks)) == pytest.approx(6.0)
    ticks = iter([0.0, 0.009, 2.0, 2.005, 4.0, 4.006])
    assert shortest(lambda: None, lambda: next(ticks)) == pytest.approx(5.0)


@pytest.mark.parametrize(
    "operator",
    [
        Operator("conv", 8, 4, (6, 6), (3, 3), (2, 2), (1, 1)),
        Operator("conv", 8, 8, (6, 6), (3, 3), (1, 1), (1, 1), groups=8),
        Operator("linear", 8, 4),
        *(Operator(kind, 8, 8, (6, 6)) for kind in ("hardswish", "silu", "binary", "pool", "cat")),
    ],
)
def test_every_copy_is_in_the_measured_model(operator: Operator):
    onnx = pytest.importorskip("onnx")
    one, three = (onnx.load_from_string(operator_model(operator, 2, n)) for n in (1, 3))
    assert len(three.graph.node) == 3 * len(one.graph.node)
    runtime = pytest.importorskip("onnxruntime")
    session = runtime.InferenceSession(three.SerializeToString())
    feed = {i.name: torch.ones([int(n) for n in i.shape]).numpy() for i in session.get_inputs()}
    assert all(o.shape[0] == 2 for o in session.run(None, feed))
    timed = EagerTimer(2).prepared(operator)()
    assert timed.shape[0] == 2
    assert timed.isfinite().all()


def test_what_a_killed_writer_left_beside_a_complete_table_is_removed(tmp_path: Path):
    """A complete table is not written again, so the look at it has to clear its folder."""
    path = tmp_path / "table.json"
    LatencyTable(KEY, {"one": 1.0}).save(path)
    left = tmp_path / ".abc.seprune.part"
    left.mkdir()
    (left / "table.json").write_text("{")
    assert open_table(path, KEY, pytest.fail).times == {"one": 1.0}
    assert [p.name for p in tmp_path.iterdir()] == ["table.json"]
