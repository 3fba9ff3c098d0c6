"""The recipes for ImageNet folders, on a few images of noise and random weights, up to a plan."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from seprune.pipeline.run import run
from seprune.pruning.plan import PruningPlan
from seprune.recipe import load_recipe, recipe_folder

NAMES = sorted(p.stem for p in recipe_folder().glob("imagenet-*.yaml"))
FEW = (
    "model.classes=2",
    "model.input=[3,64,64]",
    "device=cpu",
    "data.workers=0",
    "collect.images=8",
    "collect.batch_size=4",
    "plan.macs=0.7",
    "prune.recover=none",
    "finetune.epochs=0",
    "finetune.recalibrate=0",
    "report.latency=false",
    "report.html=false",
)


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    root, chance = tmp_path_factory.mktemp("images"), np.random.default_rng(0)
    for part, number in (("train", 12), ("val", 2)):
        for name in ("cat", "dog"):
            folder = root / part / name
            folder.mkdir(parents=True)
            for n in range(number):
                pixels = chance.integers(0, 256, (72, 80, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / f"{n}.jpg")
    return root


def test_there_is_one_for_each_common_network():
    assert NAMES == [
        "imagenet-efficientnet",
        "imagenet-mobilenetv3",
        "imagenet-regnety",
        "imagenet-seresnet50",
    ]


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_the_recipe_reaches_a_plan(name, images, tmp_path):
    recipe = load_recipe(name, [*FEW, f"data.source={images}"])
    if recipe.model.name.startswith("timm/"):
        pytest.importorskip("timm", reason="the extra timm is not installed")
    report = run(recipe, tmp_path)
    plan = PruningPlan.load(tmp_path / "plan.json")
    base, pruned = report.measurements[:2]
    assert plan.facts["criterion"] == "gate_logit"
    assert 0.6 * base.macs <= pruned.macs <= 0.7 * base.macs
    assert any(len(g.keep) < g.units for g in plan.groups)
    assert report.gates
