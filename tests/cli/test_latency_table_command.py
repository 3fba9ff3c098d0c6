"""`seprune latency-table`: build, show, export, with a timer of exact values."""

from __future__ import annotations

import json
import sys

import pytest

from seprune.measure.latency_table import LatencyTable

NET = "seprune/se_resnet8"
SIZE = ("--input", "3x32x32")


@pytest.fixture
def seprune(seprune, monkeypatch, tmp_path):
    """Run `seprune latency-table` with a cache folder of its own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(
        "seprune.measure.latency_model.timer_of", lambda key: lambda op: op.outputs / 64
    )
    return lambda *words: seprune("latency-table", *words)


def test_a_table_is_built_shown_exported_and_adopted(seprune, tmp_path, monkeypatch):
    assert seprune("show")[2] == "no table yet: seprune latency-table build MODEL --runtime onnx\n"
    built = json.loads(seprune("build", NET, *SIZE, "--batch", 4, "--json")[1])
    times = LatencyTable.load(tmp_path / built["file"]).times
    assert times["conv 3>16 32x32 k3x3 s1x1 p1x1 g1"] == 16 / 64
    assert sum(built["operators"].values()) == len(times)
    assert (built["runtime"], built["batch"]) == ("eager", 4)
    assert f"batch 4, float32: {len(times)} operators\n  {built['file']}" in seprune("show")[1]
    assert seprune("export", "table.json", "--batch", 4)[0] == 0
    lines = seprune("show", "table.json")[1].splitlines()
    assert lines[2].split()[:3] == ["1.0000", "ms", "conv"]
    assert json.loads(seprune("show", "table.json", "--json")[1])["times"] == times

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "other"))
    monkeypatch.setattr("seprune.measure.latency_model.timer_of", lambda key: pytest.fail)
    again = json.loads(
        seprune("build", NET, *SIZE, "--batch", 4, "--table", "table.json", "--json")[1]
    )
    assert again == {**built, "file": again["file"]}
    assert "other" in again["file"]


def test_a_table_of_another_version_is_measured_anew(seprune, tmp_path):
    built = json.loads(seprune("build", NET, "--json")[1])
    content = json.loads((tmp_path / built["file"]).read_text())
    content["key"]["version"] = "0.1"
    content["times"] = dict.fromkeys(content["times"], 7.0)
    (tmp_path / "old.json").write_text(json.dumps(content))
    status, out, err = seprune("build", NET, "--table", "old.json", "--json")
    assert status == 0
    version = built["version"]
    assert f"note: old.json is of version 0.1 instead of {version}: measured anew" in err
    assert json.loads(out) == built


@pytest.mark.parametrize(
    ("words", "status", "what", "fix"),
    [
        (["build", NET, "--runtime", "tflite"], 2,
         "must be 'eager', 'compiled', 'onnx' or 'openvino'", ""),
        (["build", NET, "--table", "no.json"], 3, "no.json: no such file",
         "seprune latency-table export no.json"),
        (["export", "x.json"], 3, "there is no latency table of eager at batch 1",
         "seprune latency-table build MODEL --runtime eager --batch 1"),
        (["export", "x.json", "--runtime", "tflite"], 2, "unknown runtime 'tflite'",
         "--runtime eager"),
        (["show", "no.json"], 3, "no.json: no such file", "check the path"),
    ],
)  # fmt: skip
def test_faults_say_what_to_type_next(seprune, words, status, what, fix):
    got, out, err = seprune(*words)
    assert (got, out) == (status, "")
    assert what in err
    assert fix in err.partition(" next: ")[2]


def test_a_runtime_that_is_not_installed_names_its_extra(seprune, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    status, _, err = seprune("build", NET, "--runtime", "onnx")
    assert status == 4
    assert "the runtime 'onnx' is not installed" in err
    assert "pip install 'seprune[onnx]', or choose --runtime eager" in err
