"""Masking one group is cutting it, and what it costs is measured group by group."""

from __future__ import annotations

import io
import json
import sys

import pytest
import torch
from nets import DEPENDENT, dependent, images
from rich.console import Console
from torch import Tensor, nn

from seprune import cli
from seprune.cli.sensitivity import shares_of
from seprune.errors import InputError, UsageError
from seprune.graph.groups import find_structure
from seprune.importance import Importance, Scoring, score
from seprune.importance.ablation import (
    SHARES,
    AblationLoss,
    GroupSensitivity,
    Sensitivity,
    SensitivityOptions,
    lowest,
    masked,
    measure_sensitivity,
    weighed,
)
from seprune.measure.metrics import evaluate
from seprune.pipeline.run import run
from seprune.pruning.analyse import analyse
from seprune.pruning.plan import plan_of
from seprune.pruning.prune import prune
from seprune.recipe import recipe_of
from seprune.report import sensitivity as table
from seprune.report import terminal
from seprune.report.measurement import read
from seprune.runtime.files import write_json

LOOKS_AT_ALL_CHANNELS = {"group norm"}


def answer(model: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        return model.eval()(x)


@pytest.mark.parametrize("kind", sorted(set(DEPENDENT) - LOOKS_AT_ALL_CHANNELS))
def test_a_masked_group_answers_like_the_cut_network(kind):
    model, x = dependent(kind).double(), images(3).double()
    structure = analyse(model, images().double())
    before = {name: value.clone() for name, value in model.state_dict().items()}
    checked = 0
    for group in (g for g in structure.groups if g.prunable and g.units > 1):
        gone = list(range(0, group.units, 2))
        keep = sorted(set(range(group.units)) - set(gone))
        small = prune(model, plan_of(structure.groups, {group.name: keep}, {}))
        with masked(model, group, gone):
            torch.testing.assert_close(answer(model, x), answer(small, x))
        checked += 1
    assert checked or kind in ("sorted", "unbound", "hard view", "slice fixed")
    after = model.state_dict()
    assert all(torch.equal(after[name], value) for name, value in before.items())
    assert not any(m._forward_pre_hooks for m in model.modules())


def measured(*shares: float) -> tuple[nn.Module, Sensitivity, list[tuple[Tensor, Tensor]]]:
    model = dependent("residual")
    loader = [
        (images(4, seed=1), torch.tensor([0, 1, 2, 0])),
        (images(2, seed=2), torch.tensor([1, 2])),
    ]
    structure = find_structure(model, images())
    scores = score(structure, model=model, scoring=Scoring("l2"))
    options = SensitivityOptions(shares or SHARES, "cpu")
    return model, measure_sensitivity(model, structure, scores, loader, options=options), loader


def test_losses_are_those_of_networks_that_are_cut_in_one_group():
    model, found, loader = measured(0.25, 0.5)
    structure = find_structure(model, images())
    scores = score(structure, model=model, scoring=Scoring("l2"))
    assert (found.criterion, found.shares, found.images) == ("l2", (0.25, 0.5), 6)
    whole = evaluate(model, loader, device="cpu")
    assert (found.value, found.loss) == (whole.top1, whole.loss)
    assert [g.group for g in found.groups] == [g.name for g in structure.groups if g.prunable]
    for row, group in zip(found.groups, (g for g in structure.groups if g.prunable)):
        for share, cell in zip(found.shares, row.losses):
            order = scores.scores[group.name].argsort()
            keep = sorted(order[cell.removed :].tolist())
            assert cell.removed == share * group.units
            small = prune(model, plan_of(structure.groups, {group.name: keep}, {}))
            there = evaluate(small, loader, device="cpu")
            assert cell.value == there.top1
            assert cell.loss == pytest.approx(there.loss, rel=1e-5)


def test_it_is_plain_data_that_comes_back(tmp_path):
    _, found, _ = measured()
    assert found.shares == (0.1, 0.3, 0.5)
    write_json(tmp_path / "sensitivity.json", found.plain())
    assert Sensitivity.load(tmp_path / "sensitivity.json") == found


@pytest.mark.parametrize(("key", "value"), [("value", [0.5]), ("loss", "high"), ("removed", [0])])
def test_a_row_that_cannot_be_is_refused_with_its_place(tmp_path, key, value):
    _, found, _ = measured()
    plain = found.plain()
    plain["groups"][1][key] = value
    write_json(tmp_path / "sensitivity.json", plain)
    with pytest.raises(InputError, match=r"sensitivity\.json: groups\[1\]"):
        Sensitivity.load(tmp_path / "sensitivity.json")


def test_one_unit_goes_at_least_and_one_stays():
    group = find_structure(dependent("residual"), images()).groups[0]
    scores = Importance("x", {group.name: torch.tensor([3.0, 1, 2, 9, 8, 7, 6, 5])})
    assert lowest(scores, group, 0.01) == [1]
    assert lowest(scores, group, 0.3) == [1, 2]
    assert lowest(scores, group, 0.99) == [0, 1, 2, 4, 5, 6, 7]


def test_shares_and_groups_that_make_no_sense_are_refused():
    with pytest.raises(UsageError) as caught:
        measured(0.1, 1.0)
    assert caught.value.what == "1.0 is no share of a group"
    assert caught.value.fix == "for example 0.1,0.3,0.5"
    model = dependent("residual")
    with pytest.raises(InputError, match="no dependency group has a score"):
        measure_sensitivity(model, find_structure(model, images()), Importance("x", {}), [])


def test_measured_losses_become_scores_in_the_order_of_the_criterion():
    own = torch.tensor([4.0, 1, 3, 2, 9, 8, 7, 6, 5, 10])
    importance = Importance("x", {"g": own, "h": torch.ones(4)})
    rows = GroupSensitivity(
        "g",
        10,
        7,
        (AblationLoss(1, 0.9, 1.1), AblationLoss(3, 0.8, 1.7), AblationLoss(5, 0.5, 3.7)),
    )
    made = weighed(importance, Sensitivity("x", (0.1, 0.3, 0.5), 8, "top1", 0.9, 1.0, (rows,)))
    order = made.scores["g"].argsort()
    assert torch.equal(order, importance.scores["g"].argsort())
    # slopes 0.1, 0.3, 1.0 a unit; after the last share they grow by 0.7 every 2 units
    wanted = [0.1, 0.3, 0.3, 1.0, 1.0, 1.175, 1.525, 1.875, 2.225, 2.575]
    torch.testing.assert_close(made.scores["g"][order], torch.tensor(wanted).double())
    assert set(made.scores) == {"g"}


def test_a_loss_that_falls_makes_no_unit_cheaper_than_one_before_it():
    importance = Importance("x", {"g": torch.arange(10.0)})
    rows = GroupSensitivity(
        "g",
        10,
        7,
        (AblationLoss(1, 0.9, 1.2), AblationLoss(3, 0.9, 0.8), AblationLoss(5, 0.9, 1.2)),
    )
    found = weighed(importance, Sensitivity("x", (0.1, 0.3, 0.5), 8, "top1", 0.9, 1.0, (rows,)))
    wanted = [0.2] * 10
    torch.testing.assert_close(found.scores["g"], torch.tensor(wanted).double())


def test_the_table_says_what_is_lost():
    _, found, _ = measured()
    plain = found.plain()
    assert table.head(plain) == ["group", "units", "MACs a unit", "-10%", "-30%", "-50%"]
    row, first = table.rows(plain)[0], found.groups[0]
    value, loss = (getattr(first.losses[0], k) - getattr(found, k) for k in ("value", "loss"))
    shown = f"{100 * value:+.2f} points ({loss:+.2f})".replace("-", "−")
    assert row[:2] == ["stem", "8"]
    assert row[3] == shown
    assert table.caption(plain).startswith("by l2, 6 validation images, uncut: top-1 ")


def test_the_command_and_a_run_measure_on_the_validation_split(monkeypatch, capsys, tmp_path):
    words = ["sensitivity", "seprune/se_resnet8", "--data", "digits", "--importance", "l2"]
    monkeypatch.setattr(sys, "argv", ["seprune", *words, "--images", "20", "--json"])
    with pytest.raises(SystemExit):
        cli.main()
    document = json.loads(capsys.readouterr().out)
    assert (document["criterion"], document["images"], document["shares"]) == (
        "l2",
        20,
        [0.1, 0.3, 0.5],
    )
    groups = {row["group"] for row in document["groups"]}
    assert {"conv1", "layer1.0.conv1"} <= groups
    recipe = recipe_of({
        "name": "x", "model": {"name": "seprune/se_resnet8"},
        "data": {"source": "digits", "workers": 0}, "importance": {"criterion": "l2"},
        "sensitivity": {"images": 20}, "prune": {"recover": "none"},
        "plan": {"macs": 0.5, "allocation": "sensitivity"},
        "finetune": {"epochs": 0, "recalibrate": 0}, "report": {"latency": False},
    })  # fmt: skip
    report = run(recipe, tmp_path / "run")
    assert report.sensitivity["groups"] == document["groups"]
    assert report.budgets[0].allocation == "sensitivity"
    assert report.budgets[0].reached <= 0.5
    assert "Sensitivity of every group" in (tmp_path / "run" / "report.html").read_text()
    assert read(tmp_path / "run").sensitivity == report.sensitivity
    shown = Console(width=80, file=io.StringIO())
    terminal.show(report, shown)
    assert "Sensitivity by l2, 20 validation images" in shown.file.getvalue()


@pytest.mark.parametrize("text", ["0.1,x", "", "0,0.5", "1"])
def test_shares_on_the_command_line_that_are_none(text):
    with pytest.raises(UsageError) as caught:
        shares_of(text)
    assert caught.value.what == f"--shares {text}: not shares of a group"
    assert caught.value.fix == "--shares 0.1,0.3,0.5"
