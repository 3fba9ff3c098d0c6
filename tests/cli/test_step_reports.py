"""prune, finetune, export, report, compare: one after the other, as each tells to go on."""

import json
import re
import shlex
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from seprune import build
from seprune.export.pruned_model import read_metrics
from seprune.report import measurement

NET = "seprune/se_resnet8"


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("weights") / "dense net.pth"
    torch.save(build(NET, classes=10, input=(1, 8, 8)).state_dict(), path)
    return path


def following(err: str) -> list[str]:
    """The words of the command that the last line of a command names."""
    return shlex.split(re.findall(r"^next: seprune (.*)$", err, re.MULTILINE)[-1])


def test_each_step_ends_with_its_accuracy_and_the_command_that_comes_next(
    seprune, weights, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    status, out, err = seprune(
        *("prune", NET, "--checkpoint", weights, "--data", "digits", "--macs", "0.5", "--json"),
        *("--out", "small net", "--set", "collect.images=64", "--set", "plan.candidates=false"),
    )
    assert status == 0, err
    document = json.loads(out)
    assert "baseline" in err
    assert "refitted" in err
    small = measurement.read(Path("small net"))
    assert [m.stage for m in small.measurements] == ["baseline", "refitted"]
    evaluated = json.loads(seprune("evaluate", "small net", "--data", "digits", "--json")[1])
    assert small.measurements[1].metrics == evaluated["metrics"] == document["metrics_after"]
    assert read_metrics(Path("small net")) == evaluated["metrics"]
    assert small.measurements[1].macs == document["macs_after"]
    assert small.measurements[1].latency[0].median_ms > 0
    assert seprune("verify", "small net")[0] == 0

    words = following(err)
    assert words[:2] == ["finetune", "small net"]
    assert words[words.index("--teacher-checkpoint") + 1] == str(weights)
    status, out, err = seprune(*words, "--epochs", "1")
    assert status == 0, err
    tuned = measurement.read(Path("small net-tuned"))
    assert [m.stage for m in tuned.measurements] == ["baseline", "refitted", "fine-tuned"]
    assert tuned.measurements[:2] == small.measurements
    assert tuned.budgets[0].tuning["epochs"] == 1
    assert len(tuned.training[0].epochs) == 1

    assert following(err)[:2] == ["export", "small net-tuned"]
    status, out, _ = seprune("compare", "small net", "small net-tuned", "--json")
    assert status == 0
    rows = json.loads(out)["rows"]
    assert sorted(row["stage"] for row in rows) == ["baseline", "fine-tuned", "refitted"]
    assert seprune("report", "small net")[1].count("refitted") >= 1


@pytest.mark.parametrize(
    ("words", "said", "fix"),
    [
        (["--onnx", "a.onnx", "--int8"], "--int8 needs --data", "add --data FOLDER"),
        (["--onnx", "a.onnx", "--parent", NET], "--parent needs --int8", "add --int8"),
        (["--onnx", "a.onnx", "--parent-checkpoint", "F"], "-checkpoint needs --parent",
         "add --parent MODEL"),
        (["--pt2", "a.pt2", "--opset", "18"], "--opset needs --onnx", "add --onnx FILE"),
        (["--timm", "a", "--int8", "--data", "digits"], "nothing to export to", "--onnx FILE"),
    ],
)  # fmt: skip
def test_options_of_export_without_a_meaning_are_refused(seprune, tmp_path, words, said, fix):
    status, _, err = seprune("export", tmp_path, *words)
    assert status == 2
    assert said in err
    assert f"next: {fix}" in " ".join(err.split())
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_export_leaves_its_numbers_for_the_report(seprune, weights, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    status, _, err = seprune(
        *("prune", NET, "--checkpoint", weights, "--importance", "l2", "--macs", "0.5"),
        *("--out", "small"),
    )
    assert status == 0, err
    assert measurement.read(Path("small")).measurements[0].metrics == {}
    words = following(err)
    assert words == ["export", "small", "--onnx", "small.onnx"]
    for more in (["--data", "digits"], ["--pt2", "small.pt2"]):
        status, _, err = seprune(*words, *more)
        assert status == 0, err
        assert "preprocessing: 1x8x8" in err or more[0] != "--data"
        said = seprune("report", "small")[1]
        assert "on None" not in said
        assert "Metrics are of 359 images of digits." in said
    found = {a.file: a for a in measurement.read(Path("small")).artefacts}
    assert list(found) == [None, "small.onnx", "small.pt2"]
    for name in ("small.onnx", "small.pt2"):
        assert found[name].bytes == Path(name).stat().st_size
        assert all(ms > 0 for ms in found[name].median_ms.values())
    words = following(err)
    assert words == ["report", "small", "--html", "small.html"]
    assert seprune(*words)[0] == 0
    assert "small.pt2" in Path("small.html").read_text()
    assert "small.onnx" in seprune("report", "small")[1]


@pytest.fixture
def opened():
    """How often each PNG file is opened, down to a look at its first bytes."""
    counts: Counter[str] = Counter()
    counting = [True]

    def note(event, words):
        if counting and event == "open" and str(words[0]).endswith(".png"):
            counts[str(words[0])] += 1

    sys.addaudithook(note)  # cannot be taken away again
    yield counts
    counting.clear()


def test_prune_opens_the_images_that_it_needs_and_no_others(seprune, tmp_path, opened):
    torch.manual_seed(0)
    torch.save(build(NET, classes=2, input=(3, 8, 8)).state_dict(), tmp_path / "dense.pth")
    paths = {part: [] for part in ("train", "val")}
    for part, number in (("train", 1600), ("val", 24)):
        for name in "ab":
            (tmp_path / "data" / part / name).mkdir(parents=True)
        for n in range(number):
            path = tmp_path / "data" / part / "ab"[n % 2] / f"{n:04}.png"
            Image.fromarray(np.full((8, 8, 3), n % 256, np.uint8)).save(path)
            paths[part].append(str(path))
    words = ["--checkpoint", tmp_path / "dense.pth", "--data", tmp_path / "data", "--macs", "0.5",
             "--importance", "gate_mean", "--recover", "bn", "--out", tmp_path / "small",
             "--set", "collect.images=40", "--set", "plan.candidates=false"]  # fmt: skip
    opened.clear()
    status, _, err = seprune("prune", NET, *words)
    assert status == 0, err
    assert all(opened[p] for p in paths["val"])  # accuracy is of all of them
    # every third for the fingerprint, every seventh for the depth of its pixels, every hundredth
    # for the usual size, and the calibration set
    assert sum(opened[p] for p in paths["train"]) == 534 + 229 + 16 + 40


def test_a_network_without_a_report_is_named_with_what_measures_it(seprune, weights, tmp_path):
    import seprune as library

    library.save(library.build(NET, classes=10, input=(1, 8, 8)), tmp_path / "net")
    status, _, err = seprune("report", tmp_path / "net")
    assert status == 3
    assert "a network without a report" in err
    assert f"seprune evaluate {tmp_path / 'net'} --data FOLDER" in err
