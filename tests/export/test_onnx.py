"""Exported files: the same answers as the eager model, in a process that has no seprune."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import nets
import pytest
import torch
from torch import Tensor, nn

from seprune.data import open_data
from seprune.errors import EnvironmentFault, InputError, UsageError
from seprune.export import onnx as exporting
from seprune.export.architecture import Architecture
from seprune.export.artefacts import FileNetwork, measure_artefacts
from seprune.export.onnx import export_model
from seprune.export.pruned_model import load, save
from seprune.importance import Scoring, score
from seprune.models import build
from seprune.pruning.analyse import analyse
from seprune.pruning.prune import prune
from seprune.pruning.search import make_plan

SHAPE = (1, 8, 8)
NAME = "seprune/se_resnet8"


@pytest.fixture(scope="module")
def digits() -> Tensor:
    """Real images, preprocessed as for evaluation."""
    images, _ = next(iter(open_data("digits").reporting(7)))
    return images


@pytest.fixture(scope="module")
def pruned(tmp_path_factory: pytest.TempPathFactory) -> nn.Module:
    """A pruned network as a user has it: loaded from the folder it was saved to."""
    model = build(NAME).eval()
    structure = analyse(model, torch.zeros(2, *SHAPE))
    plan = make_plan(structure, score(structure, model=model, scoring=Scoring("l2")), macs=0.5)
    folder = tmp_path_factory.mktemp("pruned") / "small"
    save(prune(model, plan), folder, Architecture(NAME).cut(plan))
    return load(folder)


@pytest.fixture(scope="module")
def onnx_file(
    pruned: nn.Module, digits: Tensor, tmp_path_factory: pytest.TempPathFactory
) -> exporting.Exported:
    pytest.importorskip("onnxruntime", reason="the extra onnx is not installed")
    path = tmp_path_factory.mktemp("onnx") / "m.onnx"
    return export_model(pruned, SHAPE, path, opset=18, images=digits)


@pytest.fixture(scope="module")
def pt2_file(
    pruned: nn.Module, digits: Tensor, tmp_path_factory: pytest.TempPathFactory
) -> exporting.Exported:
    path = tmp_path_factory.mktemp("pt2") / "m.pt2"
    return export_model(pruned, SHAPE, path, format="pt2", images=digits)


RUN_ONNX = """
import sys
for name in ("seprune", "torch_pruning", "torch"):
    sys.modules[name] = None  # importing it now fails
import numpy, onnxruntime
session = onnxruntime.InferenceSession(sys.argv[1], providers=["CPUExecutionProvider"])
images = numpy.load(sys.argv[2])
numpy.save(sys.argv[3], session.run(None, {"images": images})[0])
"""
RUN_PT2 = """
import sys
for name in ("seprune", "torch_pruning"):
    sys.modules[name] = None
import numpy, torch
model = torch.export.load(sys.argv[1]).module()
images = torch.from_numpy(numpy.load(sys.argv[2]))
numpy.save(sys.argv[3], model(images).detach().numpy())
"""


@pytest.mark.parametrize(
    ("file", "script"),
    [("onnx_file", RUN_ONNX), pytest.param("pt2_file", RUN_PT2, marks=pytest.mark.slow)],
)
def test_the_file_runs_without_seprune(
    file: str, script: str, pruned: nn.Module, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    numpy = pytest.importorskip("numpy")
    made = request.getfixturevalue(file)
    images = torch.rand(3, *SHAPE)  # a batch size that was not compared when it was made
    numpy.save(tmp_path / "in.npy", images.numpy())
    arguments = [str(made.path), str(tmp_path / "in.npy"), str(tmp_path / "out.npy")]
    subprocess.run([sys.executable, "-c", script, *arguments], cwd=tmp_path, check=True)
    with torch.no_grad():
        expected = pruned(images)
    found = torch.from_numpy(numpy.load(tmp_path / "out.npy"))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("file", ["onnx_file", "pt2_file"])
def test_the_description_of_a_file(file: str, request: pytest.FixtureRequest) -> None:
    made = request.getfixturevalue(file)
    assert made.batches == (1, 2, 7)
    assert made.bytes == made.path.stat().st_size
    assert 0 <= made.max_error < 1e-4
    assert [p.name for p in made.path.parent.iterdir()] == [made.path.name]  # no data beside it
    assert str(Path(torch.__file__).parent).encode() not in made.path.read_bytes()


def test_opset_is_the_one_asked_for(onnx_file: exporting.Exported) -> None:
    onnx = pytest.importorskip("onnx", reason="the extra onnx is not installed")
    imports = onnx.load(onnx_file.path).opset_import
    assert [o.version for o in imports if not o.domain] == [onnx_file.opset] == [18]


def test_the_model_is_left_as_found(tmp_path: Path) -> None:
    model = nets.Residual().train()
    before = {n: t.clone() for n, t in model.state_dict().items()}
    export_model(model, (3, 16, 16), tmp_path / "m.pt2", format="pt2")
    assert all(m.training for m in model.modules())
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())


def test_latency_beside_the_eager_model(pruned: nn.Module, pt2_file: exporting.Exported) -> None:
    both = {"eager": pruned, "file": FileNetwork(pt2_file.path, "pt2")}
    eager, file = measure_artefacts(both, SHAPE, None)
    assert file.bytes == pt2_file.path.stat().st_size
    assert eager.bytes == sum(4 * p.numel() if p.is_floating_point() else 8 * p.numel()
                              for p in pruned.state_dict().values())  # fmt: skip
    assert eager.metrics is file.metrics is None
    assert all(t and t > 0 for one in (eager, file) for t in one.milliseconds.values())


class Counting(nn.Module):
    """Every answer is another one: what is exported is only the first."""

    calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return x.mean((2, 3)) * self.calls


class Deciding(nn.Module):
    """Looks at values, which no graph can."""

    def forward(self, x: Tensor) -> Tensor:
        return x.mean((2, 3)) if x.sum().item() > 0 else x.amax((2, 3))


def test_a_file_that_answers_differently_is_not_written(tmp_path: Path) -> None:
    path = tmp_path / "m.pt2"
    path.write_bytes(b"the previous one")
    with pytest.raises(InputError) as caught:
        export_model(Counting(), (3, 8, 8), path, format="pt2")
    assert str(path) in caught.value.what
    assert "at batch 1 it is off by 5.0e-01 of the largest output" in caught.value.why
    assert "0.001 is allowed" in caught.value.why
    assert "depends on nothing but its input" in caught.value.fix
    assert [p.name for p in tmp_path.iterdir()] == ["m.pt2"]
    assert path.read_bytes() == b"the previous one"


def test_outputs_that_are_not_finite(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Conv2d(3, 2, 1), nn.Flatten())
    nn.init.constant_(model[0].weight, float("nan"))
    with pytest.raises(InputError, match="at batch 1 it is off by nan"):
        export_model(model, (3, 4, 4), tmp_path / "m.pt2", format="pt2")
    assert not list(tmp_path.iterdir())


class Odd(nn.Module):
    """Takes batches of an even size only."""

    def forward(self, x: Tensor) -> Tensor:
        return x.reshape(-1, 2, *x.shape[1:]).mean((1, 3, 4))


def test_a_forward_that_decides_by_values(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(InputError) as caught:
        export_model(Deciding(), (3, 8, 8), tmp_path / "m.pt2", format="pt2")
    assert caught.value.what == "Deciding cannot be exported"
    assert caught.value.why == (
        "its forward decides by the values of tensors (a detector: which boxes stay), "
        "which no graph can hold"
    )
    assert (
        "seprune.export_model(seprune.load(DIR).backbone, (3, 320, 320), 'backbone.onnx')"
        in caught.value.fix
    )
    assert not list(tmp_path.iterdir())
    assert capfd.readouterr() == ("", "")


def test_a_network_that_runs_only_as_a_graph_is_not_exported(tmp_path: Path) -> None:
    """A norm in half precision between layers in single, as a folder from somebody may hold it."""
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)).eval()
    model[1].running_mean = torch.zeros(4, dtype=torch.float16)
    with pytest.raises(InputError, match="Sequential cannot be exported"):
        export_model(model, (3, 4, 4), tmp_path / "m.onnx")
    assert list(tmp_path.iterdir()) == []


def test_a_forward_that_does_not_take_any_batch(tmp_path: Path) -> None:
    with pytest.raises(InputError) as caught:
        export_model(Odd(), (3, 8, 8), tmp_path / "m.pt2", format="pt2")
    assert caught.value.what == "Odd cannot be exported"
    assert len(caught.value.why) <= 200
    assert "one batch of images" in caught.value.fix
    assert not list(tmp_path.iterdir())


SEGMENTERS = [
    "torchvision/lraspp_mobilenet_v3_large",
    "torchvision/deeplabv3_mobilenet_v3_large",
]
DETECTORS = [
    "seprune/se_resnet8_ssd",
    pytest.param("torchvision/fasterrcnn_mobilenet_v3_large_320_fpn", marks=pytest.mark.slow),
    pytest.param("torchvision/ssdlite320_mobilenet_v3_large", marks=pytest.mark.slow),
]


@pytest.mark.slow
@pytest.mark.parametrize("name", SEGMENTERS)
def test_a_segmenter_is_exported_with_all_that_it_says(name: str, tmp_path: Path) -> None:
    model = build(name).eval()
    assert list(model(torch.zeros(1, 3, 64, 64))) == ["out"]
    made = export_model(model, (3, 64, 64), tmp_path / "m.pt2", format="pt2")
    assert made.max_error < 1e-4


@pytest.mark.parametrize("name", DETECTORS)
def test_a_detector_says_that_its_backbone_can_be_exported(name: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"which boxes stay.*\n.*\.backbone"):
        export_model(build(name).eval(), (3, 64, 64), tmp_path / "m.pt2", format="pt2")
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
@pytest.mark.parametrize("name", ["lraspp", "deeplabv3", "ssdlite320", "fasterrcnn"])
def test_segmenters_and_backbones_of_detectors_as_onnx(name: str, tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime", reason="the extra onnx is not installed")
    rest = "_320_fpn" if name == "fasterrcnn" else ""
    model = build(f"torchvision/{name}_mobilenet_v3_large{rest}").eval()
    part = model.backbone if name in ("ssdlite320", "fasterrcnn") else model
    made = export_model(part, (3, 64, 64), tmp_path / "m.onnx")
    assert made.batches == (1, 2, 5)
    assert made.max_error < 1e-3


def test_missing_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(EnvironmentFault) as caught:
        export_model(nets.Inner(), (3, 16, 16), tmp_path / "m.onnx")
    assert caught.value.what == "ONNX export needs packages that are not installed"
    assert "onnxruntime" in caught.value.why
    assert caught.value.fix == "pip install 'seprune[onnx]'"


def test_too_large_for_one_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("onnx", reason="the extra onnx is not installed")
    monkeypatch.setattr(exporting, "LARGEST_ONNX", 100)
    with pytest.raises(InputError, match=r"too large for one ONNX file: 2,\d\d\d bytes") as caught:
        export_model(nets.Inner(), (3, 16, 16), tmp_path / "m.onnx")
    assert caught.value.fix == "--pt2 FILE"


def test_unknown_format(tmp_path: Path) -> None:
    unknown: Any = "tflite"
    with pytest.raises(UsageError, match="unknown export format 'tflite'") as caught:
        export_model(nets.Inner(), (3, 16, 16), tmp_path / "m", format=unknown)
    assert caught.value.why == "known: onnx, pt2"
