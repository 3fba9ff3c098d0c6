"""Cut networks made of the dense one's ONNX file: they answer as the cut eager network does."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from nets import SE, Chain, Residual, Shuffle, images
from torch import Tensor, nn

from seprune.export import onnx_cut
from seprune.export.onnx_cut import ExportedParent
from seprune.graph.groups import find_structure
from seprune.graph.removable import find_removable
from seprune.pruning.plan import PruningPlan, plan_of
from seprune.pruning.prune import prune
from seprune.pruning.removals import FrozenGate, Removals

pytest.importorskip("onnxruntime", reason="the extra onnx is not installed")
pytest.importorskip("onnxscript", reason="the extra onnx is not installed")


class Mixed(nn.Module):
    """Depthwise and grouped convolutions, a gate, BatchNorm."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 16, 3, bias=False), nn.BatchNorm2d(16), nn.ReLU())
        self.depthwise = nn.Conv2d(16, 16, 3, groups=16, bias=False)
        self.norm, self.se = nn.BatchNorm2d(16), SE(16)
        self.grouped = nn.Conv2d(16, 24, 1, groups=4)
        self.fc = nn.Linear(24, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.se(self.norm(self.depthwise(self.stem(x))))
        return self.fc(self.grouped(x).mean((2, 3), keepdim=True).flatten(1))


def network(model: nn.Module) -> tuple[nn.Module, PruningPlan]:
    model.eval()
    for norm in (m for m in model.modules() if isinstance(m, nn.BatchNorm2d)):
        norm.running_mean.normal_()
        norm.running_var.uniform_(0.5, 2)
        nn.init.uniform_(norm.weight, 0.5, 2)
    structure = find_structure(model, images())
    keep = {g.name: range(g.units // 2) for g in structure.groups if g.prunable}
    assert keep
    return model, plan_of(structure.groups, keep, {})


@pytest.fixture(scope="module")
def mixed() -> tuple[nn.Module, PruningPlan, ExportedParent]:
    model, plan = network(Mixed())
    return model, plan, ExportedParent.of(model, images().shape[1:])


def test_a_cut_file_answers_as_the_cut_network(mixed):
    model, plan, parent = mixed
    small, x = prune(model, plan), images()
    assert small.depthwise.groups < 16
    assert small.grouped.groups == 2
    torch.testing.assert_close(parent.dense()(x)[0], model(x).detach())
    run = parent.cut(plan, small, x)
    assert run is not None
    torch.testing.assert_close(run(x)[0], small(x).detach(), rtol=1e-4, atol=1e-5)


def test_a_width_that_stands_in_the_graph_is_found_out():
    torch.manual_seed(0)  # of one seed in twelve the outputs hardly depend on the middle
    model, plan = network(Chain(Shuffle()))  # half of the channels
    parent, small = ExportedParent.of(model, images().shape[1:]), prune(model, plan)
    assert parent.cut(plan, small, images()) is None


def test_other_weights_are_found_out(mixed, monkeypatch):
    model, plan, parent = mixed
    small = prune(model, plan)
    small.fc.weight.data[0] += 1.0
    assert parent.cut(plan, small, images()) is None
    monkeypatch.setattr(onnx_cut, "TOLERANCE", float("inf"))
    assert parent.cut(plan, small, images()) is not None


def test_gates_and_blocks_are_taken_out_of_the_file():
    model = Residual(8).eval()
    parts = find_removable(model, find_structure(model, images()), images())
    gates = tuple(
        FrozenGate(p.module, p.layer, p.side, (0.5,) * 8) for p in parts if p.kind == "gate"
    )
    _, plan = network(model)
    parent = ExportedParent.of(model, images().shape[1:])
    plan = replace(plan, removed=Removals(gates, ("blocks.1",)).with_unit_means())
    assert len(gates) == 2
    small = prune(model, plan)
    run = parent.cut(plan, small, images())
    assert run is not None
    torch.testing.assert_close(run(images())[0], small(images()).detach(), rtol=1e-4, atol=1e-5)
