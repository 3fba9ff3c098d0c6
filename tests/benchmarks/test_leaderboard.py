"""The leaderboard: its statistics in closed form, and that every cell is a recipe that holds."""

from __future__ import annotations

import math
import re
import xml.etree.ElementTree as ET
from dataclasses import replace
from pathlib import Path
from typing import Any

import grids
import leaderboard
import pytest
import result_rows
import standings

from seprune.importance import CRITERIA
from seprune.recipe import load_recipe, recipe_folder


def row(method: str, seed: int, top1: float, **others: Any) -> dict[str, Any]:
    return {
        "network": "net",
        "method": method,
        "seed": seed,
        "budget": 0.5,
        "column": "bn",
        "images": 100,
        "top1": top1,
        "dense": 0.9,
        **others,
    }


def rows(**by_method: list[float]) -> list[dict[str, Any]]:
    return [row(m, s, v) for m, values in by_method.items() for s, v in enumerate(values)]


@pytest.mark.parametrize(
    ("differences", "mean", "spread", "verdict"),
    [
        ([1, 2, 3], 2, 1, "wins"),  # 2 > 1
        ([-1, -2, -3], -2, 1, "loses"),
        ([0, 2, 4], 2, 2, "open"),  # not more than its spread
        ([-1, 0, 4], 1, math.sqrt(7), "open"),
        ([2, 2, 2], 2, 0, "wins"),
        ([0, 0, 0], 0, 0, "open"),
        ([5], 5, 0, "open"),  # one pair decides nothing
    ],
)
def test_a_win_is_a_mean_difference_larger_than_its_spread(differences, mean, spread, verdict):
    found = standings.paired(
        rows(a=[10 + d for d in differences], b=[10] * len(differences)), "a", "b", column="bn"
    )
    assert found.mean == pytest.approx(mean)
    assert found.spread == pytest.approx(spread)
    assert found.count == len(differences)
    assert found.verdict == verdict


def test_differences_are_paired_by_seed_network_and_budget():
    # unpaired the spread would be 10 times the difference: pairs cancel what seeds share
    mine = rows(a=[11, 21, 31], b=[10, 20, 30])
    mine += [row("a", 0, 41, network="other"), row("b", 0, 40, network="other")]
    mine += [row("a", 7, 99), row("b", 8, 1)]  # no partner
    mine += [row("a", 0, 99, column="refit"), row("b", 0, 99, budget=0.3)]  # another cell
    found = standings.paired(mine, "a", "b", column="bn")
    assert (found.mean, found.spread, found.count) == (1, 0, 4)
    assert standings.paired(mine, "a", "nobody", column="bn") is None


def test_result_files_hold_every_number_exactly(tmp_path):
    third = 1 / 3
    cells = [
        row("a", 0, third, column="cut", recover="bn", macs=7, count=30),
        row("a", 0, 0.1 + 0.2, column="cut", recover="refit", macs=8, count=30),
        row("a", 0, 0.5, column="refit", recover="refit", macs=8, count=30),
        row("a", 1, 0.7, column="cut", recover="none", macs=7, count=30, spearman=-third),
    ]
    kept = {"rows": cells, "train_images": 20, "hardware": "x, 1", "torch": "2", "date": "2026"}
    made = result_rows.flat(kept, data="d", command="python b.py")
    result_rows.write(tmp_path / "a.csv", made)
    found = result_rows.leaderboard(tmp_path / "a.csv")
    bare = [{k: v for k, v in cell.items() if k != "recover"} for cell in cells]
    assert found == {"rows": bare, "hardware": "x, 1", "torch": "2", "date": "2026"}
    assert [r["stage"] for r in made if r["metric"] == "top1"] == [
        "dense", "cut before bn", "cut before refit", "refit", "cut",
    ]  # fmt: skip


def test_two_values_of_one_measurement_are_refused():
    cells = [row("a", 0, top1, recover="bn", macs=7, count=30) for top1 in (0.5, 0.6)]
    kept = {"rows": cells, "train_images": 20, "hardware": "x", "torch": "2", "date": "2026"}
    with pytest.raises(ValueError, match=r"two values of .*0\.5, 0\.6"):
        result_rows.flat(kept, data="d", command="c")


def test_a_failure_is_a_row_without_accuracy(tmp_path):
    cell = {k: v for k, v in row("a", 0, 0.5, recover="bn").items() if k not in ("top1", "dense")}
    kept = {"rows": [cell | {"error": "too small"}], "train_images": None, "hardware": "x",
            "torch": "2", "date": "2026"}  # fmt: skip
    result_rows.write(tmp_path / "a.csv", result_rows.flat(kept, data="d", command="c"))
    (found,) = result_rows.leaderboard(tmp_path / "a.csv")["rows"]
    assert found["failed"] == "too small"
    assert standings.standing([found], "a", column="bn") is None


def test_the_kept_files_follow_the_schema_and_their_readme():
    page = (leaderboard.RESULTS / "README.md").read_text()
    files = sorted(leaderboard.RESULTS.glob("leaderboard-*.csv"))
    assert len(files) == 6
    for file in files:
        head, *lines = file.read_text().splitlines()
        assert tuple(head.split(",")) == result_rows.COLUMNS
        assert lines
    for column in result_rows.COLUMNS:
        assert f"| `{column}` |" in page
    for name in re.findall(r"`([\w-]+\.(?:csv|json))`", page):
        assert (leaderboard.RESULTS / name).is_file(), name


def test_a_cell_that_failed_has_no_accuracy():
    failed = {k: v for k, v in row("a", 0, 0.5).items() if k != "top1"}
    assert standings.standing([failed], "a", column="bn") is None


@pytest.mark.parametrize(
    ("a", "b", "expected"),
    [
        ([1, 2, 3, 4], [10, 100, 1000, 10000], 1),  # any growing function
        ([1, 2, 3, 4], [4, 3, 2, 1], -1),
        ([1, 2, 3, 4, 5], [2, 1, 4, 3, 5], 0.8),  # 1 - 6 * 4 / (5 * 24)
        ([1, 2, 2, 3], [1, 2, 3, 4], 4.5 / math.sqrt(4.5 * 5)),  # a tie has rank 2.5 twice
        ([1, 1, 1], [1, 2, 3], math.nan),
    ],
)
def test_rank_correlation(a, b, expected):
    assert standings.rank_correlation(a, b) == pytest.approx(expected, nan_ok=True)


def test_tables_say_who_wins_and_who_is_first():
    mine = rows(gate_logit=[0.70, 0.72, 0.71], l2=[0.60, 0.62, 0.61], random=[0.72, 0.68, 0.74])
    table = standings.table(mine, network="net", budget=0.5).splitlines()
    assert table[0] == "| criterion | BN recalibrated |"
    assert table[2:] == [
        "| `random` | 71.3 ± 3.1 |",
        "| `gate_logit` | 71.0 ± 1.0 |",
        "| `l2` | 61.0 ± 1.0 |",
    ]
    lines = standings.against(mine, "gate_logit", network="net", budget=0.5).splitlines()
    assert lines[2:] == ["| `l2` | **+10.0 ± 0.0** |", "| `random` | -0.3 ± 3.8 |"]
    lines = standings.against(mine, "l2", network="net", budget=0.5).splitlines()
    assert lines[2] == "| `gate_logit` | -10.0 ± 0.0 (loses) |"


def test_the_criterion_of_a_method_is_set_apart():
    mine = rows(**{"l2, least 2": [0.5, 0.5], "gate_logit coupled cost_aware": [0.6, 0.6]})
    text = standings.table(mine, network="net", budget=0.5)
    assert "| `l2`, least 2 | 50.0 ± 0.0 |" in text
    assert "| `gate_logit` coupled cost_aware | 60.0 ± 0.0 |" in text


def test_duels_are_with_the_best_rival():
    mine = rows(a=[0.70, 0.72, 0.71], b=[0.60, 0.62, 0.61], c=[0.72, 0.74, 0.73], d=[1, 1, 1])
    mine += [row("a", s, 0.5, network="other", budget=0.3) for s in range(2)]  # no rival there
    lines = standings.duels(mine, "a", ("b", "c")).splitlines()
    assert lines == [
        "| network, MACs | BN recalibrated |",
        "|---|---|",
        "| net at 0.5 | 71.0: -2.0 ± 0.0 (loses) over `c` |",
        "| other at 0.3 |  |",
    ]


def test_the_figure_holds_every_method_and_every_mean():
    mine = rows(gate_logit=[0.70, 0.72, 0.71], l2=[0.60, 0.62, 0.61])
    root = ET.fromstring(standings.figure(mine, network="net", budget=0.5))
    texts = [t.text for t in root.iter("{http://www.w3.org/2000/svg}text")]
    assert {"gate_logit", "l2"} <= set(texts)
    dots = [float(c.get("cx")) for c in root.iter("{http://www.w3.org/2000/svg}circle")][1:]
    # from 60 % at 225 to 90 %, the dense network, at 645
    assert dots == pytest.approx([225 + 420 * 11 / 30, 225 + 420 / 30], abs=0.06)


def test_stability_is_against_the_most_images_of_the_other_seeds():
    scores = {
        ("a", 10, 0): [1, 2, 3, 4],
        ("a", 90, 0): [4, 3, 2, 1],  # its own: does not count
        ("a", 10, 1): [1, 2, 3, 4],
        ("a", 90, 1): [1, 2, 3, 4],
        ("a", 90, 2): [2, 1, 4, 3],  # 1 - 6 * 4 / (4 * 15) = 0.6
        ("a", 10, 2): [1, 2, 3, 4],
    }
    (found,) = leaderboard.with_stability([row("a", 0, 0.5, images=10)], scores)
    assert found["spearman"] == pytest.approx((1 + 0.6) / 2)
    text = standings.sizes([found, row("a", 0, 0.6, images=90, spearman=0.5)]).splitlines()
    assert text[2:] == ["| 10 | 0.800, 50.0 (1 seed) |", "| 90 | 0.500, 60.0 (1 seed) |"]


def test_every_criterion_has_a_row():
    assert set(CRITERIA) <= set(grids.METHODS)


@pytest.mark.parametrize("name", list(grids.GRIDS))
def test_every_cell_is_a_recipe(name):
    grid = grids.GRIDS[name]
    found = list(grids.cells(grid))
    assert len({cell.name for cell in found}) == len(found)
    present = {path.stem for path in recipe_folder().glob("*.yaml")}
    methods, ways = set(), set()
    for cell in found:
        way = (cell.network, cell.recover, cell.tuning)
        if cell.method in methods and way in ways:
            continue
        methods.add(cell.method)
        ways.add(way)
        assert grids.NETWORKS[cell.network] in present
        recipe = cell.recipe(Path("images"), Path("weights.pth"))
        assert recipe.importance.criterion in CRITERIA
        assert recipe.plan.macs == grid.budgets
        assert (recipe.seed, recipe.collect.images) == (cell.seed, cell.images)
        assert recipe.prune.recover == cell.recover
        assert recipe.finetune.epochs == grid.epochs[cell.tuning]
    assert methods == set(grid.methods)


def test_images_that_choose_are_none_of_those_that_report(tmp_path):
    for part, count in (("train", 2), ("val", 5)):
        for name in ("cat", "dog"):
            (tmp_path / "all" / part / name).mkdir(parents=True)
            for i in range(count):
                (tmp_path / "all" / part / name / f"{i}.jpg").touch()
    report = replace(grids.GRIDS["cpu"], train=2, val=6, skip=0)
    choose = replace(report, val=4, skip=6)
    found = [leaderboard.part_of(tmp_path / "all", tmp_path, g) / "val" for g in (report, choose)]
    names = [{p.relative_to(f) for p in f.glob("*/*")} for f in found]
    assert [len(n) for n in names] == [6, 4]
    assert not names[0] & names[1]
    cpu, choice = grids.GRIDS["cpu"], grids.GRIDS["choice"]
    assert choice.skip >= cpu.skip + cpu.val


def test_a_method_differs_from_another_by_its_scores_and_allocation_alone():
    grid = grids.GRIDS["full"]
    dumps = []
    for method in grid.methods:
        cell = grids.Cell(grid, "se_resnet20", method, 0, "refit", "short", 2048)
        full = cell.recipe(Path("images"), None).model_dump()
        for own in ("name", "importance", "plan"):
            full.pop(own)
        dumps.append(full)
    assert all(d == dumps[0] for d in dumps)


def test_the_shipped_recipes_of_the_networks_hold():
    for name in ("cifar10-mobilenetv3", "cifar10-regnety"):
        assert load_recipe(name).train is not None


@pytest.mark.slow
def test_a_grid_is_carried_out_and_read_again(tmp_path, monkeypatch):
    """Two tiny cells on digits: runs, rows, and the second time nothing is done."""
    monkeypatch.setitem(grids.NETWORKS, "tiny", "quickstart")
    small = (
        "model.name=seprune/se_resnet8", "train.epochs=1", "train.warmup_epochs=0",
        "finetune.recalibrate=64", "plan.min_channels=2", "device=cpu", *grids.QUIET,
    )  # fmt: skip
    grid = grids.Grid(
        "tiny", ("tiny",), ("l2", "uniform"), (0.5, 0.001), (("bn", "short", 0, 1),),
        {"short": 1}, small, seeds=(0,), calibration=(64,),
    )  # fmt: skip
    (cell,) = grids.cells(grid)
    found = leaderboard.carry_out(cell, tmp_path, Path("digits"), None)
    assert [(r["budget"], r["column"]) for r in found] == [
        (0.5, "cut"), (0.5, "bn"), (0.5, "bn short"), (0.001, "cut"),
    ]  # fmt: skip
    assert {r.get("count") for r in found} == {359, None}
    assert "the budget cannot be met" in found[3]["error"]  # and the other one is not lost
    written = {p: p.read_bytes() for p in tmp_path.rglob("journal.jsonl")}
    assert leaderboard.carry_out(cell, tmp_path, Path("digits"), None) == found
    assert {p: p.read_bytes() for p in tmp_path.rglob("journal.jsonl")} == written
