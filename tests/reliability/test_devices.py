"""No GPU where one was asked for; torch and torchvision that do not fit; missing extras."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import torch
from child import ROOT
from corpus import NET
from folders import stages
from terminal import Ended

pytestmark = pytest.mark.fault(26)
OTHER_PAIR = 'raise RuntimeError("operator torchvision::nms does not exist")\n'
PIP = "pip install --upgrade --force-reinstall torch torchvision"
FORGET = """
import sys
for name in [n for n in sys.modules if n.partition(".")[0] == "torchvision"]:
    del sys.modules[name]
sys.path.insert(0, {!r})
"""
without_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")


@without_gpu
@pytest.mark.parametrize("door", ["run", "evaluate", "prune"])
@pytest.mark.parametrize("device", ["cuda", "cuda:1", "mps"])
def test_a_device_that_is_not_there_is_found_before_any_work(terminal, tmp_path, door, device):
    words = {
        "run": ["run", "quickstart", f"device={device}", "--out", tmp_path / "run"],
        "evaluate": ["evaluate", NET, "--data", "digits", "--device", device],
        "prune": ["prune", NET, "--data", "digits", "--device", device, "--out", tmp_path / "p"],
    }[door]
    error = terminal(*words, "--json").refused(4, "environment", says=f"device '{device}'")
    assert error["next"] == "use device auto or cpu, or see: seprune env"
    assert stages(tmp_path / "run") == []
    assert not (tmp_path / "p").exists()


@without_gpu
def test_auto_takes_the_cpu_and_says_so(terminal):
    ended = terminal("evaluate", NET, "--data", "digits")
    assert ended.status == 0
    assert "note: there is no GPU here, so device auto is the CPU" in ended.err
    ended = terminal("evaluate", NET, "--data", "digits", "--device", "cpu")
    assert "GPU" not in ended.err


@pytest.fixture
def broken(tmp_path) -> str:
    """A folder with a torchvision that was built for another torch."""
    (tmp_path / "torchvision").mkdir()
    (tmp_path / "torchvision" / "__init__.py").write_text(OTHER_PAIR)
    return str(tmp_path)


def test_env_names_the_pair_and_the_pip_line(terminal, broken):
    ended = terminal("env", "--json", before=FORGET.format(broken))
    assert ended.status == 0, ended.err
    pair = json.loads(ended.out)["pair"]
    assert not pair["fits"]
    assert pair["reason"] == "operator torchvision::nms does not exist"
    assert pair["install"] == PIP
    output = terminal("env", before=FORGET.format(broken)).out
    assert f"do not fit ({pair['reason']})" in output
    assert PIP in output
    good = json.loads(terminal("env", "--json").out)
    assert good["pair"] == {**good["pair"], "fits": True, "reason": None, "install": None}
    assert good["disk_free"] > 0
    assert good["devices"][0]["device"] == "cpu"


def test_a_pair_that_does_not_fit_stops_every_command_with_the_pip_line(broken):
    environment = {**os.environ, "PYTHONPATH": f"{broken}:{ROOT}", "NO_COLOR": "1"}
    command = [sys.executable, "-m", "seprune", "evaluate", NET, "--data", "digits", "--json"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    error = Ended(done.returncode, done.stdout, done.stderr).refused(4, "environment")
    assert "do not fit each other" in error["what"]
    assert error["next"].startswith(PIP)


def test_env_says_what_to_type_for_a_missing_extra(terminal):
    hide = (
        "import importlib.metadata as m\n"
        "def version(name, real=m.version):\n"
        "    if name == 'onnxruntime':\n        raise m.PackageNotFoundError(name)\n"
        "    return real(name)\n"
        "m.version = version\n"
    )
    ended = terminal("env", before=hide)
    assert "pip install 'seprune[onnx]'" in ended.out
    extras = json.loads(terminal("env", "--json", before=hide).out)["extras"]
    assert extras["onnx"]["install"] == "pip install 'seprune[onnx]'"
    assert extras["timm"]["install"] is None
