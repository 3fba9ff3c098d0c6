"""The public API on the user's own module and loader, as the README shows it."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
import torch_pruning as tp
from nets import Inner, Residual, images
from torch.utils.data import DataLoader, TensorDataset

import seprune


def _loader(count: int = 24) -> DataLoader[tuple[torch.Tensor, ...]]:
    labels = torch.arange(count) % 3
    return DataLoader(TensorDataset(images(count), labels), batch_size=8)


@pytest.mark.parametrize("net", [Residual, Inner])
def test_the_ten_lines_of_the_readme_work_and_leave_the_model_alone(net, tmp_path):
    torch.manual_seed(0)
    model, loader = net(), _loader()
    before = {n: t.clone() for n, t in model.state_dict().items()}

    gates = seprune.find_gates(model, images())
    structure = seprune.analyse(model, images())
    statistics = seprune.collect_statistics(model, loader, structure=structure)
    importance = seprune.score(structure, statistics)
    plan = seprune.make_plan(
        structure, importance, macs=0.6, allocation=seprune.Allocation(min_channels=2)
    )
    small = seprune.prune(model, plan)
    settings = seprune.FineTuneSettings(epochs=1, recalibrate=0, device="cpu")
    tuned = seprune.finetune(small, loader, settings).model
    score = seprune.evaluate(tuned, loader, device="cpu")

    assert [g.name for g in gates] == [g.name for g in structure.gates] != []
    assert score.count == 24
    assert sum(p.numel() for p in small.parameters()) == plan.facts["params"][1]
    assert plan.facts["macs"][1] <= 0.6 * plan.facts["macs"][0]
    assert all(torch.equal(before[n], t) for n, t in model.state_dict().items())
    assert model.training


def test_a_pruned_network_is_saved_and_loaded_without_pickle(tmp_path):
    model = torch.nn.Module.eval(
        __import__("seprune.models", fromlist=["build"]).build("seprune/se_resnet8")
    )
    structure = seprune.analyse(model, torch.rand(2, 1, 8, 8))
    importance = seprune.score(structure, model=model, scoring=seprune.Scoring("l2"))
    plan = seprune.make_plan(structure, importance, macs=0.5)
    small = seprune.prune(model, plan).eval()
    seprune.save(small, tmp_path / "small", seprune.Architecture("seprune/se_resnet8").cut(plan))
    back = seprune.load(tmp_path / "small")
    x = torch.rand(3, 1, 8, 8)
    with torch.no_grad():
        assert torch.equal(back(x), small(x))


def test_gate_importance_drops_into_a_stock_torch_pruning_pruner():
    torch.manual_seed(0)
    model = Inner()
    statistics = seprune.collect_statistics(model, _loader())
    lowest = statistics.values["se"]["mean"].argsort()[:6].tolist()
    kept = sorted(set(range(12)) - set(lowest))
    expected = model.depthwise.weight.detach()[kept].clone()
    pruner = tp.pruner.BasePruner(
        model,
        images(),
        importance=seprune.GateImportance(statistics),
        pruning_ratio=0.5,
        ignored_layers=[model.fc, model.stem],
        in_channel_groups={},
        out_channel_groups={},
        num_heads={},
    )
    pruner.step()
    assert model.depthwise.out_channels == 6
    assert torch.equal(model.depthwise.weight.detach(), expected)


def test_importing_seprune_imports_no_torch():
    code = "import seprune, sys; print('torch' in sys.modules, len(dir(seprune)) > 0)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split()[0] == "False"


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="has no attribute 'frobnicate'"):
        seprune.frobnicate  # noqa: B018
