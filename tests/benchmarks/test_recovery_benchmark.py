"""Rows of the recovery benchmark: every number of a cell, and no mixing of settings."""

from __future__ import annotations

from pathlib import Path

import pytest
import readme
import recovery
import result_rows

CELL = {
    "seed": 2, "macs": 0.3, "variant": "bn", "validation_at_start": 1 / 3,
    "validation": [0.1, 0.1 + 0.2], "last": 0.25, "chosen": 2 / 3, "seconds": 1.5,
}  # fmt: skip
COMMON = {
    "network": "seprune/n", "data": "d: 3 train", "hardware": "x, 1 thread",
    "versions": "torch 2", "date": "2026-11-30", "command": "python b.py --lr 1",
}  # fmt: skip


@pytest.fixture
def file(tmp_path: Path) -> Path:
    dense = COMMON | {"stage": "dense", "metric": "top1", "value": 0.87}
    second = CELL | {"seed": 3, "chosen": 0.6}
    rows = [dense, *recovery.flat(CELL, COMMON), *recovery.flat(second, COMMON)]
    result_rows.write(tmp_path / "r.csv", rows)
    return tmp_path / "r.csv"


def test_a_cell_is_read_again_as_it_was(file: Path) -> None:
    rows = recovery.kept(file, COMMON["command"])
    own = [r for r in rows if r["seed"] == "2"]
    assert {(r["budget"], r["method"]) for r in own} == {("0.3", "bn")}
    assert [(r["stage"], r["metric"], float(r["value"])) for r in own] == [
        ("untrained", "validation_top1", 1 / 3), ("epoch 1", "validation_top1", 0.1),
        ("epoch 2", "validation_top1", 0.1 + 0.2), ("last", "top1", 0.25),
        ("chosen", "top1", 2 / 3), ("chosen", "seconds", 1.5),
    ]  # fmt: skip


def test_the_table_is_of_the_rows(file: Path) -> None:
    text = readme.recovery({"rows": recovery.kept(file, COMMON["command"])})
    # the sample deviation of 2/3 and 0.6 is their difference by the root of 2
    assert "| + BN recalibration | 33.33 ± 0.00 (2) | 25.00 ± 0.00 (2) | 63.33 ± 4.71 (2) |" in text
    assert "parent 87.00 %" in text


def test_results_of_other_settings_are_refused(file: Path) -> None:
    with pytest.raises(SystemExit, match=r"holds results of python b\.py --lr 1: choose another"):
        recovery.kept(file, "python b.py --lr 2")
    assert recovery.kept(file.with_name("none.csv"), "any") == []
