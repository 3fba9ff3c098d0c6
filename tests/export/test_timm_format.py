"""timm's own pruned format: read by timm, in a process without seprune."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from cutting import random_plan
from safetensors.torch import load_file, save_file

import seprune
from seprune.errors import InputError, UsageError
from seprune.export.architecture import architecture_of
from seprune.export.timm_format import export_timm

pytest.importorskip("timm", reason="the extra timm is not installed")

ALONE = """
import sys
exec(open(sys.argv[1]).read())
import torch
from safetensors.torch import load_file, save_file
with torch.no_grad():
    save_file({"out": model.eval()(load_file("images.safetensors")["images"])}, "out.safetensors")
assert "seprune" not in sys.modules
"""


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
def test_timm_alone_gives_the_same_answers(name, shape, arguments, tmp_path):
    small = cut(name, shape, **arguments)
    *_, code = export_timm(small, architecture_of(small), tmp_path)
    images = torch.randn(3, *shape)
    save_file({"images": images}, tmp_path / "images.safetensors")
    command = [sys.executable, "-I", "-c", ALONE, code.name]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    with torch.no_grad():
        expected = small(images)
    answer = load_file(tmp_path / "out.safetensors")["out"]
    assert torch.allclose(answer, expected, rtol=1e-5, atol=1e-6)


def test_what_the_format_cannot_say_is_refused_and_leaves_nothing(tmp_path):
    small = cut("timm/seresnext26t_32x4d", (3, 32, 32))  # groups of several channels
    with pytest.raises(InputError, match="timm's format cannot say this network"):
        export_timm(small, architecture_of(small), tmp_path)
    other = seprune.build("seprune/se_resnet8", classes=7)
    with pytest.raises(UsageError, match=r"no network of timm's"):
        export_timm(other, architecture_of(other), tmp_path)
    assert list(tmp_path.iterdir()) == []
