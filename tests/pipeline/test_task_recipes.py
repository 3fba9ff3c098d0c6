"""The recipes on drawn shapes: valid, offline, and a detector that learns."""

from __future__ import annotations

import json

import pytest

from seprune.data import shapes
from seprune.errors import InputError
from seprune.models import build
from seprune.pipeline.inputs import open_both
from seprune.pipeline.run import run
from seprune.recipe import load_recipe

RECIPES = {"shapes-segmentation": "miou", "shapes-detection": "map"}
SMALL = (
    "train.epochs=1", "train.batch_size=8", "data.batch_size=8", "data.validation=0.25",
    "collect.images=16", "collect.batch_size=8", "finetune.epochs=1", "finetune.batch_size=8",
    "finetune.recalibrate=8", "report.latency=false", "device=cpu", "threads=1",
)  # fmt: skip


@pytest.mark.parametrize("name", RECIPES)
def test_the_shapes_recipes_need_nothing_but_the_package(name):
    recipe = load_recipe(name)
    assert (recipe.data.source, recipe.model.checkpoint) == ("shapes", None)
    assert recipe.task == name.removeprefix("shapes-")
    assert recipe.train is not None
    assert build(recipe.model.name, classes=5) is not None


def test_a_detector_for_fewer_classes_than_the_boxes_have_is_refused_before_any_work(few_shapes):
    recipe = load_recipe("shapes-detection", ("model.classes=3",))
    with pytest.raises(InputError, match="has 3 outputs, the data have 5 classes") as caught:
        open_both(recipe)
    assert caught.value.code == "classes"
    assert caught.value.fix.endswith("or --classes 5")
    network, _ = open_both(load_recipe("shapes-detection", ("model.classes=7",)))
    assert network.architecture.classes == 7


@pytest.fixture
def few_shapes(monkeypatch):
    monkeypatch.setattr(shapes, "TRAIN", 32)
    monkeypatch.setattr(shapes, "VAL", 8)


@pytest.mark.slow
@pytest.mark.usefixtures("few_shapes")
@pytest.mark.parametrize("name", RECIPES)
def test_a_shapes_recipe_goes_from_training_to_the_report(name, tmp_path):
    pytest.importorskip("torchmetrics", reason="the extra tasks is not installed")
    pytest.importorskip("pycocotools", reason="the extra tasks is not installed")
    report = run(load_recipe(name, SMALL), tmp_path)
    stages = [m.stage for m in report.measurements]
    assert stages == ["baseline", "pruned", "refitted", "fine-tuned"]
    assert report.metric == RECIPES[name]
    assert 0.4 < report.measurements[1].macs / report.measurements[0].macs <= 0.5
    page = (tmp_path / "report.html").read_text()
    assert "against MACs" in page
    warned = [w for w in report.warnings if "without a teacher" in w]
    assert len(warned) == (name == "shapes-detection")
    losses = [json.loads(line) for line in (tmp_path / "trained/metrics.jsonl").open()]
    assert losses[0][RECIPES[name]] is not None


@pytest.mark.slow
def test_the_detector_of_the_recipe_learns_in_four_epochs(tmp_path):
    pytest.importorskip("pycocotools", reason="the extra tasks is not installed")
    over = (
        *("train.epochs=4", "finetune.epochs=1", "report.latency=false"),
        *("threads=1", "device=cpu"),
    )
    report = run(load_recipe("shapes-detection", over), tmp_path)
    dense, _, refitted, tuned = report.measurements
    assert dense.metrics["map50"] > 0.3  # 0.39 measured; 0.01 before training
    assert refitted.metrics["map50"] > 0.5 * dense.metrics["map50"]
    assert tuned.metrics["map50"] > 0.5 * dense.metrics["map50"]
