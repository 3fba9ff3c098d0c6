"""The examples run, and their networks learn before and after the cut."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.fixture
def main(monkeypatch):
    """The `main` of an example by its name."""

    def load(name: str):
        monkeypatch.syspath_prepend(str(EXAMPLES))
        return importlib.import_module(name).main

    return load


def test_every_example_is_tested_here():
    names = {path.stem for path in EXAMPLES.glob("*.py")} - {"digits"}
    text = Path(__file__).read_text()
    assert [name for name in sorted(names) if f'main("{name}")' not in text] == []


@pytest.mark.slow
def test_a_plain_loop_goes_on_with_the_pruned_network(main):
    top1 = main("plain_pytorch")()
    assert top1["dense"] > 0.85
    assert top1["refitted"] > 0.75
    assert top1["tuned"] > 0.85


@pytest.mark.slow
def test_a_pruner_of_torch_pruning_takes_the_scores(main):
    top1 = main("torch_pruning_pruner")()
    assert top1["dense"] > 0.85
    assert top1["tuned"] > 0.8


@pytest.mark.slow
def test_lightning_fits_the_pruned_network(main):
    lightning = pytest.importorskip("lightning", reason="lightning is not installed")
    top1 = main("lightning_module")()
    assert top1["dense"] > 0.85
    assert top1["tuned"] > 0.85

    import torch
    from digits import loaders
    from lightning_module import Classifier, fit

    lightning.seed_everything(0)
    loader, _ = loaders()
    module = Classifier()
    modes: list[bool] = []
    module.prune(loader, macs=0.5)
    module.network.conv1.register_forward_hook(lambda m, i, o: modes.append(m.training))
    before = {n: p.clone() for n, p in module.network.named_parameters()}
    norm = next(m for m in module.network.modules() if isinstance(m, torch.nn.BatchNorm2d))
    counted = int(norm.num_batches_tracked)
    fit(module, loader, 1)
    assert set(modes) == {True}
    assert int(norm.num_batches_tracked) == counted + len(loader)
    after = dict(module.network.named_parameters())
    assert [n for n in before if torch.equal(before[n], after[n])] == []


@pytest.mark.slow
def test_the_trainer_of_transformers_trains_the_pruned_network(main):
    pytest.importorskip("transformers", reason="transformers is not installed")
    top1 = main("hugging_face_trainer")()
    assert top1["dense"] > 0.85
    assert top1["refitted"] > 0.75
    assert top1["tuned"] > 0.85
