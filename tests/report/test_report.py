"""Reports: exact JSON, CSV, terminal tables, comparisons, model cards, and the page's content."""

import csv
import dataclasses
import html as entities
import io
import json
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image
from reports import SE_RESNET_50, make_report, unfinished_report
from rich.console import Console

from seprune.errors import InputError, UsageError
from seprune.measure.latency import Latency
from seprune.report import (
    BudgetReport,
    ClassExamples,
    GateSummary,
    GroupCut,
    Measurement,
    measurement,
    summary,
    ways,
    words,
)
from seprune.report import html as page
from seprune.report.artefacts import (
    ArtefactReport,
    artefact_images,
    keep_artefacts,
    read_artefacts,
)
from seprune.report.card import model_card
from seprune.report.compare import compare
from seprune.report.compare import write_csv as write_comparison_csv
from seprune.report.figures import LATENCY, accuracy
from seprune.report.figures import comparison as comparison_figure
from seprune.report.gate_figures import SHOWN_CHANNELS, excitation, kept, stage_ends
from seprune.report.html import write_comparison, write_html
from seprune.report.picture import accuracy_picture
from seprune.report.table import ranks, write_csv
from seprune.report.terminal import show


def document() -> dict:
    return json.loads(json.dumps(measurement.to_json(make_report())))


def measured(top1: float, macs: int, *, stage: str = "fine-tuned") -> Measurement:
    budget = None if stage == "baseline" else "macs 0.5"
    return Measurement(stage, budget, {"top1": top1}, None, 100, 0, macs, macs // 10)


# JSON


def test_json_keeps_every_number_exactly(tmp_path) -> None:
    report = make_report()
    measurement.write(report, tmp_path / "report.json")
    assert measurement.read(tmp_path) == report
    assert measurement.read(tmp_path / "report.json") == report


def test_json_has_no_nan_literals(tmp_path) -> None:
    worn = dataclasses.replace(measured(0.5, 10), loss=float("nan"))
    report = dataclasses.replace(make_report(), measurements=[worn])
    measurement.write(report, tmp_path / "report.json")
    json.loads((tmp_path / "report.json").read_text(), parse_constant=pytest.fail)
    assert measurement.read(tmp_path).measurements[0].loss is None


def test_a_report_of_a_newer_version_says_what_to_type() -> None:
    with pytest.raises(InputError) as caught:
        measurement.from_json({"format": 99}, source="run/report.json")
    assert caught.value.what == "run/report.json: report format 99, this seprune reads up to 1"
    assert caught.value.fix == "pip install --upgrade seprune"


@pytest.mark.parametrize("other", [[], {}, {"format": "1"}, None, "text"])
def test_another_document_is_no_report(other) -> None:
    with pytest.raises(InputError, match="not a report of seprune"):
        measurement.from_json(other)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda d: d.pop("seed"), "the document: object missing required field seed"),
        (lambda d: d.update(seed="0"), "seed: expected int, got str"),
        (lambda d: d.update(seed=True), "seed: expected int, got bool"),
        (lambda d: d.update(gates={}), "gates: expected array, got object"),
        (
            lambda d: d["measurements"][1]["metrics"].update(top1="high"),
            "measurements[1].metrics[...]: expected float | null, got str",
        ),
        (
            lambda d: d["measurements"][0].update(stage="tuned"),
            "measurements[0]: stage 'tuned' is none of baseline, pruned, recalibrated, "
            "refitted, reconstructed, drawn anew, last epoch, fine-tuned",
        ),
        (
            lambda d: d["budgets"][0]["groups"][0]["keep"].append(16),
            "budgets[0].groups[0]: layer1.residual: keeps a unit outside of 0..15",
        ),
        (
            lambda d: d["budgets"][0]["groups"][0]["scores"].pop(),
            "budgets[0].groups[0]: layer1.residual: 15 scores for 16 units",
        ),
        (
            lambda d: d["gates"][2]["statistics"]["mean"].pop(),
            "gates[2]: layer1.2.se: 15 values for 16 channels",
        ),
    ],
)
def test_a_damaged_report_names_the_place(damage, message: str) -> None:
    damaged = document()
    damage(damaged)
    with pytest.raises(InputError) as caught:
        measurement.from_json(damaged, source="report.json")
    assert caught.value.what == f"report.json: {message}"
    assert caught.value.fix


def test_unknown_keys_of_a_later_minor_version_are_passed_over() -> None:
    assert measurement.from_json(document() | {"weather": "fair"}) == make_report()


def test_reading_and_printing_a_report_needs_no_torch() -> None:
    modules = "measurement table compare card terminal html"
    line = "; ".join(f"import seprune.report.{name}" for name in modules.split())
    code = f"{line}; import sys; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


# Gates


def test_a_gate_summary_is_made_from_tensors() -> None:
    gate = SimpleNamespace(
        name="se", channels=2, squeeze="mean", activation="sigmoid", placement="inner", runs=True
    )
    gate.scales = ("conv",)
    values = {
        "mean": np.array([0.5, np.nan]),
        "low": np.array([0.25, 0.0]),
        "high": np.array([0.25, 0.5]),
        "class_count": np.array([5, 7]),
        "class_mean": np.array([[0.1, 0.2], [0.3, 0.4]]),
        "rank_agreement": np.array(0.75),
    }
    summary = GateSummary.of(gate, values, groups=("g",), classes=(0, 1, 2))
    average = summary.statistics.pop("class_average")
    assert average == [pytest.approx(0.2), pytest.approx(0.3)]
    assert summary.statistics == {"mean": [0.5, None], "low": [0.25, 0.0], "high": [0.25, 0.5]}
    assert summary.class_mean == [[0.1, 0.2], [0.3, 0.4]]
    assert (summary.saturated, summary.rank_agreement) == (0.5, 0.75)
    values["class_count"] = np.array([5, 0])
    assert GateSummary.of(gate, values).statistics["class_average"] == [0.1, 0.2]
    gate.activation = "relu"
    assert GateSummary.of(gate, values).saturated is None


def gate(name: str = "se", **facts) -> GateSummary:
    return GateSummary(name, 4, "mean", "sigmoid", "inner", **facts)


def test_gates_speak_in_words() -> None:
    remarks = words.gate_remarks(
        [gate("a", saturated=0.83), gate("b", rank_agreement=0.31), gate("c", runs=False)]
    )
    assert remarks == [
        "Saturated, most values below 0.05 or above 0.95: a (83 %). As a switch such a gate "
        "hardly tells channels apart; prefer a criterion that uses gradients.",
        "The order of channels changes from image to image (rank agreement below 0.5): b (0.31). "
        "No fixed choice of channels serves all images.",
        "No statistics, for they never ran in the forward pass: c.",
    ]
    many = words.gate_remarks([gate(f"g{n}", runs=False) for n in range(12)])
    assert many[0].endswith("forward pass: g0, g1, g2, g3, g4, g5, 5 more, and g11.")
    assert words.gate_remarks([gate(rank_agreement=0.8), gate(rank_agreement=0.91)]) == [
        "No gate is saturated, and images agree on the order of channels "
        "(rank agreement 0.80 to 0.91)."
    ]


def test_stage_ends_are_the_last_gates_before_the_width_changes() -> None:
    assert [g.name for g in stage_ends(make_report(SE_RESNET_50).gates)] == [
        "layer1.2.se",
        "layer2.3.se",
        "layer3.5.se",
        "layer4.2.se",
    ]


def test_class_curves_stay_small_and_name_their_channels() -> None:
    last = make_report(SE_RESNET_50).gates[-1]
    figure = excitation(last, ["cat <b>", "dog"])
    mean = figure["data"][-1]
    assert len(mean["x"]) == SHOWN_CHANNELS
    assert mean["y"] == sorted(mean["y"])
    assert mean["y"] == [round(last.statistics["mean"][c], 4) for c in mean["customdata"]]
    names = [trace.get("name") for trace in figure["data"]]
    assert names[2:5] == ["cat &lt;b&gt;", "dog", "class 2"]
    assert sum(trace.get("visible") is True for trace in figure["data"]) == 3


def test_kept_channels_stand_under_their_gate() -> None:
    cut = GroupCut("g", 4, 2, keep=[0, 3], scores=[4.0, 1.0, 2.0, 3.0])
    budget = BudgetReport("macs 0.5", 0.5, 0.49, "gate_mean", "global", groups=[cut])
    summary = gate(groups=["g"], statistics={"mean": [0.9, 0.1, 0.2, 0.4]})
    trace = kept(summary, budget)["data"][0]
    assert trace["customdata"] == [[1, 2, 3, 0]]
    assert trace["z"] == [[0, 0, 1, 1]]
    assert kept(gate(groups=["other"]), budget) == {"data": []}


# CSV


def test_csv_has_one_row_a_channel(tmp_path) -> None:
    report = make_report(budgets=(0.5,))
    write_csv(report, tmp_path / "report.csv")
    rows = list(csv.DictReader((tmp_path / "report.csv").open(newline="")))
    budget = report.budgets[0]
    assert len(rows) == sum(g.before for g in budget.groups)
    cut = next(g for g in budget.groups if g.name == "layer1.0.conv1")
    own = [row for row in rows if row["group"] == cut.name]
    assert [float(row["score"]) for row in own] == cut.scores
    assert [int(row["channel"]) for row in own if row["kept"] == "True"] == cut.keep
    assert own[int(np.argmax(cut.scores))]["rank"] == "1"
    assert own[0]["gate_mean"] == ""


def test_csv_averages_the_gates_that_share_a_group(tmp_path) -> None:
    report = make_report(budgets=(0.5,))
    write_csv(report, tmp_path / "report.csv")
    row = next(csv.DictReader((tmp_path / "report.csv").open(newline="")))
    assert row["gate"] == "layer1.0.se layer1.1.se layer1.2.se"
    means = [g.statistics["mean"][0] for g in report.gates[:3]]
    assert float(row["gate_mean"]) == pytest.approx(sum(means) / 3)


def test_csv_before_any_cut_lists_the_gates(tmp_path) -> None:
    write_csv(dataclasses.replace(make_report(), budgets=[]), tmp_path / "report.csv")
    rows = list(csv.DictReader((tmp_path / "report.csv").open(newline="")))
    assert len(rows) == 3 * (16 + 32 + 64)
    assert rows[0]["kept"] == ""


def test_csv_is_read_by_pandas_as_it_is(tmp_path) -> None:
    pandas = pytest.importorskip("pandas")
    write_csv(make_report(), tmp_path / "report.csv")
    frame = pandas.read_csv(tmp_path / "report.csv")
    assert frame["kept"].dtype == bool
    assert frame["score"].dtype == frame["gate_mean"].dtype == float


def test_ranks_start_at_the_highest_score() -> None:
    assert ranks(GroupCut("g", 4, 4, scores=[0.1, 0.3, None, 0.3])) == [3, 1, None, 2]


# Terminal


def printed(report, **choice) -> str:
    stream = io.StringIO()
    show(report, Console(width=80, file=stream, color_system=None), **choice)
    return stream.getvalue()


@pytest.mark.parametrize("choice", [{}, {"group": "layer1.residual"}, {"gate": "layer3.2.se"}])
def test_the_terminal_report_fits_80_columns(choice) -> None:
    text = printed(make_report(), **choice)
    assert max(map(len, text.splitlines())) <= 80
    assert "…" not in text


def test_the_final_table_holds_the_numbers() -> None:
    text = printed(make_report())
    lines: dict[str, list[str]] = {}
    for line in text.splitlines():
        lines.setdefault(line.split("  ")[0], line.split())
    assert " ".join(lines["baseline"]) == "baseline 87.35 % 40.8 M 100 % 274 k 1.12 MB 5.1"
    tuned = " ".join(lines["fine-tuned · macs 0.5"])
    assert tuned.endswith("86.66 % 20.2 M 50 % 136 k 565 kB 3.35 (1.5x)")
    assert "latency: median ms at batch 1 on AMD EPYC 9V74, 2 threads" in text


def test_every_runtime_and_batch_size_has_its_latency() -> None:
    text = printed(make_report()).partition("Latency in ms on AMD EPYC 9V74, 2 threads")[2]
    lines = [line.split() for line in text.splitlines()]
    assert ["network", "runtime", "batch", "1", "batch", "64"] in lines
    assert ["baseline", "eager", "5.1", "80.2"] in lines
    assert ["onnxruntime", "3.06", "48.1"] in lines
    slow = 0.496**0.6
    cells = [f"{5.1 * slow:.3g}", f"({1 / slow:.1f}x)", f"{80.2 * slow:.3g}", f"({1 / slow:.1f}x)"]
    assert ["fine-tuned", "·", "macs", "0.5", "eager", *cells] in lines


def test_the_first_line_is_the_speed_on_the_runtime_asked_for() -> None:
    report = make_report()
    on_onnx = dataclasses.replace(report, runtime="onnxruntime")
    speeds = {t: 1 / (t - 0.004) ** 0.6 for t in (0.7, 0.5, 0.3)}
    texts = ", ".join(f"{speed:.2f}x as fast (macs {t})" for t, speed in speeds.items())
    for made, runtime in ((report, "eager"), (on_onnx, "onnxruntime")):
        line = f"{texts} in {runtime}, batch 1, 2 threads"
        assert summary.headline(made) == line
        shown = " ".join(printed(made).split())
        assert shown.startswith(line)
    untimed = [dataclasses.replace(m, latency=[]) for m in report.measurements]
    assert summary.headline(dataclasses.replace(report, measurements=untimed)) == ""


def test_other_runs_stand_in_the_accuracy_figure() -> None:
    one, two = make_report(), make_report(criterion="l2", budgets=(0.6,))
    alone, both = accuracy(one)["data"], accuracy(one, [two])["data"]
    assert both[: len(alone)] == alone
    assert [t["name"] for t in both[len(alone) :]] == [
        f"se_resnet-l2-s0 · {stage}"
        for stage in ("baseline", "pruned", "recalibrated", "fine-tuned")
    ]
    assert len({t["marker"]["color"] for t in both[len(alone) :]}) == 1
    whole, dense = (r.measurements[0].macs for r in (two, one))
    assert both[-1]["x"] == [pytest.approx(59.6, abs=0.1)]
    assert both[len(alone)]["x"] == [100 * whole / dense]


def test_the_channels_of_a_group_say_what_happened_to_them() -> None:
    report = make_report(budgets=(0.5,))
    cut = report.budgets[0].groups[0]
    text = printed(report, group=cut.name)
    assert f"{cut.name}, macs 0.5: {cut.after} of {cut.before} kept" in text
    assert text.count("removed") == cut.before - cut.after


@pytest.mark.parametrize(("kind", "first"), [("group", "layer1.residual"), ("gate", "layer1.0.se")])
def test_an_unknown_name_lists_those_there_are(kind: str, first: str) -> None:
    with pytest.raises(UsageError) as caught:
        printed(make_report(), **{kind: "nowhere"})
    assert caught.value.what == f"{kind} 'nowhere' is not in this report"
    assert caught.value.why.startswith(f"it has {first}, ")
    assert caught.value.fix == f"seprune report RUN --{kind} {first}"


def test_names_with_brackets_are_not_markup() -> None:
    cut = GroupCut("[red]conv[/]", 1, 1, keep=[0])
    budget = BudgetReport("macs 0.5", 0.5, 0.5, "l2", "global", groups=[cut])
    assert "[red]conv[/]" in printed(dataclasses.replace(make_report(), budgets=[budget]))


MARK = "<b>x</b>"


def kinds(tree, path=()):
    """Every place of a text in a document, rows of a list taken together; keys are texts, too."""
    if isinstance(tree, dict):
        for key, value in tree.items():
            yield (*path, f"key {key}")
            yield from kinds(value, (*path, key))
    elif isinstance(tree, list):
        for value in tree:
            yield from kinds(value, (*path, "#"))
    elif isinstance(tree, str):
        yield path


def marked(tree, place, path=()):
    """The document with markup behind every text at this place."""
    if isinstance(tree, dict):
        return {
            key + MARK * ((*path, f"key {key}") == place): marked(value, place, (*path, key))
            for key, value in tree.items()
        }
    if isinstance(tree, list):
        return [marked(value, place, (*path, "#")) for value in tree]
    return tree + MARK if path == place and isinstance(tree, str) else tree


def test_markup_in_any_text_of_a_report_is_text_in_every_figure() -> None:
    """Plotly reads markup wherever it shows a text."""
    document = json.loads(json.dumps(measurement.to_json(make_report(((8, 2),), budgets=(0.5,)))))
    tried = 0
    for place in dict.fromkeys(kinds(document)):
        try:
            found = measurement.from_json(marked(document, place))
        except InputError:  # one of a few words, or a key that has to be there
            continue
        tried += 1
        shown = page._figures(found, stage_ends(found.gates), [found])
        both = compare([found, found])
        shown |= {"macs": comparison_figure(both), "latency": comparison_figure(both, LATENCY)}
        assert MARK not in json.dumps(list(shown.values())), place
    assert tried > 60


def test_markup_in_any_text_of_a_report_is_text_in_its_card() -> None:
    """But for the front matter, whose texts are quoted, and for the command in its fence."""
    document = json.loads(json.dumps(measurement.to_json(make_report(((8, 2),), budgets=(0.5,)))))
    tried, shown = 0, []
    for place in dict.fromkeys(kinds(document)):
        try:
            found = measurement.from_json(marked(document, place))
        except InputError:
            continue
        if not found.measurements:  # under another key
            continue
        tried += 1
        text = model_card(found, found.measurements[-1]).split("---", 2)[2]
        if MARK in "".join(text.split("```")[::2]):
            shown.append(place)
    assert shown == []
    assert tried > 60


def test_an_advised_command_has_a_foreign_name_as_one_word() -> None:
    cut = GroupCut("x; touch run", 1, 1, keep=[0])
    budget = BudgetReport("macs 0.5", 0.5, 0.5, "l2", "global", groups=[cut])
    with pytest.raises(UsageError) as caught:
        printed(dataclasses.replace(make_report(), budgets=[budget]), group="nowhere")
    assert caught.value.fix == "seprune report RUN --group 'x; touch run'"


@pytest.mark.parametrize(
    ("place", "count"),
    [("measurements", 2_001), ("gates", 5_001), ("artefacts", 1_001), ("budgets", 301)],
)
def test_a_report_of_more_rows_than_can_be_shown_is_refused(place, count) -> None:
    """A file of 60 MB had a table of 170,000 rows made of it, for minutes."""
    document = measurement.to_json(make_report(((8, 1),), budgets=(0.5,)))
    row = {"name": "x", "file": None, "bytes": 1}
    rows = document[place] or [row]
    measurement.from_json({**document, place: [*rows, *rows[-1:] * (count - 1 - len(rows))]})
    with pytest.raises(InputError, match="more than a report can show"):
        measurement.from_json({**document, place: rows[-1:] * count})


def test_groups_and_epochs_count_together() -> None:
    report = make_report(((8, 1),), budgets=(0.5, 0.7))
    document = json.loads(json.dumps(measurement.to_json(report)))
    for budget in document["budgets"]:
        budget["groups"] = budget["groups"][:1] * 10_001
    with pytest.raises(InputError, match="20,002 groups, more than a report can show"):
        measurement.from_json(document)


def test_no_color_leaves_no_escape_codes(monkeypatch) -> None:
    monkeypatch.setenv("NO_COLOR", "1")
    stream = io.StringIO()
    show(make_report(), Console(width=80, file=stream, force_terminal=True))
    assert "\x1b[3" not in stream.getvalue()


# Words


@pytest.mark.parametrize(
    ("number", "text"),
    [(0, "0"), (999, "999"), (1000, "1 k"), (999_600, "1 M"), (56_510_000, "56.5 M"), (None, "–")],
)
def test_quantities_have_three_digits_and_a_unit(number, text: str) -> None:
    assert words.quantity(number) == text


def test_changes_in_points_carry_their_sign() -> None:
    assert (words.points(-0.0045), words.points(0.01)) == ("−0.45", "+1.00")


def test_what_is_not_in_the_numbers_is_stated() -> None:
    assert words.missing(make_report()) == [
        "Images skipped in train: 1.",
        "Operators that ran but have no MAC formula, counted as 0: "
        "aten.mul, aten.relu_, aten.sigmoid.",
    ]
    assert words.not_timed(make_report()) == [
        "Latency at batch 512 (eager) was not measured: out of memory.",
    ]
    assert words.missing(unfinished_report()) == [
        "This run is not finished: what it has not measured yet is left out."
    ]


def test_a_runtime_that_was_not_timed_has_its_reason_in_place_of_a_table(tmp_path) -> None:
    report = make_report()
    why = "a detector decides by the values of tensors"
    for m in report.measurements:
        m.latency.append(Latency(m.stage, 1, None, None, "cpu", 1, "onnx", why))
    write_html(report, tmp_path / "r.html")
    text = (tmp_path / "r.html").read_text()
    assert "Latency, ONNX Runtime" not in text
    assert text.count(f"(ONNX Runtime) was not measured: {why}.") == 1
    assert text.count("Latency, eager") == 1


# Comparison


def three_seeds(criterion: str, tops: list[float]) -> list:
    budget = BudgetReport("macs 0.5", 0.5, 0.5, criterion, "global")
    return [
        dataclasses.replace(
            unfinished_report(),
            name=f"{criterion}-{seed}",
            seed=seed,
            budgets=[budget],
            measurements=[measured(0.9, 100, stage="baseline"), measured(top, 50)],
        )
        for seed, top in enumerate(tops)
    ]


def test_seeds_become_a_mean_and_a_spread() -> None:
    rows = compare(three_seeds("l2", [0.80, 0.82, 0.84])).rows
    baseline, tuned = rows
    assert (baseline.value, baseline.spread) == (pytest.approx(0.9), pytest.approx(0.0))
    assert (tuned.value, tuned.spread) == (pytest.approx(0.82), pytest.approx(0.02))
    assert (tuned.runs, tuned.seeds, tuned.kept) == (3, [0, 1, 2], 0.5)


def test_one_run_has_no_spread() -> None:
    assert compare(three_seeds("l2", [0.8])).rows[1].spread is None


def test_the_pareto_front_leaves_out_what_is_beaten() -> None:
    found = compare(three_seeds("l2", [0.80]) + three_seeds("gate_logit", [0.85]))
    assert {(r.stage, r.criterion): r.pareto for r in found.rows} == {
        ("baseline", ""): True,
        ("fine-tuned", "l2"): False,
        ("fine-tuned", "gate_logit"): True,
    }
    front = comparison_figure(found)["data"][0]
    assert (front["name"], front["x"]) == ("Pareto front", [0.00005, 0.0001])


def timed(*times: tuple[str, int, float]) -> list[Latency]:
    return [Latency("n", batch, ms, 0.1, "X", 1, runtime) for runtime, batch, ms in times]


def test_the_front_by_latency_is_of_the_runtime_that_was_asked_for(tmp_path) -> None:
    """`l2` has fewer MACs, `gate_logit` is faster: each is on its own front."""
    known = {
        "l2": (0.80, 40, timed(("eager", 1, 1.0), ("onnx", 1, 8.0), ("onnx", 8, 2.0))),
        "gate_logit": (0.81, 60, timed(("eager", 1, 9.0), ("onnx", 1, 3.0))),
    }
    reports = []
    for criterion, (value, macs, latency) in known.items():
        (report,) = three_seeds(criterion, [value])
        dense, tuned = report.measurements
        dense = dataclasses.replace(dense, latency=timed(("eager", 1, 20.0)))
        tuned = dataclasses.replace(tuned, macs=macs, latency=latency)
        reports.append(dataclasses.replace(report, measurements=[dense, tuned], runtime="onnx"))
    found = compare(reports)
    rows = {row.criterion: row for row in found.rows}
    assert [rows[c].pareto for c in known] == [True, True]
    assert [rows[c].pareto_ms for c in known] == [False, True]
    assert [rows[c].latency_ms for c in known] == [8.0, 3.0]
    assert rows["l2"].timed_on == "onnx, batch 1"
    assert any("different runtimes" in warning for warning in found.warnings)  # dense: eager alone
    figure = comparison_figure(found, LATENCY)
    assert {trace["name"]: trace["x"] for trace in figure["data"]} == {
        "Pareto front: onnx, batch 1": [3.0],
        "Pareto front: eager, batch 1": [20.0],
        "baseline": [20.0],
        "gate_logit · fine-tuned": [3.0],
        "l2 · fine-tuned": [8.0],
    }
    write_comparison(found, tmp_path / "c.html")
    assert "against latency" in (tmp_path / "c.html").read_text()


def test_example_images_stand_under_the_curves_of_their_gate(tmp_path) -> None:
    report = make_report()
    last = report.gates[-1].name
    shown = ClassExamples(last, "lowest", "cat <b>", 0.25, ["/9j/AAA="])
    write_html(dataclasses.replace(report, examples=[shown]), tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text()
    assert "Lowest mean excitation, 0.250: cat &lt;b&gt;" in page
    assert 'src="data:image/jpeg;base64,/9j/AAA=" alt="cat &lt;b&gt;, example 1"' in page
    assert page.index(f"excitation/{last}") < page.index("/9j/AAA=")


def test_runs_on_different_data_are_warned_about(seprune, tmp_path) -> None:
    one, other = three_seeds("l2", [0.8, 0.8])
    other = dataclasses.replace(other, data={"source": "cifar10"})
    warning = "The runs were measured on different data (cifar10, digits): "
    warning += "their accuracies do not compare, and each data set has a Pareto front of its own."
    assert compare([one, other]).warnings == [warning]
    for name, report in (("one", one), ("other", other)):
        measurement.write(report, tmp_path / name / "report.json")
    for command, *more in (("compare",), ("report", "--compare")):
        status, _, err = seprune(command, tmp_path / "one", *more, tmp_path / "other")
        assert status == 0, err
        assert f"warning: {warning}" in " ".join(err.split())


def on_data(report, source: str, digest: str = "", images: int = 400):
    data = {"source": source, "counts": {"training": 9, "reporting": images}}
    return dataclasses.replace(report, data=data, hashes={"data": digest} if digest else {})


def test_networks_measured_on_different_data_are_on_fronts_of_their_own() -> None:
    """The easier data would beat the other ones at every cost, and be averaged with seeds."""
    (hard,), (easy,) = three_seeds("l2", [0.5]), three_seeds("l2", [0.95])
    easy = dataclasses.replace(easy, seed=1)
    found = compare([on_data(hard, "cifar10", "a-1"), on_data(easy, "digits", "b-1")])
    tuned = [(r.data, r.label, r.value, r.seeds, r.pareto) for r in found.rows
             if r.stage == "fine-tuned"]  # fmt: skip
    assert tuned == [
        ("cifar10", "cifar10 · l2", 0.5, [0], True),
        ("digits", "digits · l2", 0.95, [1], True),
    ]
    fronts = {t["name"]: t["y"] for t in comparison_figure(found)["data"] if "Pareto" in t["name"]}
    assert fronts == {"Pareto front: cifar10": [50.0, 90.0], "Pareto front: digits": [95.0]}


def test_data_are_told_apart_by_their_content_not_by_how_they_are_written() -> None:
    (run,) = three_seeds("l2", [0.8])
    costs = Measurement("baseline", None, {}, None, 0, 0, 100, 10)
    unmeasured = dataclasses.replace(run, measurements=[costs])
    for others, expected in (
        ([("data", "a-1"), ("./data", "a-1")], ["data", "data"]),  # the same files
        ([("data", "a-1"), ("data", "a-2")], ["data", "data"]),  # with other times
        ([("data", "a-1"), ("data", "b-1")], ["data #1", "data #2"]),  # other files
        ([("data", "a-1"), ("copy", "a-2")], ["data", "copy"]),
        ([("data", "a-1"), ("data", "a-1", 40)], ["data #1", "data #2"]),  # a part of them
    ):
        found = ways.data_names([*(on_data(run, *given) for given in others), unmeasured])
        assert found == [*expected, ""]


def test_networks_timed_on_different_machines_are_on_fronts_of_their_own() -> None:
    reports = []
    for criterion, ms, machine, threads in (("l2", 9.0, "old", 1), ("l1", 3.0, "new", 1),
                                            ("taylor", 2.0, "new", 8)):  # fmt: skip
        (report,) = three_seeds(criterion, [0.8])
        dense, tuned = report.measurements
        tuned = dataclasses.replace(
            tuned, latency=[Latency("n", 1, ms, 0.1, machine, threads, "eager")]
        )
        reports.append(dataclasses.replace(report, measurements=[dense, tuned]))
    found = compare(reports)
    assert [r.pareto_ms for r in found.rows if r.stage == "fine-tuned"] == [True, True, True]
    places = ["new, 1 thread", "new, 8 threads", "old, 1 thread"]
    assert sorted(found.fronts(latency=True)) == places
    assert any("; ".join(places) in warning for warning in found.warnings)


def test_exported_files_say_which_images_their_metrics_are_of() -> None:
    small = ArtefactReport("ONNX", "a.onnx", 5, {"top1": 0.5}, count=1200, data="digits")
    unmeasured = ArtefactReport("torch.export", "a.pt2", 5)
    assert artefact_images([small, unmeasured]) == "Metrics are of 1,200 images of digits."
    assert artefact_images([unmeasured]) == ""
    other = dataclasses.replace(small, name="int8", count=40, data="few")
    assert artefact_images([small, unmeasured, other]) == (
        "Metrics are of different images: ONNX 1,200 images of digits, int8 40 images of few."
    )


def test_what_was_measured_of_a_file_stays_until_the_file_is_another(tmp_path) -> None:
    def export(name, file, sha256, top1=None, data=None, ms=1.0):
        rows = [("PyTorch", None, "weights"), (name, file, sha256)]
        metrics = None if top1 is None else {"top1": top1}
        keep_artefacts(
            [{"name": n, "file": f, "bytes": 5, "metrics": metrics, "median_ms": {"1": ms},
              "count": 40 if data else 0, "sha256": s} for n, f, s in rows],
            tmp_path,
            data=data,
        )  # fmt: skip
        return {
            (a.file or a.name, a.data): (*(a.metrics or {}).values(), *a.median_ms.values())
            for a in read_artefacts(tmp_path)
        }

    first = export("ONNX", "a.onnx", "a", 0.5, "digits")
    assert first == {("PyTorch", "digits"): (0.5, 1), ("a.onnx", "digits"): (0.5, 1)}
    other = export("torch.export", "a.pt2", "p", ms=2)
    assert other == {**first, ("PyTorch", "digits"): (0.5, 2), ("a.pt2", None): (2,)}
    assert export("ONNX", "a.onnx", "a", ms=3)["a.onnx", "digits"] == (0.5, 3)
    more = export("pruned fp32", "a.onnx", "a", 0.25, "few", ms=4)
    assert {key: value for key, value in more.items() if value[-1] == 4} == {
        ("PyTorch", "digits"): (0.5, 4),
        ("PyTorch", "few"): (0.25, 4),
        ("a.onnx", "digits"): (0.5, 4),
        ("a.onnx", "few"): (0.25, 4),
    }
    newer = export("ONNX", "a.onnx", "b", ms=5)
    assert [value for key, value in newer.items() if key[0] == "a.onnx"] == [(5,)]
    assert newer["PyTorch", "digits"] == (0.5, 5)


def test_a_comparison_is_written_as_csv_json_and_html(tmp_path) -> None:
    found = compare(three_seeds("l2", [0.80, 0.82]))
    write_comparison_csv(found, tmp_path / "c.csv")
    rows = list(csv.DictReader((tmp_path / "c.csv").open(newline="")))
    assert [row["seeds"] for row in rows] == ["0 1", "0 1"]
    assert json.loads(json.dumps(found.to_json(), allow_nan=False))["rows"][1]["runs"] == 2
    write_comparison(found, tmp_path / "c.html")
    assert "81.00 ± 1.41" in (tmp_path / "c.html").read_text()


# Model card and page


def test_the_model_card_has_front_matter_and_numbers() -> None:
    from seprune.recipe.yamlfile import YAML  # the reader of the project

    report = make_report()
    card = model_card(report, report.measurements[-1])
    front = YAML(typ="safe").load(card.split("---\n")[1])
    assert front["library_name"] == "seprune"
    [result] = front["model-index"][0]["results"]
    assert result["metrics"][0] == {"type": "accuracy", "value": report.measurements[-1].value}
    assert (front["datasets"], front["metrics"][0]) == (["cifar10"], "accuracy")
    assert 'seprune.load("path/to/this/folder")' in card
    assert "| baseline | 87.35 % | 99.00 % | 40,813,184 | 274,490 | 1.12 MB |" in card
    assert report.command in card


@pytest.mark.parametrize(
    ("source", "name"),
    [
        ("/home/me/my images/", "my images"),
        ("torchvision/CIFAR10:/data", "cifar10"),
        ("hf:org/birds:train", "org/birds"),
        ("digits", "digits"),
    ],
)
def test_a_card_names_the_data_and_not_the_paths_of_a_machine(source, name) -> None:
    from seprune.recipe.yamlfile import YAML

    report = make_report()
    model = report.model | {"base_model": "timm/seresnet50.a1_in1k"}
    report = dataclasses.replace(report, data=report.data | {"source": source}, model=model)
    card = model_card(report, report.measurements[-1], picture="accuracy.png")
    front = YAML(typ="safe").load(card.split("---\n")[1])
    assert front["datasets"] == [name]
    assert front["base_model"] == "timm/seresnet50.a1_in1k"
    assert f"images of {name}." in card
    assert name == source or source not in card
    assert "![top-1 against FLOPs](accuracy.png)" in card


def test_the_picture_of_a_card_shows_the_network_where_its_flops_are() -> None:
    report = make_report(budgets=(0.5,))
    base, own = report.measurements[0], report.measurements[-1]
    picture = Image.open(io.BytesIO(accuracy_picture(report, own))).convert("RGB")
    assert picture.size == (720, 400)
    pixels = np.asarray(picture).astype(int)
    blue = np.abs(pixels - (0x1F, 0x6F, 0xEB)).max(2) < 40
    _, x = (axis.mean() for axis in blue.nonzero())
    # from 0 to a little more than the baseline's, between the margins
    assert x == pytest.approx(84 + own.macs / (1.04 * base.macs) * (720 - 84 - 24), abs=1.5)
    lower = dataclasses.replace(own, metrics=own.metrics | {"top1": own.value - 0.02})
    other = dataclasses.replace(report, measurements=[*report.measurements[:-1], lower])
    again = np.asarray(Image.open(io.BytesIO(accuracy_picture(other, lower))).convert("RGB"))
    moved = np.abs(again.astype(int) - (0x1F, 0x6F, 0xEB)).max(2) < 40
    assert moved.nonzero()[0].mean() > blue.nonzero()[0].mean()  # worse is lower
    assert accuracy_picture(dataclasses.replace(report, measurements=[base]), base) is None


def test_names_in_the_model_card_are_text() -> None:
    name = "a\x1b]0;t\x07 [click](http://x) <img> `b` | c\n# d"
    report = dataclasses.replace(make_report(), command="seprune run a\n```\n# b")
    report = dataclasses.replace(report, name=name, data=report.data | {"source": name})
    card = model_card(report, report.measurements[-1])
    assert "# a\\x1b]0;t\\x07 \\[click](http://x) &lt;img> 'b' \\| c # d\n" in card
    assert not set(card) & set("\x1b\x07")
    assert "seprune run a\\n~~~\\n# b\n```" in card


def test_the_page_is_small_complete_and_offline(tmp_path) -> None:
    report = make_report(SE_RESNET_50)
    write_html(report, tmp_path / "my report é.html")
    page = (tmp_path / "my report é.html").read_text()
    assert len(page.encode()) < 6_000_000
    assert "default-src 'none'" in page
    plain = entities.unescape(page)
    for needed in ("What was cut", "What the gates say", "Not pruned", report.command, "87.35 %"):
        assert needed in plain
    assert "src=" not in page.split("<main")[1].split('id="plotly"')[0]


def test_hostile_names_stay_text(tmp_path) -> None:
    evil = "</script><script>alert(1)</script>"
    report = dataclasses.replace(make_report(), name=evil, command=evil, warnings=[evil])
    write_html(report, tmp_path / "r.html")
    assert "alert(1)</script>" not in (tmp_path / "r.html").read_text()


def test_an_unfinished_run_has_a_page(tmp_path) -> None:
    write_html(unfinished_report(), tmp_path / "r.html")
    assert "This run is not finished" in (tmp_path / "r.html").read_text()


def test_a_page_of_a_network_without_a_name(tmp_path) -> None:
    write_html(dataclasses.replace(make_report(), model={}), tmp_path / "r.html")
    assert "an unnamed network on" in (tmp_path / "r.html").read_text()


def test_the_same_report_gives_the_same_page(tmp_path) -> None:
    for name in ("a.html", "b.html"):
        write_html(make_report(), tmp_path / name)
    assert (tmp_path / "a.html").read_bytes() == (tmp_path / "b.html").read_bytes()


def test_the_report_names_what_a_plan_takes_out(tmp_path):
    report = make_report()
    removed = {"gates": ["layer1.0.se", "layer1.1.se"], "blocks": ["layer3.2"]}
    report.budgets[1] = dataclasses.replace(report.budgets[1], removed=removed)
    lines = ["gates held at their mean: layer1.0.se, layer1.1.se", "blocks left out: layer3.2"]
    assert words.plan(report.budgets[1]) == lines
    shown = " ".join(printed(report).split())
    write_html(report, tmp_path / "page.html")
    for line in lines:
        assert f"macs 0.5: {line}" in shown
        assert line in (tmp_path / "page.html").read_text()


def test_the_report_names_chosen_and_rejected_plans(tmp_path):
    trials = [
        {"name": "a joint", "error": 0.01234, "images": 64, "same_as": None},
        {"name": "a coupled", "error": 0.013, "images": 64, "same_as": None},
        {"name": "b", "error": 0.013, "images": 64, "same_as": "a coupled"},
        {"name": "c", "error": None, "images": 16, "same_as": None},
    ]
    choice = {"chosen": "a joint", "close": ["a coupled"], "trials": trials}
    lines = words.choice(choice)
    assert lines == [
        "a joint of 4 candidates; error of the network's outputs on held-out images, "
        "without labels: a joint 0.0123, a coupled 0.0130, b as a coupled, c not finite",
        "within 10 % of it, so perhaps as good: a coupled",
    ]
    assert words.choice(choice | {"trials": [], "close": []}) == [
        "a joint: all candidate plans are the same"
    ]
    assert words.choice({}) == []
    report = make_report()
    report.budgets[0] = dataclasses.replace(report.budgets[0], choice=choice)
    write_html(report, tmp_path / "a.html")
    assert "within 10 % of it, so perhaps as good: a coupled." in (tmp_path / "a.html").read_text()


def test_fine_tuning_is_described_by_its_numbers():
    numbers = {
        "epochs": 9,
        "best_epoch": 6,
        "validation_before": 0.61,
        "validation_recalibrated": None,
        "validation_best": 0.845,
        "metric": "top1",
        "chosen": "epoch 7",
        "optimizer": "sgd",
        "lr": 0.03,
        "norms": "train",
        "trials": 5,
        "accumulate": 4,
        "rollbacks": 1,
    }
    split = "top-1 on the validation split (images that the checkpoint may have been trained on)"
    assert words.tuning(numbers) == [
        f"{split}: 61.00 % as given, 84.50 % epoch 7, chosen",
        "trained by sgd at a learning rate of 0.03, the best of 5 trials; BatchNorm by the "
        "statistics of the batch",
        "every step in 4 micro-batches of the same batch together",
        "the loss became NaN once: rolled back, then half the learning rate",
    ]
    kept = numbers | {"chosen": "start", "best_epoch": -1, "validation_best": None}
    assert words.tuning(kept)[:2] == [
        f"{split}: 61.00 % as given, chosen",
        "no epoch was better than the network as given, which is returned",
    ]
    alone = kept | {"epochs": 0, "validation_recalibrated": 0.7, "chosen": "recalibrated"}
    assert words.tuning(alone | {"accumulate": 1, "rollbacks": 0}) == [
        f"{split}: 61.00 % as given, 70.00 % BatchNorm recalibrated, chosen"
    ]
    assert words.tuning({}) == []


def of_task(metric: str, values: tuple[float, float], *, higher: bool = True) -> measurement.Report:
    """A run of another task than classification: the dense network and one cut to a half."""
    made = [
        Measurement(
            stage, budget, {metric: value, "pixel_accuracy": 0.9}, 0.3, 100, 0, macs, macs,
            metric=metric, higher_is_better=higher,
        )
        for stage, budget, value, macs in (
            ("baseline", None, values[0], 1000), ("refitted", "macs 0.5", values[1], 500),
        )
    ]  # fmt: skip
    cut = BudgetReport("macs 0.5", 0.5, 0.5, "gate_logit", "cost_aware")
    return dataclasses.replace(make_report(), measurements=made, budgets=[cut], sensitivity={})


def test_a_run_is_reported_in_the_metric_of_its_task():
    report = of_task("miou", (0.644, 0.630))
    assert report.metrics == ["miou", "pixel_accuracy"]
    text = printed(report)
    assert "mIoU" in text
    assert "63.00 %" in text
    assert "top-1" not in text
    figure = accuracy(report)
    assert figure["layout"]["yaxis"]["title"]["text"] == "mIoU (%)"
    assert [trace["y"] for trace in figure["data"]] == [[64.4], [63.0]]
    card = model_card(report, report.measurements[1])
    assert "| network | mIoU | pixel accuracy | MACs |" in card
    assert measurement.from_json(measurement.to_json(report)).measurements == report.measurements


def test_an_error_is_written_as_it_is_and_less_of_it_is_better():
    report = of_task("mae", (0.5, 0.25), higher=False)
    base, cut = report.measurements
    assert words.change(cut, base) == "−0.25"
    assert accuracy(report)["data"][1]["y"] == [0.25]
    front = {row.stage: row.pareto for row in compare([report]).rows}
    assert front == {"baseline": False, "refitted": True}
    worse = of_task("mae", (0.5, 0.75), higher=False)
    front = {row.stage: row.pareto for row in compare([worse]).rows}
    assert front == {"baseline": True, "refitted": True}
    head, first, second = compare([report]).table()
    assert head[2] == "MAE"
    assert [row[2] for row in (first, second)] == ["0.50", "0.25"]


def test_the_page_has_the_metric_by_class_with_the_largest_losses_first(tmp_path) -> None:
    values = {
        "baseline": {"sky": 0.9, "road": 0.8, "car": 0.7, "tree": None},
        "fine-tuned": {"sky": 0.85, "road": 0.5, "car": 0.75, "tree": None},
    }
    measured = [
        Measurement(
            stage, None if stage == "baseline" else "macs 0.5", {"miou": 0.8}, 0.1, 9, 0, 100, 10,
            metric="miou", by_class=own,
        )
        for stage, own in values.items()
    ]  # fmt: skip
    report = dataclasses.replace(make_report(), measurements=measured)
    assert measurement.from_json(json.loads(json.dumps(measurement.to_json(report)))) == report
    write_html(report, tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text()
    section = page.partition('<section id="by-class">')[2].partition("</section>")[0]
    assert "<h2>mIoU by class</h2>" in section
    assert "<h2>mIoU against MACs</h2>" in page
    order = [section.index(f">{name}<") for name in ("road", "sky", "car", "tree")]
    assert order == sorted(order)
    row = section[order[0] : order[1]]
    assert "80.00 %" in row
    assert "50.00 %" in row
    write_html(make_report(), tmp_path / "plain.html")
    assert 'id="by-class"' not in (tmp_path / "plain.html").read_text()


def test_networks_that_are_alike_do_not_squash_the_axis():
    """Around the baseline the axis shows at least a hundredth of its value on each side."""
    report = make_report()
    value = 100 * report.baseline.value
    shown = accuracy(report)["layout"]["yaxis"]["autorangeoptions"]["include"]
    assert shown == pytest.approx([0.99 * value, 1.01 * value])
