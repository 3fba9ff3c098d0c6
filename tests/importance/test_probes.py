"""Probes: where they go, that nothing else is trained, and that a plain network gets through."""

from __future__ import annotations

import copy
import json
import sys

import pytest
import torch
from nets import dependent, images
from torch import nn

from seprune import cli
from seprune.data import DataSettings, open_data
from seprune.errors import InputError
from seprune.graph.groups import NetworkStructure, find_structure
from seprune.importance.probes import Probe, ProbeSettings, places, probed, train_probes
from seprune.pipeline.collection import NO_GATES
from seprune.pipeline.run import run
from seprune.pruning.analyse import analyse
from seprune.recipe import recipe_of


class Plain(nn.Module):
    """Digits without a gate."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.norm = nn.Conv2d(1, 16, 3, padding=1), nn.BatchNorm2d(16)
        self.b, self.fc = nn.Conv2d(16, 24, 3, padding=1), nn.Linear(24, 10)

    def forward(self, x):
        y = self.b(torch.relu(self.norm(self.a(x))))
        return self.fc(torch.relu(y).mean((2, 3)))


def test_every_group_without_a_gate_gets_one_and_keeps_its_name():
    model = dependent("residual")
    structure = analyse(model, images())
    twin = probed(model, structure, ProbeSettings())
    found = find_structure(twin, images())
    assert places(structure) == {"blocks.0.bn1": 8, "blocks.1.bn1": 8}
    own = {g.name for g in structure.gates}
    probes = {g.name: g for g in found.gates if g.name not in own}
    assert set(probes) == {"blocks.0.bn1.probe", "blocks.1.bn1.probe"}
    assert all(g.placement == "inner" and g.squeeze == "mean" for g in probes.values())
    before = {g.name: g.units for g in structure.groups}
    after = {g.name: g.units for g in found.groups}
    assert before.items() <= after.items()
    links = {g.name: [k.gate for k in g.gates] for g in found.groups}
    assert links["blocks.0.conv1"] == ["blocks.0.bn1.probe"]
    assert links["stem"] == ["blocks.0.se", "blocks.1.se"]  # has gates of its own
    assert not any(isinstance(m, Probe) for m in model.modules())


def test_new_probes_let_nearly_everything_through():
    model = Plain().eval()
    twin = probed(model, find_structure(model, torch.rand(2, 1, 8, 8)), ProbeSettings())
    x = torch.rand(4, 1, 8, 8)
    gates = [m for m in twin.modules() if isinstance(m, Probe)]
    assert len(gates) == 2
    with torch.no_grad():
        ratio = gates[0](x.expand(-1, 16, -1, -1)) / x
    assert 0.8 < float(ratio.min()) <= float(ratio.max()) < 0.95


def test_training_moves_the_probes_and_nothing_else():
    torch.manual_seed(0)  # the loss of the last line falls by a thousandth
    model = Plain().train()
    structure = find_structure(model, torch.rand(2, 1, 8, 8))
    twin = probed(model, structure, ProbeSettings())
    twin.a.weight.requires_grad_(False)
    before = copy.deepcopy(twin.state_dict())
    data = open_data("digits", DataSettings(workers=0, batch_size=64))
    first = train_probes(twin, data.training(), ProbeSettings(epochs=1, lr=0.1, device="cpu"))
    after = twin.state_dict()
    moved = {name for name, value in after.items() if not torch.equal(value, before[name])}
    assert moved
    assert all(".probe." in name for name in moved)  # BatchNorm statistics stay, too
    assert not twin.a.weight.requires_grad
    assert twin.b.weight.requires_grad
    assert all(p.grad is None for p in twin.parameters())
    again = train_probes(twin, data.training(), ProbeSettings(epochs=2, lr=0.1, device="cpu"))
    assert again < first


def test_nothing_to_probe_and_a_learning_rate_that_explodes_are_errors():
    model = dependent("residual")
    with pytest.raises(InputError) as caught:
        probed(model, NetworkStructure((), (), (), ()), ProbeSettings())
    assert caught.value.what == "there is nothing to probe"
    assert caught.value.fix == "leave out importance.probe"
    twin = probed(Plain(), find_structure(Plain(), torch.rand(2, 1, 8, 8)), ProbeSettings())
    with torch.no_grad():
        twin.fc.weight.fill_(float("inf"))
    data = open_data("digits", DataSettings(workers=0, batch_size=512))
    with pytest.raises(InputError) as caught:
        train_probes(twin, data.training(), ProbeSettings(device="cpu"))
    assert caught.value.fix == "importance.probe.lr=0.001"


def recipe(criterion: str, **more):
    return recipe_of({
        "name": "plain", "model": {"name": "torchvision/resnet18", "classes": 10,
                                   "input": [3, 32, 32]},
        "data": {"source": "digits", "workers": 0},
        "collect": {"images": 20}, "plan": {"macs": 0.7}, "prune": {"recover": "none"},
        "finetune": {"epochs": 0, "recalibrate": 0}, "report": {"latency": False},
        "importance": {"criterion": criterion, **more},
    })  # fmt: skip


@pytest.fixture
def plain(tmp_path):
    path = tmp_path / "plain.py"
    path.write_text(
        "import sys\nsys.path.insert(0, " + repr(str(__file__).rpartition("/")[0]) + ")\n"
        "from test_probes import Plain\ndef net():\n    return Plain()\n"
    )
    return f"{path}:net"


def test_a_network_without_gates_is_pruned_by_its_probes_from_the_command_line(
    plain, monkeypatch, capsys, tmp_path
):
    words = ["prune", plain, "--allow-code", "--data", "digits", "--macs", "0.5", "--json"]
    words += ["--importance", "gate_mean", "--set", "plan.min_channels=2"]
    monkeypatch.setattr(sys, "argv", ["seprune", *words, "--out", str(tmp_path / "no")])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    output = capsys.readouterr().err
    assert stop.value.code == 3
    assert "importance.probe.epochs=1" in output
    words += ["--probe", "1", "--set", "importance.probe.images=256"]
    monkeypatch.setattr(sys, "argv", ["seprune", *words, "--out", str(tmp_path / "small")])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    found = json.loads(capsys.readouterr().out)
    assert stop.value.code == 0
    assert found["macs_after"] <= 0.5 * found["macs_before"]
    from seprune.export.pruned_model import load
    from seprune.models import ModelLoader
    from seprune.statistics import GateStatistics

    small = load(tmp_path / "small", loader=ModelLoader(any_file=True))
    assert not any(isinstance(m, Probe) or m._forward_hooks for m in small.modules())
    gates = GateStatistics.load(tmp_path / "small" / "statistics.safetensors").gates
    assert [g.name for g in gates] == ["norm.probe", "b.probe"]


@pytest.mark.slow
def test_resnet18_of_torchvision_with_probes_and_without(tmp_path):
    report = run(recipe("gate_mean", probe={"epochs": 1, "images": 64}), tmp_path / "probed")
    assert report.budgets[0].reached <= 0.7
    report = run(recipe("gate_logit"), tmp_path / "plain")
    assert report.budgets[0].reached <= 0.7
    assert NO_GATES in report.warnings
    with pytest.raises(InputError) as caught:
        run(recipe("gate_mean"), tmp_path / "none")
    assert caught.value.code == "no-gates"
