"""Batches as large as a memory budget allows, and the same statistics from them."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from nets import Residual, images

from seprune.errors import UsageError
from seprune.graph.groups import find_structure
from seprune.graph.trace import record
from seprune.measure.activations import peak_bytes, saved_bytes
from seprune.statistics import CollectOptions, collect_statistics

CPU = CollectOptions(device="cpu")


def test_a_memory_budget_splits_the_batches_and_changes_nothing():
    """Batches are as large as the budget allows, whatever the loader gives."""
    sizes = []

    class Counts(Residual):
        def forward(self, x):
            sizes.append(len(x))
            return super().forward(x)

    torch.manual_seed(0)
    model, x = Counts().eval(), images(12, 16)
    structure = find_structure(model, x[:2])
    roomy = collect_statistics(model, [x], structure=structure, options=CPU)
    assert max(sizes) == 12
    one = 2 * saved_bytes(record(model, x[:2]))
    sizes.clear()
    tight = collect_statistics(
        model, [x], structure=structure, options=replace(CPU, memory=5 * one + 1)
    )
    assert max(sizes) == 5
    assert tight.samples == roomy.samples == 12
    assert tight.warnings == roomy.warnings
    for name, group in roomy.groups.items():
        for key, value in group.items():
            assert torch.allclose(tight.groups[name][key], value, rtol=1e-5), (name, key)


def test_a_memory_budget_too_small_for_one_image_says_what_one_needs():
    model, x = Residual().eval(), images(4, 16)
    need = 2 * peak_bytes(record(model, x[:2]))
    with pytest.raises(UsageError, match="memory=100 bytes is too little") as caught:
        collect_statistics(model, [x], options=replace(CPU, memory=100))
    assert f"one image needs {need:,} bytes" in caught.value.why
    collect_statistics(model, [x], options=replace(CPU, memory=need))
