"""timm's own pruned format: read by timm, where seprune cannot be imported."""

from __future__ import annotations

import sys
from typing import Any

import pytest
import torch
from cutting import random_plan

import seprune
from seprune.errors import InputError, UsageError
from seprune.export.architecture import architecture_of
from seprune.export.timm_format import export_timm

pytest.importorskip("timm", reason="the extra timm is not installed")


def cut(name: str, shape: tuple[int, int, int], **arguments):
    torch.manual_seed(0)
    model = seprune.build(name, classes=7, input=shape, **arguments).eval()
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.uniform_(-0.2, 0.2)
            module.running_var.uniform_(0.5, 2)
    plan = random_plan(seprune.analyse(model, torch.rand(2, *shape)), share=0.4)
    return seprune.prune(model, plan).eval()


@pytest.mark.parametrize(
    ("name", "shape", "arguments"),
    [
        ("timm/seresnet18", (3, 32, 32), {"channels": (16, 32, 64, 128)}),
        pytest.param("timm/test_efficientnet", (1, 32, 32), {}, marks=pytest.mark.slow),
        pytest.param("timm/mobilenetv3_small_050", (3, 64, 64), {}, marks=pytest.mark.slow),
        pytest.param("timm/seresnet50", (3, 64, 64), {}, marks=pytest.mark.slow),
        pytest.param("timm/efficientnet_b0", (3, 64, 64), {}, marks=pytest.mark.slow),
    ],
)
def test_timm_alone_gives_the_same_answers(name, shape, arguments, tmp_path, monkeypatch):
    small = cut(name, shape, **arguments)
    *_, code = export_timm(small, architecture_of(small), tmp_path)
    images = torch.randn(3, *shape)
    monkeypatch.chdir(tmp_path)
    for module in [m for m in sys.modules if m.partition(".")[0] == "seprune"]:
        monkeypatch.setitem(sys.modules, module, None)  # importing it now fails
    names: dict[str, Any] = {}
    exec(code.read_text(), names)
    with torch.no_grad():
        answer, expected = names["model"].eval()(images), small(images)
    assert torch.allclose(answer, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.slow
def test_what_the_format_cannot_say_is_refused_and_leaves_nothing(tmp_path):
    small = cut("timm/seresnext26t_32x4d", (3, 32, 32))  # groups of several channels
    with pytest.raises(InputError, match="timm's format cannot say this network"):
        export_timm(small, architecture_of(small), tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_network_of_another_library_is_refused_and_leaves_nothing(tmp_path):
    other = seprune.build("seprune/se_resnet8", classes=7)
    with pytest.raises(UsageError, match=r"no network of timm's"):
        export_timm(other, architecture_of(other), tmp_path)
    assert list(tmp_path.iterdir()) == []
