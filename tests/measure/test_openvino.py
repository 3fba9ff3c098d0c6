"""OpenVINO as a runtime: the same values as PyTorch, plans in a copy of one file, times."""

from __future__ import annotations

import sys
from contextlib import ExitStack

import pytest
import torch

import seprune
from seprune.errors import EnvironmentFault
from seprune.measure.latency_table import TableKey
from seprune.measure.openvino_runtime import require_openvino
from seprune.pipeline.context import Context, Runtime
from seprune.pipeline.inputs import open_network
from seprune.pipeline.network_timer import NetworkTimer
from seprune.pipeline.timing import TimingSetup, ready
from seprune.recipe.sections import ModelSection, PlanSection


def test_what_is_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "openvino", None)
    with pytest.raises(EnvironmentFault, match="the runtime 'openvino' is not installed") as caught:
        TableKey.here("openvino", batch=1)
    assert "pip install 'seprune[openvino]'" in str(caught.value.fix)
    with pytest.raises(EnvironmentFault):
        require_openvino()


@pytest.mark.slow
def test_values_and_plans_are_those_of_pytorch() -> None:
    pytest.importorskip("openvino", reason="the extra openvino is not installed")
    torch.manual_seed(0)
    network = open_network(ModelSection(name="seprune/se_resnet8", classes=10), shape=(3, 32, 32))
    context = Context(network, None, Runtime(torch.device("cpu")))
    model = network.model.eval()
    scores = seprune.score(context.structure, None, model=model, scoring=seprune.Scoring("l2"))
    plan = seprune.make_plan(context.structure, scores, macs=0.4)
    images = torch.randn(2, 3, 32, 32)
    with ExitStack() as stack, torch.no_grad():
        setup = TimingSetup(network.shape, "cpu", (2,))
        run = ready(model, "openvino", setup, stack)
        assert not isinstance(run, str), run
        torch.testing.assert_close(run(images)[0], model(images), rtol=1e-3, atol=1e-4)
        timer = NetworkTimer(context, PlanSection(runtime="openvino", batch=2), stack)
        assert timer.parent is not None
        small = seprune.prune(model, plan)
        cut = timer.parent.cut(plan, small, images)
        assert cut is not None, "the plan stands in a copy of the dense file"
        torch.testing.assert_close(cut(images)[0], small(images), rtol=1e-3, atol=1e-4)


def test_single_operators_are_those_of_onnx_runtime() -> None:
    pytest.importorskip("openvino", reason="the extra openvino is not installed")
    assert TableKey.here("openvino", batch=1) == TableKey.here("onnx", batch=1)
