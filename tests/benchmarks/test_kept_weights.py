"""The networks kept for the benchmarks: whole, small, loadable, and as good as they say."""

from __future__ import annotations

import hashlib
import os
import re
from pathlib import Path

import kept_weights
import pytest
import torch
from kept_weights import NETWORKS
from rivals import MEAN, STD
from safetensors.torch import load_file, save_file

from seprune.data import DataSettings, open_data
from seprune.measure.metrics import evaluate
from seprune.pipeline.network import LoadedNetwork, open_network
from seprune.recipe.sections import ModelSection

CIFAR10 = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "seprune" / "cifar10"
ROW = re.compile(r"^\| `(\w+)-cifar10\.safetensors` \|.*\| ([\d.]+) % \| `(\w{64})` \|$", re.M)
SAID = {
    name: (float(top1), digest)
    for name, top1, digest in ROW.findall((kept_weights.FOLDER / "README.md").read_text())
}


def opened(network: str) -> LoadedNetwork:
    name, side = NETWORKS[network]
    path, shape = kept_weights.kept(network), (3, side, side)
    section = ModelSection(name=name, classes=10, checkpoint=str(path), input=shape)
    return open_network(section, shape=shape)


def test_the_readme_names_every_file():
    files = {p.name for p in kept_weights.FOLDER.glob("*.safetensors")}
    assert files == {f"{name}-cifar10.safetensors" for name in SAID}
    assert files


@pytest.mark.parametrize("network", SAID)
def test_kept_weights_are_whole_small_and_loaded(network):
    path = kept_weights.FOLDER / f"{network}-cifar10.safetensors"
    content = path.read_bytes()
    assert hashlib.sha256(content).hexdigest() == SAID[network][1]
    assert len(content) < kept_weights.MOST
    state = opened(network).model.state_dict()
    stored = kept_weights.unpacked(load_file(path))
    assert stored.keys() == state.keys()
    for name, tensor in stored.items():
        assert torch.equal(state[name], tensor.to(state[name].dtype)), name


def test_rounded_weights_are_off_by_half_a_step_of_their_own_channel_at_most(tmp_path, monkeypatch):
    torch.manual_seed(0)
    kernel = torch.randn(6, 4, 3, 3) * 10.0 ** torch.arange(-3, 3).reshape(-1, 1, 1, 1)
    kernel[2] = 0
    tensors = {"kernel": kernel, "norm": torch.randn(6), "count": torch.tensor(7)}
    (tmp_path / "trained").mkdir()
    save_file(tensors, tmp_path / "trained" / "model.safetensors")
    monkeypatch.setattr(kept_weights, "FOLDER", tmp_path)
    monkeypatch.setattr(kept_weights, "MOST", 2 * kernel.numel())  # too few for half precision
    written = kept_weights.keep("some", tmp_path / "trained")
    assert load_file(written)["kernel"].dtype == torch.int8
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    found = load_file(kept_weights.kept("some"))
    assert found.keys() == tensors.keys()
    step = kernel.flatten(1).abs().amax(1).reshape(-1, 1, 1, 1) / 127
    assert bool(((found["kernel"] - kernel).abs() <= step * 0.50001).all())
    assert torch.equal(found["norm"], tensors["norm"].half().float())
    assert torch.equal(found["count"], tensors["count"])


@pytest.mark.slow
@pytest.mark.skipif(not CIFAR10.is_dir(), reason="CIFAR-10 is not unpacked in the cache folder")
@pytest.mark.parametrize("network", SAID)
def test_kept_weights_are_as_good_as_they_say(network):
    made, shape = opened(network), (3, NETWORKS[network][1], NETWORKS[network][1])
    data = open_data(str(CIFAR10), DataSettings(input=shape, mean=MEAN, std=STD))
    top1 = evaluate(made.model, data.reporting(250), device="cpu").top1
    assert 100 * top1 == pytest.approx(SAID[network][0], abs=0.1)
