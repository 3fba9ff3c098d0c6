"""The command line: JSON of the contract, exit statuses, three-part errors, no torch for help."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from seprune import cli
from seprune.cli import latency_table, recipes
from seprune.cli.app import COMMANDS
from seprune.export.pruned_model import load
from seprune.measure.flops import count
from seprune.models import build
from seprune.recipe import Recipe

NET = "seprune/se_resnet8"


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("weights") / "net.pth"
    torch.save(build(NET).state_dict(), path)
    return path


def test_inspect_gives_the_json_of_the_contract(seprune):
    status, out, _ = seprune("inspect", NET, "--json")
    document = json.loads(out)
    assert status == 0
    assert set(document) == {"model", "macs", "params", "gates", "groups"}
    gate, group = document["gates"][0], document["groups"][0]
    keys = {"name", "channels", "squeeze", "activation", "placement", "groups", "runs"}
    assert keys <= set(gate)
    assert {"name", "channels", "gates", "layers", "prunable", "reason"} <= set(group)
    assert gate["placement"] == "residual"
    assert gate["groups"] == [group["name"]]
    assert document["groups"][-1]["reason"] == "it is an output of the model"


def test_inspect_draws_tables_within_80_columns(seprune, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setenv("NO_COLOR", "1")
    status, out, err = seprune("inspect", NET)
    assert (status, out) == (0, "")
    assert "dependency groups" in err
    assert max(map(len, err.splitlines())) <= 80
    assert "\x1b" not in err


def test_prune_evaluate_finetune_verify_on_files(seprune, weights, tmp_path):
    small, tuned = tmp_path / "small net", tmp_path / "tuned"
    status, out, _ = seprune(
        *("prune", NET, "--checkpoint", weights, "--data", "digits", "--macs", "0.5"),
        *("--recover", "bn", "--out", small, "--set", "plan.min_channels=2"),
        *("--set", "collect.images=64", "--json"),
    )
    document = json.loads(out)
    assert status == 0
    assert document["macs_after"] <= 0.5 * document["macs_before"]
    assert {"params_before", "params_after", "groups", "seconds"} <= set(document)
    assert all(before >= after > 0 for before, after in document["groups"].values())
    files = {p.name for p in small.iterdir()}
    assert files == {"config.json", "model.safetensors", "plan.json", "statistics.safetensors",
                     "SHA256SUMS", "README.md", "accuracy.png", "report.json"}  # fmt: skip
    assert seprune("verify", small)[0] == 0

    status, out, _ = seprune("evaluate", small, "--data", "digits", "--json")
    assert status == 0
    found = json.loads(out)
    assert set(found) == {"task", "metrics", "top1", "top5", "loss", "count", "nonfinite"}
    assert found["task"] == "classification"
    assert found["metrics"]["top1"] == found["top1"]
    assert json.loads(out)["count"] == 359

    status, out, _ = seprune(
        *("finetune", small, "--data", "digits", "--epochs", "1", "--out", tuned, "--json"),
        *("--teacher", NET, "--teacher-checkpoint", weights),
    )
    assert status == 0
    assert json.loads(out)["params"] == document["params_after"]
    assert seprune("verify", tuned)[0] == 0

    (small / "plan.json").write_bytes((small / "plan.json").read_bytes() + b" ")
    status, _, err = seprune("verify", small)
    assert status == 3
    assert "plan.json" in err


def test_collect_then_rank_then_prune_from_the_statistics(seprune, weights, tmp_path):
    kept = tmp_path / "statistics.safetensors"
    status, out, _ = seprune(
        *("collect", NET, "--checkpoint", weights, "--data", "digits", "--images", "64"),
        *("--out", kept, "--json"),
    )
    assert (status, json.loads(out)["images"]) == (0, 64)
    status, out, _ = seprune(
        "rank", NET, "--checkpoint", weights, "--statistics", kept, "--json",
        "--out", tmp_path / "importance.csv",
    )  # fmt: skip
    scores = json.loads(out)["scores"]
    assert status == 0
    rows = (tmp_path / "importance.csv").read_text().splitlines()
    assert len(rows) == 1 + sum(map(len, scores.values()))
    status, out, err = seprune(
        *("prune", NET, "--checkpoint", weights, "--statistics", kept, "--macs", "0.6"),
        *("--dry-run", "--out", tmp_path / "plan", "--json", "--set", "plan.min_channels=2"),
    )
    assert status == 0, err
    assert [p.name for p in (tmp_path / "plan").iterdir()] == ["plan.json"]


def test_a_cut_recovers_as_a_recipe_does_where_there_are_images(seprune, weights, tmp_path):
    words = ("prune", NET, "--checkpoint", weights, "--importance", "l2", "--macs", "0.6")
    sets = ("--set", "collect.images=64", "--set", "plan.candidates=false")
    folders = {
        "as it is": ("--data", "digits"),
        "asked": ("--data", "digits", "--recover", "refit"),
        "cut": (),
        "none": ("--recover", "none"),
    }
    assert Recipe.model_validate({"name": "x", "model": {"name": NET}, "data": {"source": "digits"}}
                                 ).prune.recover == "refit"  # fmt: skip
    for name, more in folders.items():
        status, _, err = seprune(*words, *sets, *more, "--out", tmp_path / name)
        assert status == 0, err
    files = {n: (tmp_path / n / "model.safetensors").read_bytes() for n in folders}
    assert files["as it is"] == files["asked"] != files["cut"] == files["none"]


@pytest.mark.parametrize(
    ("command", "more"),
    [("collect", ()), ("prune", ("--importance", "l2", "--set", "plan.candidates=false"))],
)
def test_a_memory_budget_too_small_for_one_image_is_refused(
    command, more, seprune, weights, tmp_path
):
    words = (command, NET, "--checkpoint", weights, "--data", "digits", "--out", tmp_path / "out")
    status, _, err = seprune(*words, *more, "--set", "memory=2KB", "--set", "collect.images=64")
    assert status == 2
    assert "memory=2,048 bytes is too little for one image" in err
    need = int(re.search(r"one image needs ([\d,]+) bytes", err)[1].replace(",", ""))
    assert need > 2048
    assert int(re.search(r"give memory=(\d+)", err)[1]) >= need


def test_a_layer_that_was_not_refitted_is_named_with_the_image(seprune, tmp_path):
    torch.manual_seed(0)
    state = build(NET).state_dict()
    state["fc.weight"][0] = 3e38
    torch.save(state, tmp_path / "net.pth")
    status, _, err = seprune(
        *("prune", NET, "--checkpoint", tmp_path / "net.pth", "--data", "digits", "--macs", "0.6"),
        *("--importance", "l2", "--set", "plan.candidates=false", "--set", "collect.images=64"),
        *("--no-measure", "--out", tmp_path / "small"),
    )
    note = "not refitted: fc: its values are not finite for image 0"
    assert status == 0
    assert f"note: {note}" in err
    assert note in json.loads((tmp_path / "small" / "report.json").read_text())["warnings"]


def test_a_command_without_data_invents_none(seprune, tmp_path):
    words = ("prune", NET, "--importance", "l2", "--out", tmp_path / "m")
    status, _, err = seprune(*words, "--set", "data.mean=[0.5]")
    assert (status, "data.source: is required" in err) == (2, True)
    status, _, err = seprune(*words, "--recover", "refit")
    assert (status, "needs calibration images" in err) == (2, True)


def test_a_plan_is_edited_and_carried_out(seprune, weights, tmp_path):
    words = ("prune", NET, "--checkpoint", weights)
    status, _, err = seprune(
        *words, "--importance", "l2", "--macs", "0.6", "--dry-run", "--out", tmp_path
    )
    assert status == 0, err
    path = tmp_path / "plan.json"
    plan = json.loads(path.read_text())
    group = next(g for g in plan["groups"] if len(g["keep"]) < g["units"])
    text = path.read_text().replace(
        f'"keep": {json.dumps(group["keep"])}', f'"keep": {json.dumps(group["keep"][1:])}', 1
    )
    path.write_text(text)
    status, out, err = seprune(*words, "--plan", path, "--out", tmp_path / "m", "--json")
    assert status == 0, err
    document, small = json.loads(out), load(tmp_path / "m")
    assert document["groups"][group["name"]] == [group["units"], len(group["keep"]) - 1]
    cost = count(small, torch.zeros(1, 1, 8, 8))
    assert (document["macs_after"], document["params_after"]) == (cost.macs, cost.params)
    assert document["macs_after"] < plan["facts"]["macs"][1] < document["macs_before"]

    last = json.dumps(group["keep"][1:])
    path.write_text(text.replace(last, last.replace("]", ", 99]"), 1))
    line = next(n for n, x in enumerate(path.read_text().splitlines(), 1) if "99]" in x)
    status, _, err = seprune(*words, "--plan", path, "--out", tmp_path / "n")
    assert status == 3
    assert f"{path}:{line}: group '{group['name']}' of the plan is impossible" in err
    assert f"unit 99 is not one of 0..{group['units'] - 1}" in err
    assert not (tmp_path / "n").exists()

    status, _, err = seprune(*words, "--plan", path, "--macs", "0.5", "--out", tmp_path / "n")
    assert status == 2
    assert "--plan and --macs do not go together" in err


def test_inspect_shows_what_the_gates_say_before_anything_is_cut(
    seprune, weights, tmp_path, monkeypatch
):
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setenv("NO_COLOR", "1")
    monkeypatch.chdir(tmp_path)
    words = ("inspect", NET, "--checkpoint", weights)
    data = ("--data", "digits", "--set", "collect.images=64")
    status, out, err = seprune(*words, *data)
    assert (status, out) == (0, "")
    assert "Statistics over 64 images" in err
    prose = ("note: ", "preprocessing: ", "the preprocessing", "warning: ")
    assert max(len(x) for x in err.splitlines() if not x.startswith(prose)) <= 80
    assert list(tmp_path.iterdir()) == []

    document = json.loads(seprune(*words, *data, "--json")[1])["gates"][0]
    kept = tmp_path / "s.safetensors"
    seprune("collect", *words[1:], "--data", "digits", "--images", "64", "--out", kept)
    again = json.loads(seprune(*words, "--statistics", kept, "--json")[1])["gates"][0]
    assert len(document["statistics"]["mean"]) == document["channels"]
    assert again["statistics"]["mean"] == document["statistics"]["mean"]
    assert again["rank_agreement"] == document["rank_agreement"]


def test_the_gates_of_every_image_go_to_a_file_on_request(seprune, weights, tmp_path):
    rows = tmp_path / "gates.npy"
    status, _, err = seprune(
        *("collect", NET, "--checkpoint", weights, "--data", "digits", "--images", "40"),
        *("--out", tmp_path / "s.safetensors", "--per-sample", rows),
    )
    assert status == 0, err
    gates = np.load(rows, mmap_mode="r")
    assert gates.shape == (40, 16 + 32 + 64)
    assert 0 <= gates.min() <= gates.max() <= 1


def test_statistics_of_other_weights_are_refused(seprune, weights, tmp_path):
    kept = tmp_path / "s.safetensors"
    seprune("collect", NET, "--data", "digits", "--images", "32", "--out", kept, "--seed", "5")
    status, _, err = seprune("rank", NET, "--checkpoint", weights, "--statistics", kept)
    assert status == 3
    assert "model" in err


@pytest.mark.parametrize(
    ("words", "status", "message"),
    [
        (["prune", NET, "--out", "x"], 2, "needs calibration images"),
        (["prune", NET, "--out", "x", "--macs", "1.5", "--importance", "l2"], 3, "without a cut"),
        (["prune", NET, "--out", "x", "--macs", "0.001", "--importance", "l2"], 3, "can go down"),
        (["prune", NET, "--out", "x", "--importance", "l3"], 2, "unknown criterion 'l3'"),
        (["inspect", "seprune/se_resnet9"], 2, "no such model"),
        (["inspect", NET, "--input", "3x32"], 2, "not channels x height x width"),
        (["inspect", NET, "--checkpoint", "absent.pth"], 3, "absent.pth"),
        (["inspect", "./nowhere"], 3, "not a folder that seprune wrote"),
        (["evaluate", NET, "--data", "nowhere"], 3, "nowhere"),
        (["evaluate", NET, "--data", "digits", "--classes", "7"], 3, "7 outputs"),
        (["run", "quickstart", "plan.mcas=0.5"], 2, "did you mean plan.macs"),
        (["run", "quickstrat"], 2, "did you mean quickstart"),
        (["report", "nowhere"], 3, "no such run"),
        (["models", "no*such"], 3, "no network is called like"),
        (["recipes", "show", "nothing"], 2, "no shipped recipe"),
        (["frobnicate"], 2, "frobnicate"),
        (["prune", NET, "--frob"], 2, "--frob"),
    ],
)
def test_faults_say_what_why_and_what_next(words, status, message, seprune, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    got, out, err = seprune(*words)
    assert got == status
    assert message in err.replace("\n", " ")
    assert " next: " in err
    assert "Traceback" not in err
    assert out == ""


def test_a_fault_with_json_is_one_json_document(seprune):
    status, out, _ = seprune("inspect", "seprune/se_resnet9", "--json")
    assert status == 2
    assert json.loads(out)["error"]["code"] == "usage"


def test_an_empty_checkpoint_is_named_for_what_it_is(seprune, tmp_path):
    path = tmp_path / "empty.pth"
    path.touch()
    status, _, err = seprune("inspect", NET, "--checkpoint", path)
    assert status == 3
    assert "empty (0 bytes)" in err


def test_code_runs_only_when_the_command_line_says_so(seprune, tmp_path):
    file = tmp_path / "net.py"
    canary = tmp_path / "ran"
    file.write_text(
        f"open({str(canary)!r}, 'w').close()\n"
        "from seprune.models import build\n"
        "def make(**_):\n    return build('seprune/se_resnet8')\n"
    )
    status, _, err = seprune("inspect", f"{file}:make")
    assert status == 2
    assert "--allow-code" in err
    assert not canary.exists()
    status, out, _ = seprune(
        "inspect", f"{file}:make", "--allow-code", "--input", "1x8x8", "--json"
    )
    assert status == 0
    assert canary.exists()
    assert len(json.loads(out)["gates"]) == 3


def test_recipes_are_listed_shown_copied_and_validated(seprune, tmp_path):
    assert "quickstart" in seprune("recipes", "ls")[1]
    shown = seprune("recipes", "show", "quickstart")[1]
    copy = tmp_path / "mine.yaml"
    assert seprune("recipes", "cp", "quickstart", copy)[0] == 0
    assert copy.read_text() == shown
    assert seprune("recipes", "cp", "quickstart", copy)[0] == 2
    assert seprune("recipes", "validate", copy)[0] == 0
    assert json.loads(seprune("recipes", "schema")[1])["title"] == "Recipe"


def test_help_and_recipe_errors_do_not_import_torch():
    code = (
        "import sys; sys.argv = ['seprune', *sys.argv[1:]]\n"
        "from seprune.cli import main\n"
        "try:\n    main()\nexcept SystemExit:\n    pass\n"
        "print('torch' in sys.modules)"
    )
    for words in (
        ["--help"],
        ["--version"],
        ["prune", "--help"],
        ["run", "--help"],
        ["run", "quickstart", "plan.macs=7"],
    ):
        done = subprocess.run(
            [sys.executable, "-c", code, *words], capture_output=True, text=True, check=True
        )
        assert done.stdout.splitlines()[-1] == "False", words


def test_the_version(seprune):
    assert seprune("--version")[:2] == (0, "seprune 0.2.0\n")


def test_the_demonstration_runs_the_quickstart_and_opens_its_report(seprune, monkeypatch, tmp_path):
    carried, opened = [], []
    monkeypatch.setattr("seprune.cli.demo.run", lambda name, **given: carried.append((name, given)))
    monkeypatch.setattr("typer.launch", opened.append)
    out = tmp_path / "demo"
    assert seprune("demo", "--out", out)[0] == 0
    assert opened == []
    assert seprune("demo", "--out", out, "--open")[0] == 0
    assert carried == 2 * [("quickstart", {"out": out, "json": False})]
    assert opened == [str(out / "report.html")]


@pytest.mark.slow
@pytest.mark.timeout(1200)  # under a minute alone; 30 epochs where other work takes the processor
def test_the_demonstration_ends_with_the_path_of_its_report(tmp_path):
    out = tmp_path / "demo"
    command = [sys.executable, "-m", "seprune", "demo", "--out", str(out)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stderr.splitlines()[-1] == f"report: {out / 'report.html'}"
    assert "<title>quickstart" in (out / "report.html").read_text()


def test_every_command_is_in_the_file_of_its_name():
    for name, command in COMMANDS.items():
        assert command.__module__ == f"seprune.cli.{name}"


def commands():
    """Every command line that has a help, down to the subcommands."""
    names = {c.name or c.callback.__name__ for c in cli.app.registered_commands}
    nested = {"recipes": recipes.app, "latency-table": latency_table.app}
    inner = {f"{n} {c.name}" for n, app in nested.items() for c in app.registered_commands}
    return ["", *sorted({*names, *nested, *inner})]


@pytest.mark.parametrize("command", commands())
def test_every_help_has_an_example_that_the_command_line_takes(command, seprune, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    status, out, _ = seprune(*command.split(), "--help")
    assert status == 0
    assert max(map(len, out.splitlines())) <= 80
    found = out.partition("Example")[2].partition("Arguments:")[0].partition("Options:")[0]
    lines = found.partition(":\n")[2].replace("\\\n", " ").strip().splitlines()
    assert lines
    for line in map(shlex.split, lines):
        assert line[0] == "seprune"
        assert " ".join(line[1:]).startswith(command)
        known = re.findall(r"--[a-z0-9-]+", out)
        assert command == "" or {w for w in line if w.startswith("--")} <= set(known)


def test_a_shell_completes_commands_and_options():
    code = "import sys; sys.argv = ['seprune']; from seprune.cli import main; main()"
    asked = {"_SEPRUNE_COMPLETE": "complete_bash", "COMP_CWORD": "1"}
    for words, expected in (("seprune swe", "sweep"), ("seprune recipes val", "validate")):
        typed = {"COMP_WORDS": words, "COMP_CWORD": str(words.count(" "))}
        done = subprocess.run(
            [sys.executable, "-c", code], env={**os.environ, **asked, **typed},
            capture_output=True, text=True, check=True,
        )  # fmt: skip
        assert done.stdout.split() == [expected]


def test_the_list_of_commands_is_not_cut_short(seprune, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    listed = seprune("--help")[1].partition("Commands:")[2]
    assert "sweep" in listed
    assert "..." not in listed


def test_options_that_commands_share_read_alike_everywhere(seprune, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    helps = {}
    for command in ("inspect", "collect", "rank", "prune", "finetune", "evaluate"):
        out = seprune(command, "--help")[1]
        helps[command] = {k: re.sub(r"\s+", " ", v) for k, v in re.findall(
            r"^  (--[\w-]+|MODEL)\b(.*?)(?=^  \S|\Z)", out, re.M | re.S)}  # fmt: skip
    shared = {"MODEL", "--checkpoint", "--weights", "--classes", "--input", "--allow-code",
              "--device", "--seed", "--set", "--json"}  # fmt: skip
    first = helps.pop("inspect")
    assert shared <= set(first)
    for command, own in helps.items():
        assert {k: own.get(k) for k in shared} == {k: first[k] for k in shared}, command


def test_python_cli_py_works_from_a_checkout():
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "cli.py", "recipes", "ls"], cwd=root, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "quickstart" in done.stdout
