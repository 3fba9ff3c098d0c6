"""The networks kept for the benchmarks: whole, small, loadable, and as good as they say."""

from __future__ import annotations

import hashlib
import os
import re
from pathlib import Path

import kept_weights
import pytest
import torch
from rivals import MEAN, NETWORKS, STD
from safetensors.torch import load_file

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
    path = kept_weights.kept(network)
    assert path is not None
    content = path.read_bytes()
    assert hashlib.sha256(content).hexdigest() == SAID[network][1]
    assert len(content) < kept_weights.MOST
    state = opened(network).model.state_dict()
    for name, tensor in load_file(path).items():
        assert torch.equal(state[name], tensor.to(state[name].dtype)), name


@pytest.mark.slow
@pytest.mark.skipif(not CIFAR10.is_dir(), reason="CIFAR-10 is not unpacked in the cache folder")
@pytest.mark.parametrize("network", SAID)
def test_kept_weights_are_as_good_as_they_say(network):
    made, shape = opened(network), (3, NETWORKS[network][1], NETWORKS[network][1])
    data = open_data(str(CIFAR10), DataSettings(input=shape, mean=MEAN, std=STD))
    top1 = evaluate(made.model, data.reporting(250), device="cpu").top1
    assert 100 * top1 == pytest.approx(SAID[network][0], abs=0.1)
