"""The ways to normal equations that are compared give the same ones."""

from __future__ import annotations

from dataclasses import replace

import patches
import pytest
import torch


@pytest.mark.parametrize("layer", patches.LAYERS, ids=lambda layer: layer.name)
def test_all_ways_give_one_gram_matrix(layer, monkeypatch):
    monkeypatch.setattr(patches, "BLOCK", 4)
    ways = patches.Ways(replace(layer, pixels=7))
    with torch.no_grad():
        made = {name: call() for name, call in ways.all().items()}
    wanted = made["sampled rows one by one"]
    for name in ("sampled rows of a strided view", "all unfolded, sampled rows picked"):
        assert torch.allclose(made[name], wanted, rtol=1e-5, atol=1e-5)
    if "all rows by shifted products" in made:
        shifts = made["all rows by shifted products"][0].split(layer.inputs)
        own = made["all rows as patches"][0].unflatten(0, (layer.kernel**2, -1))
        middle = layer.kernel**2 // 2  # which meets the whole image, so that edges do not matter
        assert torch.allclose(shifts[0], own[middle].split(layer.inputs, 1)[middle], rtol=1e-4)
        if layer.kernel > 1:
            right = own[middle].split(layer.inputs, 1)[middle + 1]
            assert torch.allclose(shifts[1], right, rtol=1e-4, atol=1e-3)
