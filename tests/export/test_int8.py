"""int8 files: scales by hand, answers near the float file's, measured as numpy measures them."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from seprune import cli
from seprune.data import open_data
from seprune.errors import InputError
from seprune.export.artefacts import measure_artefacts, run_alone
from seprune.export.int8 import int8_path, quantize
from seprune.export.onnx import export_model, open_exported, open_onnx
from seprune.export.pruned_model import save
from seprune.export.pt2e import quantize_pt2
from seprune.models import build
from seprune.models.preprocessing import TrainedFor, remember_training

onnx = pytest.importorskip("onnx")
ort = pytest.importorskip("onnxruntime")
SHAPE = (1, 8, 8)


@pytest.fixture(scope="module")
def data():
    return open_data("digits")


@pytest.fixture(scope="module")
def network(data) -> nn.Module:
    torch.manual_seed(0)
    model = build("seprune/se_resnet8", classes=10, input=SHAPE)
    with torch.no_grad():
        for images, _ in data.calibration(256):
            model(images)  # BatchNorm of these images, so that activations have a size
    known = TrainedFor(data.info.preprocessing, "classification", data.info.classes)
    return remember_training(model.eval(), known)


@pytest.fixture(scope="module")
def files(network, data, tmp_path_factory) -> tuple[Path, Path]:
    path = tmp_path_factory.mktemp("int8") / "net.onnx"
    export_model(network, SHAPE, path)
    batches = (images for images, _ in data.calibration(256, batch_size=32))
    assert quantize(path, int8_path(path), batches) == int8_path(path).stat().st_size
    return path, int8_path(path)


def test_weights_have_a_scale_for_every_channel(files):
    """In closed form: the largest absolute weight of an output channel becomes 127."""
    float_file, int8_file = map(onnx.load, map(str, files))
    weights = {i.name: onnx.numpy_helper.to_array(i) for i in float_file.graph.initializer}
    small = {i.name: onnx.numpy_helper.to_array(i) for i in int8_file.graph.initializer}
    checked = 0
    for name, weight in weights.items():
        if weight.ndim != 4 or f"{name}_scale" not in small:
            continue
        scales, values = small[f"{name}_scale"], small[f"{name}_quantized"]
        largest = np.abs(weight).reshape(len(weight), -1).max(1)
        assert values.dtype == np.int8
        assert scales == pytest.approx(largest / 127, rel=0.01)
        back = values * scales[:, None, None, None]
        assert np.abs(back - weight).max() <= scales.max() * 0.51
        checked += 1
    assert checked > 5


def test_answers_are_near_those_of_the_float_file(files, data):
    images = torch.cat([x for x, _ in data.reporting(64)])
    exact, rough = (open_onnx(path)(images)[0] for path in files)
    error = (exact - rough).norm() / exact.norm()
    assert 0 < float(error) < 0.1
    assert files[1].stat().st_size < 0.6 * files[0].stat().st_size
    assert open_onnx(files[1])(images[:1])[0].shape == (1, 10)  # the batch is free


def test_metadata_go_along(files):
    about = [{p.key: p.value for p in onnx.load(str(f)).metadata_props} for f in files]
    assert about[1].pop("quantization") == "int8 QDQ, per channel"
    assert about[0] == about[1]
    assert json.loads(about[1]["labels"]) == list("0123456789")


def test_it_runs_where_there_is_no_seprune_and_a_broken_file_is_named(files, data, tmp_path):
    images = next(iter(data.reporting(3)))[0]
    run_alone(files[1], images)
    wide = tmp_path / "wide.onnx"
    made = onnx.load(str(files[1]))
    made.graph.input[0].type.tensor_type.shape.dim[0].dim_value = 1  # no longer free
    onnx.save(made, str(wide))
    with pytest.raises(InputError, match="does not run by itself") as caught:
        run_alone(wide, images)
    assert caught.value.code == "export-mismatch"


def test_alone_it_finds_packages_of_pythonpath_and_nothing_in_the_working_folder(
    files, data, tmp_path, monkeypatch
):
    packages, here = tmp_path / "packages", tmp_path / "here"
    for folder in (packages, here):
        folder.mkdir()
    (packages / "sitecustomize.py").write_text(f"open({str(tmp_path / 'found')!r}, 'w').close()\n")
    (here / "random.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w').close()\n")
    monkeypatch.chdir(here)
    monkeypatch.setenv("PYTHONPATH", f"{packages}:")  # the empty entry is the working folder
    run_alone(files[1], next(iter(data.reporting(3)))[0])
    assert (tmp_path / "found").exists()
    assert not (tmp_path / "ran").exists()


def test_files_are_measured_as_numpy_measures_them(files, data):
    found = measure_artefacts({"float": files[0], "int8": files[1]}, SHAPE, data.reporting())
    for artefact, path in zip(found, files):
        session = ort.InferenceSession(str(path), providers=["CPUExecutionProvider"])
        assert [session.get_inputs()[0].shape[0], session.get_outputs()[0].shape[0]] == [
            "batch"
        ] * 2
        right = 0
        for images, labels in data.reporting():
            out = session.run(None, {session.get_inputs()[0].name: images.numpy()})[0]
            right += int((out.argmax(1) == labels.numpy()).sum())
        assert artefact.metrics["top1"] == pytest.approx(right / data.info.reporting)
        assert artefact.bytes == path.stat().st_size
        assert all(value and value > 0 for value in artefact.milliseconds.values())


def test_int8_needs_images(monkeypatch, capsys):
    for words in (["--onnx", "m.onnx"], ["--pt2", "m.pt2"]):
        monkeypatch.setattr(sys, "argv", ["seprune", "export", "small", "--int8", *words])
        with pytest.raises(SystemExit) as stop:
            cli.main()
        assert stop.value.code == 2
        assert "--int8 needs --data" in capsys.readouterr().err


@pytest.fixture(scope="module")
def pt2(network, data, tmp_path_factory) -> Path:
    pytest.importorskip("torchao", reason="torchao is not installed")
    path = tmp_path_factory.mktemp("pt2e") / "net.int8.pt2"
    batches = (images for images, _ in data.calibration(256, batch_size=32))
    assert quantize_pt2(network, SHAPE, path, batches) == path.stat().st_size
    return path


@pytest.mark.slow
def test_pt2e_weights_have_a_scale_for_every_channel(pt2, network):
    """Closed form, with BatchNorm folded by hand: the largest weight of a channel is 127."""
    importlib.import_module("torch.ao.quantization.fx._decomposed")
    made = torch.export.load(pt2).module()
    eights = [t for t in (*made.parameters(), *made.buffers()) if t.dtype == torch.int8]
    layers = [m for m in network.modules() if isinstance(m, (nn.Conv2d, nn.Linear))]
    assert len(eights) == len(layers)
    by_shape = {tuple(t.shape): t for t in eights}
    first = network.conv1.weight / (network.bn1.running_var + network.bn1.eps).sqrt()[
        :, None, None, None
    ] * network.bn1.weight[:, None, None, None]  # fmt: skip
    scale = first.flatten(1).abs().amax(1) / 127
    wanted = (first / scale[:, None, None, None]).round().to(torch.int8)
    assert (by_shape[tuple(first.shape)].int() - wanted.int()).abs().max() <= 1


@pytest.mark.slow
def test_pt2e_answers_are_near_and_the_file_is_small_and_by_itself(
    pt2, files, network, data, tmp_path
):
    images = torch.cat([x for x, _ in data.reporting(64)])
    run = open_exported(pt2, "pt2")
    with torch.no_grad():
        exact = network(images)
    error = (exact - run(images)[0]).norm() / exact.norm()
    assert 0 < float(error) < 0.1
    export_model(network, SHAPE, tmp_path / "net.pt2", format="pt2")
    assert pt2.stat().st_size < 0.8 * (tmp_path / "net.pt2").stat().st_size
    assert run(images[:1])[0].shape == (1, 10)  # the batch is free
    run_alone(pt2, images[:3], "pt2")  # without seprune and torchao
    about = dict.fromkeys(("labels.txt", "quantization.txt", "preprocessing.txt"), "")
    torch.export.load(pt2, extra_files=about)
    assert about["quantization.txt"] == "int8 PT2E"
    assert json.loads(about["labels.txt"]) == list("0123456789")


@pytest.mark.slow
def test_both_ways_stand_side_by_side(network, tmp_path, seprune):
    pytest.importorskip("torchao", reason="torchao is not installed")
    save(network, tmp_path / "small")
    words = ("--onnx", tmp_path / "m.onnx", "--pt2", tmp_path / "m.pt2", "--int8")
    status, out, err = seprune("export", tmp_path / "small", *words, "--data", "digits", "--json")
    assert status == 0, err
    found = json.loads(out)
    assert found["int8_pt2"]["file"] == str(tmp_path / "m.int8.pt2")
    names = [a["name"] for a in found["int8_pt2"]["artefacts"]]
    assert names == ["pruned fp32, torch.export", "pruned int8, torch.export"]
    full, small = (a["metrics"]["top1"] for a in found["int8_pt2"]["artefacts"])
    assert full == found["int8"]["artefacts"][0]["metrics"]["top1"]  # the same weights
    assert abs(full - small) < 0.05
    left = {path.name for path in tmp_path.iterdir()}
    assert {"m.onnx", "m.int8.onnx", "m.pt2", "m.int8.pt2"} <= left


@pytest.mark.slow
def test_the_command_writes_measures_and_compares_with_the_parent(
    network, tmp_path, monkeypatch, capsys
):
    save(network, tmp_path / "small")
    torch.save(network.state_dict(), tmp_path / "dense.pth")

    def call(*words: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["seprune", "export", *map(str, words)])
        with pytest.raises(SystemExit) as stop:
            cli.main()
        output = capsys.readouterr()
        return int(stop.value.code or 0), output.out, " ".join(output.err.split())  # type: ignore[arg-type]

    onto = ("--onnx", tmp_path / "m.onnx", "--int8")
    parent = ("--parent", "seprune/se_resnet8", "--parent-checkpoint", tmp_path / "dense.pth")
    status, out, err = call(tmp_path / "small", *onto, "--data", "digits", *parent, "--json")
    assert status == 0, err
    found = json.loads(out)["int8"]
    assert found["file"] == str(tmp_path / "m.int8.onnx")
    names = [a["name"] for a in found["artefacts"]]
    assert names == ["dense fp32", "dense int8", "pruned fp32", "pruned int8"]
    dense, _, pruned, _ = (a["metrics"]["top1"] for a in found["artefacts"])
    assert dense == pruned  # the same weights
    assert "The network and its" in err
    assert {p.name for p in tmp_path.iterdir()} == {"small", "dense.pth", "m.onnx", "m.int8.onnx"}
