"""What a reader looks at first: tiles, the drawing, training curves, runs told apart."""

import dataclasses
import html as entities
import json
import re
from pathlib import Path

import pytest
from reports import make_report, unfinished_report

import seprune.report
from seprune.errors import InputError
from seprune.report import BudgetReport, Measurement, measurement, summary, training, ways
from seprune.report.compare import compare
from seprune.report.drawing import network
from seprune.report.figures import accuracy
from seprune.report.figures import comparison as comparison_figure
from seprune.report.html import write_html

CSS = (Path(seprune.report.__file__).parent / "page.css").read_text()


# Tiles


def test_a_tile_has_speed_accuracy_and_size_before_and_after() -> None:
    report = make_report(budgets=(0.5,))
    base, end = report.measurements[0], report.measurements[-1]
    made = summary.tile(report, report.budgets[0])
    assert made["label"] == "fine-tuned · macs 0.5"
    before, after = (m.latency[0].median_ms for m in (base, end))
    assert [fact[:3] for fact in made["facts"]] == [
        (
            f"{before / after:.2f}x",
            "as fast",
            f"{before:.3g} → {after:.3g} ms in eager, batch 1, 2 threads",
        ),
        (
            f"{100 * end.value:.2f} %",
            "top-1",
            f"87.35 % before, −{100 * (base.value - end.value):.2f} points",
        ),
        (f"{100 * end.macs / base.macs:.1f} %", "of the MACs", "40.8 M → 20.2 M"),
        (f"{100 * end.params / base.params:.1f} %", "of the parameters", "274 k → 136 k"),
    ]
    assert made["facts"][0][3] == "good"


def test_the_speed_in_a_tile_is_that_of_the_runtime_asked_for() -> None:
    report = dataclasses.replace(make_report(budgets=(0.5,)), runtime="onnxruntime")
    assert summary.tile(report, report.budgets[0])["facts"][0][2].startswith("3.06 → ")
    untimed = [dataclasses.replace(m, latency=[]) for m in report.measurements]
    plain = dataclasses.replace(report, measurements=untimed)
    assert [fact[1] for fact in summary.tile(plain, plain.budgets[0])["facts"]] == [
        "top-1",
        "of the MACs",
        "of the parameters",
    ]


def test_an_unmeasured_budget_has_the_macs_of_its_plan() -> None:
    report = dataclasses.replace(make_report(budgets=(0.5,)), measurements=[])
    facts = summary.tile(report, report.budgets[0])["facts"]
    assert facts == [("49.6 %", "of the MACs", "", "")]


# The drawing


def test_the_drawing_is_as_wide_as_every_group_was_and_is() -> None:
    budget = make_report(budgets=(0.5,)).budgets[0]
    before, after = network(budget)["data"]
    assert before["y"] == [g.before for g in budget.groups]
    assert after["y"] == [g.after for g in budget.groups]
    assert after["base"] == [-g.after / 2 for g in budget.groups]
    assert after["customdata"] == [[g.name, g.before, g.after] for g in budget.groups]
    colours = dict(zip((g.name for g in budget.groups), after["marker"]["color"], strict=True))
    assert (colours["layer1.residual"], colours["fc"]) == ("@blue", "@ink")
    axis = network(budget)["layout"]["xaxis"]
    assert axis["ticktext"] == ["layer1", "layer2", "layer3", "fc"]
    assert [budget.groups[n].name.split(".")[0] for n in axis["tickvals"]] == axis["ticktext"]


# Training


def test_epochs_are_read_from_the_metrics_of_a_training(tmp_path) -> None:
    rows = [
        {"epoch": 0, "step": 9, "loss": 2.5, "lr": 0.1, "validation_loss": 2.4, "top1": 0.25},
        {"epoch": 1, "step": 18, "loss": None, "lr": 0.05, "validation_loss": None},
    ]
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = training.read_training(path, stage="baseline", budget=None, metric="top1")
    assert found == measurement.TrainingCurve(
        "baseline",
        None,
        "top1",
        [
            measurement.TrainedEpoch(1, 2.5, 2.4, 0.25, 0.1),
            measurement.TrainedEpoch(2, None, None, None, 0.05),
        ],
    )
    path.write_text('{"loss": "low"}\n')
    with pytest.raises(InputError, match=r"metrics.jsonl:1: .*expected float"):
        training.read_training(path, stage="baseline", budget=None, metric="top1")


def test_the_curves_and_their_table_hold_the_numbers_of_the_report(tmp_path) -> None:
    report = make_report(budgets=(0.5,))
    report.budgets[0] = dataclasses.replace(report.budgets[0], tuning={"best_epoch": 6})
    dense, tuned = report.training
    lines = {trace["name"]: trace for trace in training.loss(report)["data"]}
    for found, name in ((dense, "baseline"), (tuned, "fine-tuned · macs 0.5")):
        for part, key in (("training images", "loss"), ("validation split", "validation_loss")):
            values = [getattr(e, key) for e in found.epochs]
            assert lines[f"{name}, {part}"]["y"] == pytest.approx(values, rel=1e-3)
            assert lines[f"{name}, {part}"]["x"] == list(range(1, len(values) + 1))
    first, second = training.metric(report)["data"]
    assert first["y"] == pytest.approx([100 * e.value for e in dense.epochs], rel=1e-3)
    assert "star" not in first["marker"]["symbol"]
    assert second["marker"]["symbol"].index("star") == 6
    table = training.table(report)
    assert len(table) == 1 + 30 + 10
    last = tuned.epochs[-1]
    assert table[-1] == [
        "fine-tuned · macs 0.5",
        "10",
        f"{last.loss:.4g}",
        f"{last.validation_loss:.4g}",
        f"{100 * last.value:.2f} %",
        f"{last.lr:.2g}",
    ]
    write_html(make_report(budgets=(0.5,)), tmp_path / "page.html")
    page = entities.unescape((tmp_path / "page.html").read_text())
    rows = re.findall(r"<tr>(.*?)</tr>", page)
    cells = [re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", row) for row in rows]
    assert all(row in cells for row in table)


# Runs told apart


RECIPE = """name: a
seed: {seed}
model:
  name: seprune/se_resnet20
  args:
    width: 2
train:
  epochs: 30
plan:
  macs: [{macs}]
finetune:
  epochs: {epochs}
report:
  html: {html}
"""


def one(top1: float, *, name: str = "a", **recipe) -> measurement.Report:
    given = {"seed": 0, "macs": 0.5, "epochs": 10, "html": "true"} | recipe
    label, macs = f"macs {given['macs']:g}", int(100 * given["macs"])

    def measured(stage: str, value: float) -> Measurement:
        return Measurement(stage, label, {"top1": value}, None, 100, 0, macs, macs)

    return dataclasses.replace(
        unfinished_report(),
        name=name,
        seed=given["seed"],
        recipe=RECIPE.format(**given),
        budgets=[BudgetReport(label, given["macs"], given["macs"], "l2", "cost_aware")],
        measurements=[
            Measurement("baseline", None, {"top1": 0.9}, None, 100, 0, 100, 100),
            measured("pruned", 0.1),
            measured("fine-tuned", top1),
        ],
    )


def tuned(*reports, names=()):
    rows = compare(reports, names).rows
    return [(r.label, r.value, r.seeds, r.names) for r in rows if r.stage == "fine-tuned"]


def test_the_keys_of_a_recipe_are_read_as_they_are_nested() -> None:
    found = ways.values(RECIPE.format(seed=1, macs=0.5, epochs=10, html="true"))
    assert found == {
        "name": "a",
        "seed": "1",
        "model.name": "seprune/se_resnet20",
        "model.args.width": "2",
        "train.epochs": "30",
        "plan.macs": "[0.5]",
        "finetune.epochs": "10",
        "report.html": "true",
    }


def test_two_copies_of_one_run_are_two_rows_with_names_of_their_own() -> None:
    copies = [one(0.8), one(0.8)]
    names = ways.run_names(copies, [Path("runs/first"), Path("runs/second")])
    assert names == ["a (first)", "a (second)"]
    assert tuned(*copies, names=names) == [
        ("l2 · a (first)", pytest.approx(0.8), [0], ["a (first)"]),
        ("l2 · a (second)", pytest.approx(0.8), [0], ["a (second)"]),
    ]
    assert [row[0] for row in tuned(*copies)] == ["l2 · a #1", "l2 · a #2"]
    rows = compare(copies, names).rows
    assert [r.names for r in rows if r.stage == "baseline"] == [names]


def test_seeds_of_one_recipe_are_one_row_and_other_recipes_are_not() -> None:
    reports = [
        *(one(top, seed=seed) for seed, top in enumerate((0.80, 0.82, 0.84))),
        one(0.9, epochs=20, html="false"),
    ]
    rows = [r for r in compare(reports).rows if r.stage == "fine-tuned"]
    assert [(r.label, r.seeds, r.runs) for r in rows] == [
        ("l2 · finetune.epochs=10", [0, 1, 2], 3),
        ("l2 · finetune.epochs=20", [0], 1),
    ]
    assert rows[0].value == pytest.approx(0.82)
    assert rows[0].spread == pytest.approx(0.02)
    assert rows[1].spread is None
    figure = comparison_figure(compare(reports))
    bars = {t["name"]: t.get("error_y") for t in figure["data"]}
    assert bars["l2 · finetune.epochs=10 · fine-tuned"]["array"] == [pytest.approx(2)]


def test_only_what_is_reported_differs_then_it_is_the_same_recipe() -> None:
    assert len(tuned(one(0.8), one(0.9, seed=1, html="false"))) == 1


def test_budgets_of_one_recipe_are_one_line() -> None:
    found = compare([one(0.8), one(0.7, macs=0.25)])
    line = found.series()["l2", "fine-tuned"]
    assert [(r.macs, r.value) for r in line] == [(25, 0.7), (50, 0.8)]


def test_runs_in_folders_called_alike_are_named_by_their_paths() -> None:
    copies = [one(0.8), one(0.8)]
    assert ways.run_names(copies, [Path("x/run"), Path("y/run")]) == ["a (x/run)", "a (y/run)"]
    assert ways.run_names(copies, [Path("x"), Path("x")]) == ["a (x) #1", "a (x) #2"]


def test_networks_before_their_recovery_do_not_stretch_the_axis() -> None:
    hidden = {t["name"]: t.get("visible") for t in comparison_figure(compare([one(0.8)]))["data"]}
    assert hidden == {
        "Pareto front": None,
        "baseline": None,
        "l2 · fine-tuned": None,
        "l2 · pruned": False,
    }
    own = {t["name"]: t.get("visible") for t in accuracy(one(0.8))["data"]}
    assert own == {"baseline": None, "pruned": False, "fine-tuned": None}
    left = dataclasses.replace(one(0.8), measurements=one(0.8).measurements[:2])
    assert [t.get("visible") for t in accuracy(left)["data"]] == [None, None]
    shown = comparison_figure(compare([left]))["data"]
    assert all("visible" not in trace for trace in shown)


# Contrast


def theme(selector: str) -> dict[str, str]:
    block = CSS.partition(f"{selector} {{")[2].partition("}")[0]
    return dict(re.findall(r"--([\w-]+): (#[0-9a-f]{6});", block))


def luminance(colour: str) -> float:
    """Relative luminance as in WCAG 2.1."""
    parts = [int(colour[n : n + 2], 16) / 255 for n in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


@pytest.mark.parametrize("selector", [":root", ':root[data-theme="dark"]'])
@pytest.mark.parametrize("behind", ["card", "paper", "warn"])
def test_text_stands_out_from_what_is_behind_it(selector: str, behind: str) -> None:
    colours = theme(selector)
    texts = ("ink", "muted", "blue", "good", "bad") if behind == "card" else ("ink", "muted")
    for text in texts:
        light, dark = sorted((luminance(colours[text]), luminance(colours[behind])), reverse=True)
        assert (light + 0.05) / (dark + 0.05) >= 4.5, (text, behind)


def test_times_that_vary_by_more_than_themselves_make_no_headline():
    report = make_report(budgets=(0.5,))
    assert "x as fast" in summary.headline(report)
    *others, end = report.measurements
    busy = [dataclasses.replace(x, spread_ms=1.1 * (x.median_ms or 1)) for x in end.latency]
    noisy = dataclasses.replace(
        report, measurements=[*others, dataclasses.replace(end, latency=busy)]
    )
    assert summary.headline(noisy) == ""
    assert not any(
        "as fast" in what for _, what, *_ in summary.tile(noisy, noisy.budgets[0])["facts"]
    )
