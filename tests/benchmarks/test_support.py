"""The support table: its checks run here again, and docs/support.md is what its results say."""

from __future__ import annotations

import copy
import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from seprune.importance import Scoring, score
from seprune.pruning.analyse import analyse
from seprune.pruning.plan import plan_of

ROOT = Path(__file__).parents[2]


def _benchmark(name: str) -> Any:
    """A script of benchmarks/, which is no package."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "benchmarks" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


support_row = _benchmark("support_row")  # the other script imports it
support = _benchmark("support")
# one of each door; torch-pruning alone fails on the last
FEW = ["seprune/se_resnet8"]


@pytest.fixture(scope="module")
def results() -> Any:
    return json.loads(support.RESULTS.read_text())


@pytest.mark.slow
@pytest.mark.parametrize("name", FEW)
def test_row(name: str) -> None:
    row = support_row.measure(name)
    assert support.passed(row), row
    reached = [cut["macs"] for cut in row["budgets"].values()]
    assert all(0.99 * b <= r <= b for b, r in zip(support_row.BUDGETS, reached)), reached


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("name", support.ROWS)
def test_every_row(name: str) -> None:
    row = support.attempt(name)
    assert support.passed(row), row


def test_the_document_is_what_the_results_say(results: Any) -> None:
    assert support.TABLE.read_text() == support.render(results)


def test_every_network_has_a_row_that_passes(results: Any) -> None:
    assert list(results["rows"]) == support.ROWS
    assert [n for n, row in results["rows"].items() if not support.passed(row)] == []


def test_budgets_are_reached_within_one_percent_where_units_are_that_small(results: Any) -> None:
    for name, row in results["rows"].items():
        for budget, cut in row.get("budgets", {}).items():
            target = cut.get("minimum", float(budget))
            assert cut["macs"] <= target, (name, budget)
            assert cut["macs"] >= 0.99 * target or cut["tight"], (name, budget)


def row_of(**changes: Any) -> dict[str, Any]:
    cut = {"macs": 0.4999, "exact": True, "forward": True}
    return {
        "input": 128, "gates": 8, "groups": 21, "budgets": {"0.5": cut}, "seconds": 0.42,
        "whole": {"it is an output of the model": 1, "no rule for unfold in stages.2.attn": 1,
                  "no rule for unfold in stages.3.attn": 2},
        "reload": True, "process": True, "device": None, "masked": 1e-15, "mixing": [], **changes,
    }  # fmt: skip


def test_a_line_of_the_table() -> None:
    assert support.line("timm/x", row_of()) == (
        "| timm/x | 128 | 8 | 21 | 1 output, 3 no rule for unfold | 0.500 | yes | 1e-15 | yes "
        "| yes | none here | 0.4 |\n"
    )
    least = {"macs": 0.3, "minimum": 0.301, "exact": False, "forward": True}
    line = support.line("timm/x", row_of(budgets={"0.25": least}, masked=0.5, mixing=["LayerNorm"]))
    assert "| 0.300 min | runs | 5e-01 (LayerNorm) | yes |" in line
    assert "| **gone a/b** |" in support.line("timm/x", {"error": "gone a|b"})


@pytest.mark.parametrize(
    "change",
    [
        {"reload": False},
        {"process": False},
        {"device": {"name": "cuda", "tensors": False, "error": 0.0}},
        {"device": {"name": "cuda", "tensors": True, "error": 0.1}},
        {"masked": 1e-3},
        {"masked": None},
        {"budgets": {"0.5": {"macs": 0.5, "exact": False, "forward": True}}},
        {"budgets": {"0.5": {"macs": 0.5, "exact": True, "forward": False}}},
    ],
)
def test_a_row_with_one_thing_wrong_does_not_pass(change: dict[str, Any]) -> None:
    assert support.passed(row_of())
    assert not support.passed(row_of(**change))
    assert not support.passed({"error": "anything"})


def test_a_wrong_cut_is_noticed() -> None:
    """The masked parent tells a network that lost other channels than its plan says."""
    subject, _ = support_row.subject_of("seprune/se_resnet8")
    structure = analyse(subject.model, subject.inputs)
    scores = score(structure, model=subject.model, scoring=Scoring("l2")).scores
    group = next(g for g in structure.groups if g.prunable and g.name in scores)
    right = plan_of(structure.groups, {group.name: range(group.units // 2)}, {})
    wrong = plan_of(structure.groups, {group.name: range(group.units // 2, group.units)}, {})
    masked, cut = copy.deepcopy(subject.model), support_row.prune(subject.model, right)
    support_row.mask(masked, wrong)
    a, b = support_row.outputs(cut, subject.inputs), support_row.outputs(masked, subject.inputs)
    assert float((a[0] - b[0]).abs().max() / b[0].abs().max()) > 1e-3
    assert support_row.masked_error(subject, right)["masked"] < 1e-12


def test_outputs_are_equal_only_bit_for_bit() -> None:
    one = [torch.tensor([1.0, 2.0]), torch.zeros(0)]
    assert support_row.equal(one, [t.clone() for t in one])
    assert not support_row.equal(one, [one[0].nextafter(torch.tensor(9.0)), one[1]])
    assert not support_row.equal(one, one[:1])
    assert support_row.difference(torch.tensor([1.0, 4.0]), torch.tensor([2.0, 4.0])) == 0.25
    assert support_row.difference(torch.zeros(2), torch.zeros(3)) == float("inf")


def test_rows_without_a_masked_proof_are_named_with_the_layers_that_take_it_away() -> None:
    rows = {
        "timm/a": row_of(masked=0.1, mixing=["EcaModule", "ScaledStdConv2d"]),
        "timm/b": row_of(masked=0.1, mixing=["EcaModule"]),
        "timm/c": row_of(mixing=["LayerNorm"]),  # proven all the same
        "timm/d": {"error": "anything"},
    }
    assert support.reasons_of_mixing(rows) == (
        f"- `EcaModule`: {support.MIXING['Eca']}. In timm/a, timm/b.\n"
        f"- `ScaledStdConv2d`: {support.MIXING['Std']}. In timm/a.\n"
    )


@pytest.mark.gpu
@pytest.mark.parametrize("name", [*FEW, "torchvision/ssdlite320_mobilenet_v3_large"])
def test_a_folder_is_loaded_on_another_device(name: str) -> None:
    subject, _ = support_row.subject_of(name)
    structure = analyse(subject.model, subject.inputs)
    importance = score(structure, model=subject.model, scoring=Scoring("l2"))
    plan = support_row.make_plan(structure, importance, macs=0.5)
    small = support_row.prune(subject.model, plan).eval()
    found = support_row.reloaded(subject, plan, small)
    assert found["reload"]
    assert found["process"]
    assert found["device"]["tensors"]
    assert found["device"]["error"] <= support_row.CLOSE
