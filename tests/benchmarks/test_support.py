"""The support table: a row made here again, what its checks notice, and the page that it makes."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import csv_rows
import pytest
import support
import support_mask
import support_page
import support_row
import support_subject
import torch
from foreign_networks import FOREIGN
from network_blocks import KINDS
from random_networks import Network
from torch import nn

from seprune import RefitOptions, analyse, prune, refit
from seprune.export import architecture
from seprune.models import NETWORKS
from seprune.pruning.plan import PruningPlan, plan_of

NOT_RUN = 0  # networks that this path has not been tried on yet: only to be made smaller
# rows that are known to fail
FAILING: set[str] = set()
FEW = "seprune/se_resnet8"


@pytest.fixture(scope="module")
def rows() -> dict[str, dict[str, str]]:
    return support.rows()


@pytest.fixture(scope="module")
def subject() -> support_subject.Subject:
    return support_subject.subject_of(FEW)


@pytest.fixture(scope="module")
def plan(subject: support_subject.Subject) -> PruningPlan:
    structure = analyse(subject.model, subject.inputs(2))
    keep = {g.name: range(g.units // 2) for g in structure.groups if g.prunable}
    return plan_of(structure.groups, keep, {})


# -- what was measured -----------------------------------------------------------------------------


def test_the_table_names_every_network_of_ours_and_forty_of_other_libraries() -> None:
    assert {f"seprune/{name}" for name in NETWORKS} <= set(support.ROWS)
    assert len(set(support.ROWS) - set(FOREIGN)) >= 97
    assert len(FOREIGN) >= 40
    assert len({support_page.family(name) for name in FOREIGN}) >= 8
    assert len(set(support.ROWS)) == len(support.ROWS)


def test_every_network_has_a_row_or_is_named_as_not_run(rows: Any) -> None:
    left = set(support.ROWS) - set(rows)
    named = support.PAGE.read_text().partition("## Not run by this path yet")[2]
    named = named.partition("##")[0]
    assert len(left) <= NOT_RUN
    assert set(rows) <= set(support.ROWS)
    assert all(name.partition("/")[2] in named for name in left)


def test_every_row_passes_but_those_known_to_fail(rows: Any) -> None:
    assert {name for name, row in rows.items() if row["failed"]} == FAILING


def test_passing_rows_hold_what_was_checked(rows: Any) -> None:
    for name, row in rows.items():
        if row["failed"]:
            continue
        reached = [float(r) for r in row["macs"].split()]
        assert len(reached) == len(support_row.BUDGETS), name
        assert float(row["masked"]) <= support_row.EXACT, name
        least = float(row["least"] or 0)
        pairs = zip(reached, support_row.BUDGETS)
        assert all(r <= max(b, least) + 5e-5 for r, b in pairs), name
        assert int(row["refitted"]) > 0 or row["skipped"], name
        assert float(row["seconds"]) > 0, name


def test_the_page_is_what_the_rows_say(rows: Any) -> None:
    drawn = csv_rows.read(support.DRAWN)
    assert support.PAGE.read_text() == support_page.render(rows, support.ROWS, drawn)


def test_five_thousand_networks_of_the_generator_are_right() -> None:
    """All kinds of its blocks are among them, and a seed draws what its row says."""
    rows = csv_rows.read(support.DRAWN)
    assert [int(row["seed"]) for row in rows] == list(range(5000))
    assert [row["seed"] for row in rows if row["problems"]] == []
    assert {kind for row in rows for kind in row["kinds"].split()} == set(KINDS)
    for row in rows[:5000:500]:
        made = Network(int(row["seed"]))
        assert [str(made.nd), " ".join(made.kinds), made.head] == [
            row["dims"], row["kinds"], row["head"],
        ]  # fmt: skip


def in_this_process(folder: Path, device: str) -> int:
    support_row.answer(folder, device)
    return 0


@pytest.mark.parametrize("alone", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_a_row_is_made_again(rows: Any, alone: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", f"{support.ROOT}:{support.ROOT / 'benchmarks'}")
    monkeypatch.setattr(architecture, "BUILD_SECONDS", architecture.BUILD_SECONDS)  # put back
    made = support.attempt(FEW) if alone else support_row.measure(FEW, in_this_process)
    found = {key: str(value) for key, value in made.items()}
    assert found["failed"] == ""
    for column in ("gates", "groups", "input", "other", "refitted"):
        assert found[column] == rows[FEW][column]


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("name", [n for n in support.ROWS if n not in FOREIGN])
def test_every_row(name: str) -> None:
    assert support_row.measure(name)["failed"] == ""


@pytest.mark.slow
def test_a_row_that_takes_too_long_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", f"{support.ROOT}:{support.ROOT / 'benchmarks'}")
    found = support.attempt("timm/seresnet50", seconds=1)
    assert found == {"failed": "not finished after 1 s of processor time"}


# -- what a row notices ----------------------------------------------------------------------------


def test_a_cut_of_other_channels_is_not_its_masked_parent(subject: Any, plan: Any) -> None:
    assert support_row.masked_error(subject, plan) == (pytest.approx(0, abs=1e-12), set())
    group = next(g for g in plan.groups if len(g.keep) < g.units)
    others = replace(group, keep=tuple(sorted(set(range(group.units)) - set(group.keep))))
    wrong = replace(plan, groups=tuple(others if g is group else g for g in plan.groups))
    small, inputs = prune(subject.model, plan).eval(), subject.inputs(2)
    with support_mask.masked(subject.model, wrong) as twin:
        a, b = support_subject.outputs(small, inputs), support_subject.outputs(twin, inputs)
    assert support_row.difference(a[0], b[0]) > 1e-3


class Reads(nn.Module):
    """Layers that read in ways of their own: transposed, grouped, by name, over the last axis."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3, padding=1)
        self.up = nn.ConvTranspose2d(8, 12, 2, stride=2)
        self.mix = nn.Conv2d(12, 12, 1, groups=3)
        self.matrix = nn.Parameter(torch.randn(10, 12, 1, 1))
        self.last = nn.Linear(10, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.mix(self.up(self.first(x).relu()).relu()).relu()
        return self.last(nn.functional.conv2d(x, self.matrix).relu().mean((2, 3)))


def test_layers_of_all_kinds_read_zeros_where_channels_go() -> None:
    """Against the same network written out, with each tensor multiplied by zeros and ones."""
    torch.manual_seed(0)
    model, x = Reads().double().eval(), torch.rand(2, 3, 4, 4, dtype=torch.float64)
    structure = analyse(model, x)
    assert [g.name for g in structure.groups if not g.prunable] == ["last"]
    keep = {g.name: range(0, g.units, 2) for g in structure.groups if g.prunable}
    plan = plan_of(structure.groups, keep, {})
    kept = plan.layers()

    def zeroed(value: torch.Tensor, layer: str, side: str) -> torch.Tensor:
        factors = torch.zeros(value.shape[1], dtype=torch.float64)
        factors[torch.from_numpy(kept[layer][side])] = 1
        return value * factors.view(-1, *[1] * (value.dim() - 2))

    functional = nn.functional
    made = zeroed(model.first(x).relu(), "up", "in")
    made = zeroed(model.up(made).relu(), "mix", "in")
    made = zeroed(model.mix(made).relu(), "matrix", "dim1")
    made = functional.conv2d(made, model.matrix).relu().mean((2, 3))
    want = model.last(zeroed(made, "last", "in"))
    before = copy.deepcopy(model.state_dict())
    with support_mask.masked(model, plan) as twin:
        torch.testing.assert_close(twin(x), want, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(prune(model, plan).eval()(x), want, rtol=1e-12, atol=1e-12)
    assert all(torch.equal(before[name], t) for name, t in model.state_dict().items())


def test_a_weight_that_a_function_is_given_reads_zeros_too() -> None:
    class ByFunction(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = nn.Linear(3, 6), nn.Linear(6, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return nn.functional.linear(self.one(x), self.two.weight)

    torch.manual_seed(0)
    model, x = ByFunction().eval(), torch.rand(2, 3)
    structure = analyse(model, x)
    plan = plan_of(structure.groups, {"one": range(2)}, {})
    with support_mask.masked(model, plan) as twin:
        want = model.one(x)[:, :2] @ model.two.weight[:, :2].T
        torch.testing.assert_close(twin(x), want)


class Attention(nn.Module):
    """Queries and keys, which no layer reads, cut out of one map by sizes written into code."""

    def __init__(self) -> None:
        super().__init__()
        self.made = nn.Conv2d(8, 16, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.made(x).flatten(2).split((4, 4, 8), dim=1)
        return (v @ (q.transpose(1, 2) @ k).softmax(-1)).view_as(x)


def test_a_query_without_a_reader_is_zero_and_nothing_else_of_its_module() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 1), Attention(), nn.Conv2d(8, 4, 1)).double().eval()
    x = torch.rand(2, 3, 4, 4, dtype=torch.float64)
    structure = analyse(model, x)
    group = next(g for g in structure.groups if g.prunable and "split#1" in str(g.members))
    plan = plan_of(structure.groups, {group.name: [0, 2]}, {})
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for tensor in twin[1].made.parameters():
            tensor[[1, 3, 5, 7]] = 0  # queries and keys of the same numbers
    with support_mask.masked(model, plan) as masked:
        torch.testing.assert_close(masked(x), twin(x), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(prune(model, plan).eval()(x), twin(x), rtol=1e-12, atol=1e-12)


def test_wrong_costs_shapes_and_errors_are_noted(subject: Any, plan: Any) -> None:
    structure = analyse(subject.model, subject.inputs(2))
    small = prune(subject.model, plan).eval()
    kept = {g.name: len(g.keep) for g in plan.groups}
    macs, params = structure.macs_at(kept), structure.params_at(kept)
    facts = {"macs": [2 * macs, macs], "params": [0, params], "targets": {"macs": macs}}

    def noted(**changes: Any) -> list[str]:
        row = support_row.Row()
        planned = replace(plan, facts={**facts, **changes})
        support_row.check_costs(row, subject, structure, (planned, small))
        return row.problems

    assert noted() == []
    assert noted(macs=[2 * macs, macs - 1]) == [f"{macs - 1} MACs predicted, {macs} counted"]
    assert noted(params=[0, 1]) == [f"1 parameters predicted, {params} counted"]
    assert "of the MACs, the target is" in noted(targets={"macs": int(1.2 * macs)})[0]
    assert "of the MACs, the target is" in noted(targets={"macs": macs - 1})[0]


def test_a_refit_that_makes_a_layer_worse_is_noted(subject: Any, plan: Any) -> None:
    small = prune(subject.model, plan).eval()
    options = RefitOptions(images=16, rows=512, device="cpu")
    found = refit(subject.model, small, plan, support_row.images(subject), options=options)
    row = support_row.Row()
    support_row.check_refit(row, found)
    assert row.problems == []
    name, (before, _) = next(iter(found.errors.items()))
    worse = replace(found, errors={**found.errors, name: (before, 1.01 * before)})
    support_row.check_refit(row, worse)
    assert row.problems == [f"the refit's error rises in {name}"]
    lost = replace(found, errors={**found.errors, name: (before, float("nan"))})
    support_row.check_refit(row, lost)
    assert len(row.problems) == 2


def test_outputs_that_change_or_are_not_finite_are_noted(subject: Any) -> None:
    wrong = copy.deepcopy(subject.model)
    last = [m for m in wrong.modules() if isinstance(m, nn.Linear)][-1]
    with torch.no_grad():
        last.bias[0] = float("nan")
    row = support_row.Row()
    support_row.check_forward(row, subject, wrong, 0.5)
    assert set(row.problems) == {"outputs at 0.5 are not finite"}


def test_a_network_whose_signals_die_is_brought_to_life_or_refused() -> None:
    """With weights this small, every check of values would pass whatever was cut."""
    torch.manual_seed(0)
    conv, norm = nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8)
    model = nn.Sequential(conv, norm, nn.ReLU(), nn.Conv2d(8, 4, 1)).eval()
    with torch.no_grad():
        conv.weight.mul_(1e-6)
    images, two = torch.rand(8, 3, 6, 6), torch.rand(2, 3, 6, 6)
    assert not support_subject.answers(model, two)
    before = norm.momentum, norm.training
    norm.eps = 1e-20
    support_subject.enliven(model, images)
    assert support_subject.answers(model, two)
    assert (norm.momentum, norm.training) == before
    made = conv(images).transpose(0, 1).flatten(1)
    torch.testing.assert_close(norm.running_mean, made.mean(1))
    torch.testing.assert_close(norm.running_var, made.var(1))


def test_a_step_that_raises_is_a_finding() -> None:
    row = support_row.Row()
    with row.step("refit"):
        raise ValueError("what\nfor")
    assert row.problems == ["refit: ValueError: what"]


def test_differences_are_relative_to_the_largest_value() -> None:
    assert support_row.difference(torch.tensor([1.0, 4.0]), torch.tensor([2.0, 4.0])) == 0.25
    assert support_row.difference(torch.zeros(2), torch.zeros(3)) == float("inf")


# -- the page --------------------------------------------------------------------------------------


def _row(**changes: str) -> dict[str, str]:
    return {
        "failed": "", "groups": "21", "whole": "8 SE hidden; 1 an output", "gap": "0.4 0.1",
        "seconds": "12.0", "least": "", "across": "", "skipped": "", "refitted": "9",
        "hardware": "CPU", "torch": "2.14.1", "date": "2026-11-30", **changes,
    }  # fmt: skip


def test_the_page_names_what_failed_what_was_not_run_and_what_has_no_proof() -> None:
    found = {
        "timm/a": _row(across="layer_norm", least="0.310"),
        "timm/b": _row(failed="refit: crash", gap="0.2 0.3", skipped="2 beyond"),
        "smp/x": _row(whole="2 an output"),
    }
    drawn = [
        {"seed": "0", "dims": "2", "kinds": "se conv", "problems": ""},
        {"seed": "7", "dims": "3", "kinds": "se", "problems": "other shapes"},
    ]
    page = support_page.render(found, [*found, "timm/c"], drawn)
    assert "of 2 kinds of blocks, in 1 to 3\ndimensions" in page
    assert "1 of 2 have a problem" in page
    assert "\n- 7: other shapes\n" in page
    assert "2 of 3 networks pass" in page
    assert (
        "(1 that seprune knows by\nname, 1 of other libraries). 1 of the 4 listed have not been run"
        in page
    )
    assert "| timm | 2 | 1 | 42 | 18 | 0.3 -> 0.2 | 12 |" in page
    assert "## Not passed\n\n- `timm/b`: refit: crash\n" in page
    assert "## Not run yet\n\n- timm: c\n" in page
    assert "Not run yet" not in support_page.render(found, list(found), drawn)
    assert "- `layer_norm`: timm/a\n" in page
    assert "- `timm/a`: down to 0.310 of the MACs\n" in page
    assert "- SE hidden: 16 groups of 2 networks\n- an output: 4 groups of 3 networks\n" in page
    assert "- `timm/b`, beside 9 refitted: 2 beyond\n" in page


# -- another device --------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("name", [FEW, "torchvision/ssdlite320_mobilenet_v3_large"])
def test_a_folder_is_loaded_on_another_device(name: str, tmp_path: Path) -> None:
    subject = support_subject.subject_of(name)
    structure = analyse(subject.model, subject.inputs(2))
    keep = {g.name: range(-(-g.units // 2)) for g in structure.groups if g.prunable}
    plan = plan_of(structure.groups, keep, {})
    small = prune(subject.model, plan).eval()
    support_row.save(small, tmp_path / "m", subject.architecture.cut(plan))
    there = support_row.ask(tmp_path, subject.inputs(2), "cuda", support_row.fresh_process)
    here = support_subject.outputs(small, subject.inputs(2))
    assert max(map(support_row.difference, there, here)) <= 1e-3
