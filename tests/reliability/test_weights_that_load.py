"""Checkpoints as people have them: what loads, what is said about it, and which weights it is."""

from __future__ import annotations

import argparse
import hashlib
import json
from pathlib import Path

import corpus
import evil
import numpy as np
import pytest
import torch
from corpus import NET, weights
from folders import tree, untouched
from safetensors.torch import save_file
from torch.optim.swa_utils import AveragedModel

from seprune.models import build


@pytest.fixture(scope="module")
def expected(terminal, tmp_path_factory):
    """What the plain weights score."""
    path = corpus.dense(tmp_path_factory.mktemp("plain") / "w.pth")
    return evaluated(terminal, path)[0]


def evaluated(terminal, path: Path, *more: str) -> tuple[dict, str]:
    with untouched(path.parent):
        words = (NET, "--checkpoint", path, "--data", "digits", "--json", *more)
        ended = terminal("evaluate", *words)
    assert ended.status == 0, ended.err
    return json.loads(ended.out), ended.err


def scaled(factor: float, prefix: str = "") -> dict[str, torch.Tensor]:
    return {prefix + n: t * factor if t.is_floating_point() else t for n, t in weights().items()}


@pytest.mark.fault(1)
def test_a_folder_with_model_safetensors_just_works(terminal, tmp_path, expected):
    (tmp_path / "hub").mkdir()
    save_file(weights(), tmp_path / "hub" / "model.safetensors")
    assert evaluated(terminal, tmp_path / "hub")[0] == expected


@pytest.mark.fault(11)
def test_a_training_checkpoint_of_timm_or_torchvision_loads(terminal, tmp_path, expected):
    path = corpus.dense(
        tmp_path / "checkpoint.pth",
        args=argparse.Namespace(lr=0.1, output=Path("runs/x"), momentum=np.float32(0.9)),
        best=np.float64(0.75),
        optimizer={"state": {0: {"step": torch.tensor(1.0)}}, "param_groups": [{"lr": 0.1}]},
        arch="se_resnet8",
        random=np.random.RandomState(0).get_state(),
    )
    found, output = evaluated(terminal, path)
    assert found == expected
    assert "note: weights taken from state_dict" in output


def averaged() -> dict[str, torch.Tensor]:
    model = build(NET, classes=10, input=(1, 8, 8))
    model.load_state_dict(weights())
    return AveragedModel(model).state_dict()


WRAPPED = {
    "module.": (lambda: scaled(1, "module."), "prefix module. stripped"),
    "_orig_mod.module.": (lambda: scaled(1, "_orig_mod.module."), "prefix _orig_mod. stripped"),
    "model.": (lambda: scaled(1, "model."), "prefix model. stripped"),
    "n_averaged": (averaged, "averaged weights (n_averaged = 0)"),
    "model key": (lambda: {"model": scaled(1)}, "weights taken from model"),
    "model_ema": (
        lambda: {"model": scaled(2), "model_ema": scaled(1)},
        "weights taken from model_ema (beside it: model; --weights raw|ema chooses)",
    ),
    "state_dict_ema": (
        lambda: {"state_dict": scaled(2), "model_ema": scaled(3), "state_dict_ema": scaled(1)},
        "weights taken from state_dict_ema (beside it: model_ema, state_dict;",
    ),
}


@pytest.mark.fault(13)
@pytest.mark.parametrize("name", WRAPPED)
def test_wrappers_and_averages(terminal, tmp_path, expected, name):
    make, note = WRAPPED[name]
    torch.save(make(), tmp_path / "w.pth")
    found, output = evaluated(terminal, tmp_path / "w.pth")
    assert found == expected
    assert f"note: {note}" in output


@pytest.mark.fault(13)
@pytest.mark.parametrize("command", ["evaluate", "inspect", "rank"])
def test_every_command_takes_the_choice_of_weights(terminal, tmp_path, expected, command):
    torch.save({"model": scaled(1), "model_ema": scaled(2)}, tmp_path / "w.pth")
    if command == "evaluate":
        assert evaluated(terminal, tmp_path / "w.pth", "--weights", "raw")[0] == expected
        assert evaluated(terminal, tmp_path / "w.pth", "--weights", "ema")[0] != expected
    torch.save({"model": scaled(1)}, tmp_path / "w.pth")
    more = ["--importance", "l2"] if command == "rank" else []
    more += ["--data", "digits"] if command == "evaluate" else ["--classes", "10"]
    more += ["--weights", "ema", "--json"] + (["--input", "1x8x8"] if len(more) == 2 else [])
    ended = terminal(command, NET, "--checkpoint", tmp_path / "w.pth", *more)
    ended.refused(3, "checkpoint-no-choice", says="no ema weights in it")


@pytest.mark.fault(15)
def test_a_pruned_folder_in_place_of_a_checkpoint(terminal, tmp_path):
    small = tmp_path / "klein ✂"
    words = (NET, "--data", "digits", "--importance", "l2", "--set", "plan.min_channels=2")
    assert terminal("prune", *words, "--recover", "none", "--out", small).status == 0
    alone = terminal("evaluate", small, "--data", "digits", "--json")
    assert evaluated(terminal, small)[0] == json.loads(alone.out)
    recipe = tmp_path / "r.yaml"
    recipe.write_text(
        f"name: x\nmodel: {{name: {NET}, checkpoint: '{small}'}}\ndata: {{source: digits}}\n"
        "importance: {criterion: l2}\nprune: {recover: none}\nreport: {latency: false}\n"
        "finetune: {epochs: 0, recalibrate: 0}\nplan: {macs: 0.8, min_channels: 2}\n"
    )
    with untouched(small):
        assert terminal("run", recipe, "--out", tmp_path / "run").status == 0
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    assert report["measurements"][0]["loss"] == json.loads(alone.out)["loss"]


@pytest.mark.fault(14)
@pytest.mark.parametrize(
    ("asked", "code", "says"),
    [
        (["seprune/se_resnet20"], "checkpoint-mismatch", "holds seprune/se_resnet8, seprune/se_r"),
        ([NET, "--set", "model.args.reduction=4"], "checkpoint-mismatch", "reduction=4 is asked"),
        ([NET, "--classes", "7"], "checkpoint-classes", "10 classes, the model has 7"),
    ],
)
def test_a_pruned_folder_of_another_network(terminal, tmp_path, asked, code, says):
    words = (NET, "--data", "digits", "--importance", "l2", "--out", tmp_path / "m")
    assert terminal("prune", *words, "--recover", "none").status == 0
    with untouched(tmp_path / "m"):
        more = ("--checkpoint", tmp_path / "m", "--data", "digits", "--json")
        terminal("evaluate", *asked, *more).refused(3, code, says=says)


@pytest.mark.fault(10)
def test_a_whole_model_is_converted_when_the_flag_names_it(terminal, tmp_path, expected):
    model = build(NET, classes=10, input=(1, 8, 8))
    model.load_state_dict(weights())
    path, out = tmp_path / "whole.pth", tmp_path / "whole.safetensors"
    torch.save({"epoch": 3, "model": model}, path)
    refused = terminal("convert", path, "--json")
    fix = refused.refused(3, "checkpoint-pickled", says="class seprune.models.")["next"]
    assert fix == f"if you trust its author: seprune convert --allow-pickle {path}"
    assert not out.exists()
    before = tree(tmp_path)
    ended = terminal("convert", "--allow-pickle", path, "--json", memory=4096, seconds=60)
    assert ended.status == 0, ended.err
    assert json.loads(ended.out)["tensors"] == len(weights())
    assert {n: s for n, s in tree(tmp_path).items() if n != out.name} == before
    assert evaluated(terminal, out)[0] == expected


@pytest.mark.fault(6)
def test_the_report_prints_the_sha256_of_a_file_that_cannot_be_checked(terminal, tmp_path):
    path = tmp_path / "w.safetensors"
    save_file(weights(), path)
    evil.flip_bit(path, path.stat().st_size - 1)  # nothing in the format can notice
    words = (f"model.checkpoint={path}", "importance.criterion=l2", "prune.recover=none")
    small = ("train=null", "finetune.epochs=0", "finetune.recalibrate=0", "report.latency=false")
    net = (f"model.name={NET}", "plan.min_channels=2", "--out", tmp_path / "run")
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    ended = terminal("run", "quickstart", *words, *small, *net)
    assert ended.status == 0, ended.err
    assert hashlib.sha256(path.read_bytes()).hexdigest() == digest
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    assert report["model"]["sha256"] == digest
    assert digest in (tmp_path / "run" / "report.html").read_text()
