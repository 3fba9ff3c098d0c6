"""Networks without a classifier, or with one for other classes than the data have."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from seprune.errors import UsageError
from seprune.models import build

timm = pytest.importorskip("timm")
NET = "timm/test_efficientnet"
BARE = ("--set", "model.args={num_classes: 0}")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Three classes of four images each, for training and validation."""
    root, random = tmp_path_factory.mktemp("images"), np.random.default_rng(0)
    for part in ("train", "val"):
        for number, name in enumerate(("ant", "bee", "cat")):
            (root / part / name).mkdir(parents=True)
            for i in range(4):
                noise = random.integers(0, 15, (32, 32, 3)) + 120 * number
                Image.fromarray(noise.astype(np.uint8)).save(root / part / name / f"{i}.png")
    return root


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    """Weights with a head for seven classes."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("weights") / "seven.pth"
    torch.save(build(NET, classes=7).state_dict(), path)
    return path


def test_a_network_without_a_classifier_is_pruned_and_evaluated_by_retrieval(
    seprune, folder, tmp_path
):
    out = tmp_path / "small"
    status, text, err = seprune(
        *("prune", NET, *BARE, "--input", "3x32x32", "--data", folder),
        *("--macs", "0.6", "--out", out, "--json"),
    )
    assert status == 0, err
    result = json.loads(text)
    assert 0.5 < result["macs_after"] / result["macs_before"] <= 0.6
    described = json.loads((out / "config.json").read_text())["seprune"]
    assert (described["args"], described["classes"]) == ({"num_classes": 0}, None)
    status, text, err = seprune("evaluate", out, "--data", folder, "--json")
    assert status == 0, err
    scored = json.loads(text)
    assert scored["task"] == "embedding"
    assert scored["metrics"]["recall@1"] > 0.9  # brightness tells the classes apart
    assert "top1" not in scored
    tuned = tmp_path / "tuned"
    status, _, err = seprune(*("finetune", out, "--data", folder, "--epochs", "1", "--out", tuned))
    assert status == 0, err
    assert re.search(r"fine-tuned · macs 0.6 +(100|9\d)\.\d+ %", err), err


def test_a_head_for_other_classes_is_kept_where_labels_are_not_used(
    seprune, folder, checkpoint, tmp_path
):
    given = (NET, "--checkpoint", checkpoint, "--input", "3x32x32", "--data", folder)
    status, _, err = seprune("prune", *given, "--macs", "0.6", "--out", tmp_path / "a")
    assert status == 3
    assert "next: --classes 7" in err
    out = tmp_path / "small"
    words = ("prune", *given, "--classes", "7", "--macs", "0.6", "--out", out)
    status, _, err = seprune(*words)
    assert status == 0, err
    assert "7 outputs and the data have 3 classes, so the labels are not used" in err
    assert json.loads((out / "config.json").read_text())["seprune"]["classes"] == 7
    status, _, err = seprune(*words[:-1], tmp_path / "b", "--importance", "gate_taylor")
    assert status == 3, "this criterion looks at labels"
    assert "the network has 7 outputs, the data have 3 classes" in err
    assert "next: use the data it was trained for, or weights that were trained for 3" in err
    assert seprune("evaluate", out, "--data", folder)[0] == 3


def test_the_width_of_the_head_is_mentioned_once(seprune, folder, tmp_path):
    words = ("prune", NET, *BARE, "--classes", "3", "--data", folder, "--macs", "0.6")
    status, _, err = seprune(*words, "--out", tmp_path / "small")
    assert status == 2
    assert "model.classes is 3, model.args asks for 0" in err
    with pytest.raises(UsageError, match="num_classes is 0 in the arguments, 3 is asked for"):
        build(NET, classes=3, num_classes=0)
    with pytest.raises(UsageError, match="in_chans is 1 in the arguments, 3 is asked for"):
        build(NET, input=(3, 32, 32), in_chans=1)
