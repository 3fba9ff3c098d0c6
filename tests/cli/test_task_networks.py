"""Segmenters and detectors of torchvision and the extra smp, from the command line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from seprune import models
from seprune.data import shapes
from seprune.recipe import load_recipe

RECIPES = {
    "segmentation-lraspp": "miou",
    "segmentation-deeplabv3": "miou",
    "segmentation-unet": "miou",
    "detection-ssdlite": "map",
    "detection-fasterrcnn": "map",
}
SMALL = (  # of a recipe, so that everything is seen once
    "collect.images=8", "collect.batch_size=4", "data.batch_size=4", "data.workers=0",
    "finetune.epochs=1", "finetune.batch_size=4", "finetune.recalibrate=4", "finetune.lr=1e-4",
    "plan.macs=0.7", "plan.candidates=false", "data.validation=0.25", "report.latency=false",
    "device=cpu", "threads=1",
)  # fmt: skip


def needs(name: str) -> None:
    if name.startswith("smp/"):
        pytest.importorskip("segmentation_models_pytorch", reason="the extra smp is not installed")


@pytest.mark.parametrize("name", RECIPES)
def test_the_network_of_every_recipe_is_built_for_the_classes_of_the_data(name):
    recipe = load_recipe(name)
    needs(recipe.model.name)
    with torch.device("meta"):
        sizes = [
            sum(p.numel() for p in models.build(recipe.model.name, classes=n).parameters())
            for n in (3, 4)
        ]
    assert recipe.task == name.partition("-")[0]
    assert 0 < sizes[1] - sizes[0] < 0.01 * sizes[0]


@pytest.mark.slow
@pytest.mark.parametrize("name", RECIPES)
def test_every_network_goes_from_a_checkpoint_to_a_report(name, seprune, monkeypatch, tmp_path):
    pytest.importorskip("torchmetrics", reason="the extra tasks is not installed")
    pytest.importorskip("pycocotools", reason="the extra tasks is not installed")
    recipe = load_recipe(name)
    needs(recipe.model.name)
    monkeypatch.setattr(shapes, "TRAIN", 16)
    monkeypatch.setattr(shapes, "VAL", 4)
    torch.manual_seed(0)
    checkpoint = tmp_path / "trained.pth"
    torch.save(models.build(recipe.model.name, classes=5).state_dict(), checkpoint)
    data = ("--data", "shapes", "--task", recipe.task)
    work = ("--set", "data.batch_size=4", "--set", "data.workers=0", "--set", "threads=1")
    small, tuned = tmp_path / "small", tmp_path / "tuned"

    _, text, _ = succeeds(
        seprune, "prune", recipe.model.name, "--checkpoint", checkpoint, *data, *work,
        "--input", "3x64x64", "--macs", "0.7", "--set", "plan.candidates=false",
        "--set", "collect.images=8", "--out", small, "--json",
    )  # fmt: skip
    result = json.loads(text)
    assert 0.55 < result["macs_after"] / result["macs_before"] <= 0.7
    _, text, _ = succeeds(
        seprune, "finetune", small, *data, *work, "--set", "finetune.batch_size=4",
        "--set", "finetune.recalibrate=4", "--lr", "1e-4", "--epochs", "1", "--out", tuned,
        "--json",
    )  # fmt: skip
    assert json.loads(text)["metric"] == RECIPES[name]
    _, text, _ = succeeds(seprune, "evaluate", tuned, *data, *work, "--json")
    found = json.loads(text)
    assert found["task"] == recipe.task
    assert 0 <= found["metrics"][RECIPES[name]] <= 1
    assert found["count"] == 4
    exported(seprune, tuned, recipe.task, tmp_path)

    out = tmp_path / "run"
    over = ["data.source=shapes", f"model.checkpoint={checkpoint}", "model.input=[3, 64, 64]",
            "model.classes=5", *SMALL]  # fmt: skip
    succeeds(seprune, "run", name, *over, "--out", out)
    _, text, _ = succeeds(seprune, "report", out, "--json")
    stages = json.loads(text)["measurements"]
    assert [m["stage"] for m in stages] == ["baseline", "pruned", "refitted", "fine-tuned"]
    assert {m["metric"] for m in stages} == {RECIPES[name]}
    assert (out / "report.html").stat().st_size > 100_000


def succeeds(seprune, *words):
    status, text, err = seprune(*words)
    assert status == 0, f"{' '.join(map(str, words))}\n{err[-3000:]}"
    return status, text, err


def exported(seprune, folder: Path, task: str, home: Path) -> None:
    """A segmenter as ONNX; a detector is refused in words."""
    pytest.importorskip("onnxruntime", reason="the extra onnx is not installed")
    status, _, err = seprune("export", folder, "--onnx", home / "net.onnx")
    if task == "segmentation":
        assert status == 0, err
        assert (home / "net.onnx").stat().st_size > 100_000
    else:
        assert status == 3, err
        assert "a detector" in err
