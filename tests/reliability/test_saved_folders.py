"""Row 34: memory formats, tied weights, extras, unfinished runs, odd places, newer files."""

from __future__ import annotations

import json
from pathlib import Path

import corpus
import pytest
import torch
from folders import tree, untouched

import seprune
from seprune.pruning.analyse import analyse
from seprune.runtime.checksums import ARTEFACTS
from seprune.runtime.files import write_sums

pytestmark = pytest.mark.fault(34)
NET = "seprune/se_resnet8"
SMALL = ("--data", "digits", "--set", "plan.min_channels=2", "--json")
CUT = (*SMALL, "--importance", "l2", "--recover", "none")
TIED = """
import torch
from torch import nn


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.one = nn.Conv2d(1, 16, 3, padding=1), nn.Conv2d(16, 16, 3, padding=1)
        self.two = nn.Conv2d(16, 16, 3, padding=1)
        self.two.weight = self.one.weight
        self.head = nn.Linear(16, 10)

    def forward(self, x):
        return self.head(self.two(self.one(self.stem(x)).relu()).relu().mean((2, 3)))


def tied():
    return Tied().to(memory_format=torch.channels_last)
"""


@pytest.fixture(scope="module")
def folder(terminal, tmp_path_factory) -> Path:
    """A pruned network, in a place with spaces and letters of the world."""
    path = tmp_path_factory.mktemp("Ordner ü") / "klein ✂ 小"
    ended = terminal("prune", NET, *CUT, "--out", path)
    assert ended.status == 0, ended.err
    return path


def test_channels_last_and_tied_weights_are_saved(terminal, tmp_path):
    (tmp_path / "tied.py").write_text(TIED)
    name, out = f"{tmp_path}/tied.py:tied", tmp_path / "m"
    ended = terminal("prune", name, "--allow-code", *CUT, "--out", out)
    assert ended.status == 0, ended.err
    small = seprune.load(out, loader=seprune.ModelLoader.allowing(name))
    assert small.one.weight is small.two.weight
    assert small.one.in_channels < 16
    ended = terminal("evaluate", out, "--allow-code", "--data", "digits", "--json")
    assert json.loads(ended.out)["nonfinite"] == 0


def test_places_with_spaces_and_other_letters(terminal, folder, tmp_path):
    file = tmp_path / "aus gabe ✂.csv"
    with untouched(folder):
        alone = terminal("evaluate", folder, "--data", "digits", "--json")
        ended = terminal("rank", folder, "--importance", "l2", "--out", file)
    assert json.loads(alone.out)["count"] == 359
    assert ended.status == 0, ended.err
    assert file.is_file()
    assert terminal("verify", folder, "--json").status == 0


@pytest.mark.slow
def test_an_export_between_places_with_spaces_and_other_letters(terminal, folder, tmp_path):
    """It adds what it measured, and changes nothing that was there."""
    file, before = tmp_path / "aus gabe ✂.pt2", tree(folder)
    ended = terminal("export", folder, "--pt2", file, "--json", seconds=60)
    after = tree(folder)
    assert after.pop(ARTEFACTS)
    assert after == before
    assert json.loads(ended.out)["pt2"]["file"] == str(file), ended.err
    assert file.is_file()


@pytest.mark.parametrize(
    ("hidden", "words", "code", "fix"),
    [
        ("onnxruntime", ("export", "{folder}", "--onnx", "m.onnx"), "extra", "seprune[onnx]"),
        ("timm", ("inspect", "timm/seresnet18", "--classes", "10"), "environment", "seprune[timm]"),
    ],
)
def test_an_extra_that_is_missing_says_what_to_install(
    terminal, folder, tmp_path, hidden, words, code, fix
):
    words = [str(folder) if w == "{folder}" else w for w in words]
    hide = f"import sys; sys.modules[{hidden!r}] = None"
    ended = terminal(*words, "--json", cwd=str(tmp_path), before=hide)
    ended.refused(4, code, says=fix)
    assert not list(tmp_path.iterdir())


def test_a_report_of_a_run_that_is_not_finished(terminal, tmp_path):
    run = tmp_path / "r"
    words = (f"model.name={NET}", "train.epochs=1", "finetune.epochs=1", "collect.images=64")
    stop = "from seprune.pipeline import stages\n"
    stop += "def end(*_, **__): import os; os._exit(9)\nstages.prune = end"
    ended = terminal("run", "quickstart", *words, "--out", run, before=stop, seconds=60)
    assert ended.status == 9
    with untouched(run):
        ended = terminal("report", run, "--json")
    error = ended.refused(3, "unfinished", says=f"{run}: the run is not finished")
    assert error["next"].startswith(f"go on with: seprune run {run / 'recipe.yaml'} --out {run}")


def test_a_run_folder_that_may_not_be_written(terminal, tmp_path):
    (tmp_path / "r").mkdir()
    (tmp_path / "r").chmod(0o555)
    words = ("run", "quickstart", f"model.name={NET}", "--out", tmp_path / "r", "--json")
    ended = terminal(*words, ordinary=True)
    error = ended.refused(4, "environment", says=str(tmp_path / "r"))
    assert error["next"]
    assert not list((tmp_path / "r").iterdir())


def test_a_folder_of_a_newer_version(terminal, folder, tmp_path):
    for path in folder.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    config = json.loads((folder / "config.json").read_text())
    config["seprune"]["format"] = 99
    (tmp_path / "config.json").write_text(json.dumps(config))
    write_sums(tmp_path)
    with untouched(tmp_path):
        ended = terminal("evaluate", tmp_path, "--data", "digits", "--json")
    error = ended.refused(3, "newer", says="folder format 99, this seprune reads 1")
    assert error["next"] == "upgrade seprune: pip install -U seprune"


def test_what_was_loaded_is_cut_again(folder):
    small = seprune.load(folder)
    structure = analyse(small, torch.rand(2, 1, 8, 8))
    assert any(g.prunable for g in structure.groups)


def test_a_flag_for_one_file_runs_no_other(terminal, pruned, tmp_path, canary):
    """`--allow-code` for MODEL is none for what the folder of a teacher or a checkpoint names."""
    make = "import seprune\ndef make(): return seprune.build('seprune/se_resnet8', classes=10, "
    (tmp_path / "mine.py").write_text(make + "input=(1, 8, 8))\n")
    theirs = tmp_path / "theirs.py"
    theirs.write_text(f"open({str(canary)!r}, 'w')\n" + make + "input=(1, 8, 8))\n")
    folder = corpus.edited(pruned, tmp_path / "m", model=f"{theirs}:make")
    mine = (f"{tmp_path / 'mine.py'}:make", "--allow-code", "--input", "1x8x8")
    tune = ("finetune", *mine, "--data", "digits", "--epochs", 0, "--out", tmp_path / "o")
    for words in ((*tune, "--teacher", folder), ("inspect", *mine, "--checkpoint", folder)):
        ended = terminal(*words, "--json")
        assert ended.status in (2, 3), ended.err
        assert not canary.exists()
