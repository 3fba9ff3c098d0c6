"""The scaling benchmark: its fits in closed form, its page from its CSV, and what was measured."""

from __future__ import annotations

from pathlib import Path

import csv_rows
import pytest
import scaling

PAGE = Path(__file__).parents[2] / "docs" / "costs.md"


@pytest.mark.parametrize("power", [0.0, 1.0, 1.5])
def test_the_exponent_of_a_power_law_is_its_power(power):
    assert scaling.exponent([(x, 3 * x**power) for x in (1, 2, 5, 40)]) == pytest.approx(power)


def test_a_point_measures_every_step_beside_a_forward():
    point = scaling.Point("images", 8.0, images=8, batch=4, pixels=16)
    rows = scaling.measure(point, 0.5)
    assert [row["step"] for row in rows] == list(scaling.STEPS)
    assert all(tuple(row[k] for k in scaling.KEYS) == point.key() for row in rows)
    peaks = [int(row["peak_mb"]) for row in rows]
    assert peaks == sorted(peaks)
    assert float(rows[0]["cpu_seconds"]) > 0


def test_every_point_was_measured_and_the_page_is_made_from_them():
    rows = csv_rows.read(scaling.RESULTS)
    measured = {tuple(row[k] for k in scaling.KEYS) for row in rows}
    assert {point.key() for point in scaling.POINTS} <= measured
    assert PAGE.read_text() == scaling.render(rows)


@pytest.mark.parametrize(
    ("series", "value", "forwards"),
    [("images", "1024", 4), ("images", "2048", 4), ("ImageNet", "50", 4)],
)
def test_a_refit_costs_at_most_so_many_forwards(series, value, forwards):
    """What was measured last; whoever measures again and finds more has found a regression."""
    own = [
        r for r in csv_rows.read(scaling.RESULTS) if (r["series"], r["value"]) == (series, value)
    ]
    (refit,) = [r for r in own if r["step"] == "refit"]
    assert float(refit["forwards"]) <= forwards


@pytest.mark.parametrize(("value", "gigabytes"), [("50", 4), ("7", 8)])
def test_a_memory_budget_bounds_the_whole_process(value, gigabytes):
    rows = [r for r in csv_rows.read(scaling.RESULTS) if r["series"] == "memory"]
    peaks = [int(r["peak_mb"]) for r in rows if r["value"] == value]
    assert len(peaks) == len(scaling.STEPS)
    assert max(peaks) * 2**20 < gigabytes * 1e9


def test_depth_and_images_cost_no_more_than_their_share():
    """Twice the layers or the images may not cost more than 2^1.1 times as much."""
    rows = csv_rows.read(scaling.RESULTS)
    for series in ("depth", "images"):
        for step in ("analyse", "collect", "cut", "refit"):  # a plan takes a fraction of a second
            own = [r for r in rows if (r["series"], r["step"]) == (series, step)]
            pairs = [(float(r["value"]), float(r["cpu_seconds"])) for r in own]
            assert scaling.exponent(pairs) <= 1.1, (series, step)
