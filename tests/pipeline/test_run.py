"""A whole run on the embedded digits: stages, journal, resume, other people's networks."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from seprune.errors import InputError, UsageError
from seprune.export.pruned_model import load
from seprune.measure.flops import count
from seprune.pipeline import stages
from seprune.pipeline.collection import NO_GATES
from seprune.pipeline.context import Context, Runtime
from seprune.pipeline.inputs import open_both
from seprune.pipeline.run import run
from seprune.pipeline.run_folder import verify
from seprune.pipeline.settings import CutSettings
from seprune.pruning.limits import Budget
from seprune.pruning.prune import prune
from seprune.recipe import load_recipe
from seprune.report.measurement import read

SMALL = (
    "model.name=seprune/se_resnet8",
    "train.epochs=1",
    "train.warmup_epochs=0",
    "collect.images=64",
    "plan.macs=0.5",
    "plan.min_channels=2",
    "plan.candidates=false",
    "finetune.epochs=1",
    "finetune.recalibrate=64",
    "report.latency=false",
    "device=cpu",
)


def recipe(*overrides: str):
    return load_recipe("quickstart", [*SMALL, *overrides])


@pytest.fixture(scope="module")
def finished_run(tmp_path_factory):
    out = tmp_path_factory.mktemp("run with a space") / "übung"
    return out, run(recipe(), out)


def test_every_file_of_the_contract_is_there(finished_run):
    out, _ = finished_run
    names = {p.relative_to(out).as_posix() for p in out.rglob("*") if p.is_file()}
    folder = {"config.json", "model.safetensors", "plan.json", "SHA256SUMS", "README.md"}
    assert names >= {
        "recipe.yaml",
        "environment.json",
        "journal.jsonl",
        "statistics.safetensors",
        "importance.csv",
        "plan.json",
        "report.json",
        "report.csv",
        "report.html",
        *(f"pruned/{n}" for n in folder),
        *(f"finetuned/{n}" for n in folder),
        "finetuned/metrics.jsonl",
    }


def test_the_report_has_the_stages_in_order(finished_run):
    out, report = finished_run
    stages = [m.stage for m in report.measurements]
    assert stages == ["baseline", "pruned", "refitted", "fine-tuned"]
    base, pruned, _, tuned = report.measurements
    assert base.count == tuned.count == 359
    assert pruned.macs == tuned.macs <= 0.5 * base.macs
    assert read(out).measurements == report.measurements
    assert report.budgets[0].criterion in ("gate_logit", "gate_mean_measured")


def test_the_saved_network_has_the_measured_cost(finished_run):
    out, report = finished_run
    tuned = load(out / "finetuned")
    assert sum(p.numel() for p in tuned.parameters()) == report.measurements[-1].params


def test_the_same_command_does_no_stage_twice(finished_run):
    out, report = finished_run
    before = (out / "journal.jsonl").read_bytes()
    again = run(recipe(), out)
    assert (out / "journal.jsonl").read_bytes() == before
    assert again.measurements == report.measurements


@pytest.mark.fault(6)
@pytest.mark.parametrize("name", ["model.safetensors", "SHA256SUMS", "metrics.jsonl"])
def test_a_damaged_stage_is_found_and_done_again_and_ends_the_same(finished_run, name):
    out, report = finished_run
    path = out / "finetuned" / name
    good = path.read_bytes()
    path.write_bytes(good[:-1] + bytes([good[-1] ^ 1]))
    assert f"finetuned/{name}: changed since stage finetune/macs 0.5" in "\n".join(verify(out))
    again = run(recipe(), out)
    assert path.read_bytes() == good
    assert again.measurements == report.measurements
    assert verify(out) == []


@pytest.mark.fault(6)
@pytest.mark.parametrize("name", ["recipe.yaml", "environment.json", "report.json", "report.html"])
def test_what_is_damaged_beside_the_stages_is_found_and_written_again(finished_run, name):
    out, report = finished_run
    path = out / name
    good = path.read_bytes()
    path.write_bytes(good[:40] + bytes([good[40] ^ 1]) + good[41:])
    assert f"{name}: changed since stage" in verify(out)[0]
    assert run(recipe(), out).measurements == report.measurements
    assert verify(out) == []


def test_the_folder_may_be_relative(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    args = ("train=null", "importance.criterion=l2", "prune.recover=none", "finetune.epochs=0")
    run(recipe(*args), Path("runs/here"))
    assert (tmp_path / "runs" / "here" / "report.json").is_file()


def test_another_recipe_is_refused_in_the_same_folder(finished_run):
    out, _ = finished_run
    with pytest.raises(UsageError, match=r"plan\.macs") as caught:
        run(recipe("plan.macs=0.4"), out)
    assert caught.value.exit_status == 2


def test_the_plan_is_chosen_among_candidates_and_one_key_turns_it_off(finished_run, tmp_path):
    report = run(recipe("plan.candidates=true", "finetune.epochs=0"), tmp_path)
    choice = json.loads((tmp_path / "plan.json").read_text())["facts"]["candidates"]
    errors = [t["error"] for t in choice["trials"]]
    assert report.budgets[0].choice == choice
    assert choice["chosen"] == choice["trials"][0]["name"]
    assert errors == sorted(errors)
    assert {t["name"] for t in choice["trials"]} == {
        f"{name} {way}"
        for name in ("gate_logit", "gate_mean_measured")
        for way in ("joint", "coupled")
    }
    alone = finished_run[1]
    assert alone.budgets[0].choice == {}
    assert alone.budgets[0].criterion == "gate_logit"


def test_several_budgets_share_baseline_and_statistics(tmp_path):
    wanted = recipe("plan.macs=[0.6, 0.4]", "prune.recover=none", "plan.candidates=true")
    report = run(wanted, tmp_path)
    assert [m.budget for m in report.measurements] == [None, *["macs 0.6"] * 2, *["macs 0.4"] * 2]
    lines = (tmp_path / "journal.jsonl").read_text().splitlines()
    names = [json.loads(line)["stage"] for line in lines]
    assert names.count("collect") == names.count("train") == 1
    for budget in report.budgets:  # judged as they were cut
        assert {t["name"].partition(", ")[2] for t in budget.choice["trials"]} == {
            "", "floor 0.2", "global",
        }  # fmt: skip
    assert (tmp_path / "macs-0.6" / "finetuned" / "model.safetensors").is_file()
    assert (tmp_path / "macs-0.4" / "plan.json").is_file()


def test_a_checkpoint_skips_the_training(finished_run, tmp_path):
    out, report = finished_run
    again = run(recipe(f"model.checkpoint={out / 'trained'}", "finetune.epochs=0"), tmp_path)
    assert not (tmp_path / "trained").exists()
    assert again.measurements[0].value == report.measurements[0].value


def test_a_pruned_network_is_pruned_again(finished_run, tmp_path):
    out, _ = finished_run
    twice = run(
        recipe(f"model.name={out / 'finetuned'}", "plan.macs=0.7", "importance.criterion=l2"),
        tmp_path,
    )
    assert twice.measurements[1].macs <= 0.7 * twice.measurements[0].macs
    assert (tmp_path / "pruned" / "plan-2.json").is_file()
    again = load(tmp_path / "pruned")
    assert sum(p.numel() for p in again.parameters()) == twice.measurements[1].params


def opened(made) -> tuple[Context, CutSettings]:
    context = Context(*open_both(made), Runtime(torch.device("cpu")))
    return context, CutSettings.of(made)


@pytest.mark.slow
def test_several_small_cuts_reach_the_same_budget(tmp_path):
    report = run(
        recipe("plan.steps=2", "plan.round_to=1", "prune.recover=bn", "finetune.epochs=0"), tmp_path
    )
    base, pruned = report.measurements[:2]
    assert 0.4 * base.macs <= pruned.macs <= 0.5 * base.macs
    assert (tmp_path / "pruned" / "plan-2.json").is_file()
    lines = map(json.loads, (tmp_path / "journal.jsonl").read_text().splitlines())
    half = {line["stage"]: line["facts"] for line in lines}["prune/step-1"]["plan"]["macs"]
    assert half[1] / half[0] == pytest.approx(0.5**0.5, abs=0.02)


def test_a_small_cut_that_an_earlier_one_has_made_already_takes_nothing():
    words = ("plan.steps=6", "plan.round_to=16", "importance.criterion=l2", "prune.recover=none")
    made = recipe(*words)
    context, settings = opened(made)
    cut = stages.cut_in_steps(context, settings, None, Budget.parse(macs=0.8))
    costs = [plan.facts["macs"] for plan in cut.architecture.plans]
    assert len(costs) == 6
    assert any(before == after for before, after in costs)
    assert costs[-1][1] == count(cut.pruned, context.network.example(1)).macs <= 0.8 * costs[0][0]


@pytest.mark.parametrize("more", [pytest.param({}, marks=pytest.mark.slow), {"macs": 0.8}])
def test_several_small_cuts_share_a_latency_budget(monkeypatch, more):
    """A device on which half of the MACs take half of the time; fractions of the uncut network."""
    made = recipe("plan.steps=3", "importance.criterion=l2", "prune.recover=none")
    context, settings = opened(made)
    whole = context.structure.costs()["macs"]

    def latency_of(context, section, stack):
        network = context.network

        def measure(plan):
            return count(prune(network.model, plan), network.example(1)).macs / whole

        return measure, None

    monkeypatch.setattr(stages, "latency_of", latency_of)
    cut = stages.cut_in_steps(context, settings, None, Budget.parse(latency=0.5, **more))
    assert len(cut.architecture.plans) == 3
    assert 0.4 <= count(cut.pruned, context.network.example(1)).macs / whole <= 0.5


@pytest.mark.slow
def test_the_last_epoch_is_measured_beside_the_chosen_one_if_asked(tmp_path):
    asked = ("report.last_epoch=true", "finetune.epochs=2", "finetune.lr=0.5", "report.html=false")
    report = run(recipe(*asked), tmp_path)
    *_, last, chosen = report.measurements
    assert [last.stage, chosen.stage] == ["last epoch", "fine-tuned"]
    journal = [json.loads(x) for x in (tmp_path / "journal.jsonl").read_text().splitlines()]
    facts = next(r["facts"] for r in journal if r["stage"] == "finetune/macs 0.5")
    assert (last.loss == chosen.loss) == (facts["tuning"]["best_epoch"] == 1)


def test_from_scratch_keeps_the_structure_and_none_of_the_weights(tmp_path):
    report = run(
        recipe("prune.recover=scratch", "finetune.epochs=0", "report.html=false"), tmp_path
    )
    pruned, drawn = report.measurements[1:3]
    assert drawn.stage == "drawn anew"
    assert (drawn.macs, drawn.params) == (pruned.macs, pruned.params)
    fresh = load(tmp_path / "pruned").state_dict()
    trained = load(tmp_path / "trained").state_dict()
    assert not fresh["bn1.running_mean"].any()
    assert trained["bn1.running_mean"].any()


def test_gates_that_are_not_there_are_a_clear_error_and_other_criteria_prune(tmp_path):
    args = ("model.name=seprune/se_resnet8", "model.args.stages=''", "finetune.epochs=0")
    with pytest.raises(InputError, match="no channel gates") as caught:
        run(recipe(*args, "importance.criterion=gate_mean"), tmp_path / "gates")
    assert "importance.criterion=gate_logit" in caught.value.fix
    for criterion in ("l2", "gate_logit"):
        report = run(recipe(*args, f"importance.criterion={criterion}"), tmp_path / criterion)
        assert report.measurements[1].macs <= 0.5 * report.measurements[0].macs
        assert (NO_GATES in report.warnings) == (criterion == "gate_logit")


def test_an_unknown_criterion_is_found_before_anything_is_written(tmp_path):
    with pytest.raises(UsageError, match="unknown criterion 'gate_logits'") as caught:
        run(recipe("importance.criterion=gate_logits"), tmp_path / "x")
    assert caught.value.fix == "importance.criterion=gate_logit"
    assert not (tmp_path / "x").exists()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["torchvision/mobilenet_v3_small", "timm/seresnet18"])
def test_nothing_is_tied_to_one_network(name, tmp_path):
    if name.startswith("timm/"):
        pytest.importorskip("timm", reason="the extra timm is not installed")
    report = run(
        load_recipe(
            "quickstart",
            [*SMALL[2:], f"model.name={name}", "model.input=[3,32,32]", "train=null"],
        ),
        tmp_path,
    )
    assert report.measurements[-1].macs <= 0.5 * report.measurements[0].macs
    assert any("random" in w for w in report.warnings)


def _start(out: Path) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "seprune", "run", "quickstart", "--out", str(out), *SMALL]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=env)


@pytest.mark.slow
def test_kill_9_at_any_stage_and_the_same_command_ends_bit_equal(tmp_path):
    """Killed after each new commit line, then once more by the clock, until it is through."""
    whole = _start(tmp_path / "whole")
    assert whole.wait() == 0
    out, seen = tmp_path / "killed", 0
    for _ in range(12):
        process = _start(out)
        journal = out / "journal.jsonl"
        while process.poll() is None:
            lines = len(journal.read_bytes().splitlines()) if journal.exists() else 0
            if lines > seen:
                seen = lines
                process.send_signal(signal.SIGKILL)
                process.wait()
            time.sleep(0.01)
        if process.returncode == 0:
            break
        assert process.returncode == -signal.SIGKILL
    assert process.returncode == 0
    for name in ("trained", "pruned", "finetuned"):
        one = (tmp_path / "whole" / name / "model.safetensors").read_bytes()
        assert (out / name / "model.safetensors").read_bytes() == one
    one, two = read(tmp_path / "whole"), read(out)
    assert one.measurements == two.measurements


@pytest.mark.slow
def test_sigterm_saves_the_state_and_says_how_to_go_on(tmp_path):
    process = _start(tmp_path)
    while not (tmp_path / "journal.jsonl").exists() and process.poll() is None:
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    output = process.communicate()[0].decode()
    assert process.returncode == 143, output
    assert "go on with: seprune run quickstart --out" in output
    assert "Traceback" not in output


@pytest.mark.slow
def test_a_run_reconstructs_and_leaves_nothing_unfinished(tmp_path: Path):
    words = (
        "prune.recover=reconstruct",
        "prune.epochs=1",
        "finetune.epochs=0",
        "finetune.recalibrate=0",
    )
    report = run(recipe(*words), tmp_path)
    stages = [m.stage for m in report.measurements]
    assert stages == ["baseline", "pruned", "reconstructed"]
    assert not list(tmp_path.rglob("reconstructing-*"))
    pruned, made = (m for m in report.measurements if m.stage != "baseline")
    assert made.loss is not None
    assert pruned.loss is not None
    assert made.loss < pruned.loss


def test_other_pixels_under_the_same_names_are_trained_on_anew(tmp_path: Path):
    """As BMP files, so that neither names nor sizes of files change."""
    images, out, rng = tmp_path / "images", tmp_path / "run", np.random.default_rng(0)

    def draw() -> None:
        for split in ("train", "val"):
            for label in "ab":
                for number in range(12):
                    path = images / split / label / f"{number}.bmp"
                    path.parent.mkdir(parents=True, exist_ok=True)
                    pixels = rng.integers(0, 255, (8, 8, 3), dtype=np.uint8)
                    Image.fromarray(pixels).save(path)

    words = ("model.classes=2", "model.input=[3, 8, 8]", f"data.source={images}")
    draw()
    before = run(recipe(*words), out)
    draw()
    after = run(recipe(*words), out)
    assert before.measurements[0].loss != after.measurements[0].loss
    noted = [note for note in after.data["notes"] if note.startswith("stage ")]
    assert {"train", "baseline", "collect"} <= {note.split()[1] for note in noted}
    assert all("was made anew: its files, the images, the weights or the" in n for n in noted)
    again = run(recipe(*words), out)
    assert again.measurements == after.measurements
