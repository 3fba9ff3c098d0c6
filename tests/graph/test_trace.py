"""A recorded pass says what happened, and leaves the model as it was."""

from __future__ import annotations

import time

import pytest
import torch
import torch.nn.functional as F
from nets import Inner, Residual, images
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from seprune.errors import InputError
from seprune.graph.trace import Node, Trace, record


def hooks(model: nn.Module) -> int:
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_forward_hooks_with_kwargs")
    return sum(len(getattr(m, kind)) for m in model.modules() for kind in kinds)


def state(model: nn.Module) -> tuple[object, ...]:
    tensors = {k: v.clone() for k, v in model.state_dict().items()}
    modes = [m.training for m in model.modules()]
    return tensors, modes, [p.requires_grad for p in model.parameters()], hooks(model)


def assert_unchanged(before: tuple[object, ...], model: nn.Module) -> None:
    after = state(model)
    torch.testing.assert_close(after[0], before[0], rtol=0, atol=0)
    assert after[1:] == before[1:]


def find(trace: Trace, op: str) -> list[Node]:
    return [n for n in trace.nodes if n.op.split(".")[1] == op]


class Failing(nn.Module):
    """Raises in the middle of its forward."""

    def __init__(self, error: Exception) -> None:
        super().__init__()
        self.conv, self.norm, self.bad = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Identity()
        self.error = error
        self.bad.forward = self.fail  # type: ignore[method-assign]

    def fail(self, x: Tensor) -> Tensor:
        raise self.error

    def forward(self, x: Tensor) -> Tensor:
        return self.bad(self.norm(self.conv(x)))


# -- what is recorded ------------------------------------------------------------------------------


def test_values_nodes_and_calls_of_a_block() -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), nn.ReLU())
    trace = record(net, images(2, 8))
    assert [(n.op, n.module) for n in trace.nodes] == [
        ("aten.convolution.default", "0"),
        ("aten.relu.default", "1"),
    ]
    x, weight = (trace.values[v] for v in trace.nodes[0].inputs())
    assert (x.kind, x.shape) == ("input", (2, 3, 8, 8))
    assert (weight.kind, weight.name, weight.shape) == ("parameter", "0.weight", (4, 3, 3, 3))
    assert trace.outputs == trace.nodes[1].outputs
    assert trace.shape(trace.outputs[0]) == (2, 4, 6, 6)
    assert [(c.module, c.call, c.first_node, c.end_node) for c in trace.calls] == [
        ("0", 0, 0, 1),
        ("1", 0, 1, 2),
        ("", 0, 0, 2),
    ]
    assert trace.consumers()[trace.nodes[0].outputs[0]] == [1]
    assert trace.batch == 2


def test_buffers_constants_and_repeated_calls_have_their_own_names() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(3, 3)
            self.register_buffer("scale", torch.ones(3))

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(self.fc(x * self.scale)) + torch.ones(3)

    trace = record(Net(), torch.rand(2, 3))
    assert [(c.module, c.call) for c in trace.calls] == [("fc", 0), ("fc", 1), ("", 0)]
    assert [n.call for n in find(trace, "addmm")] == [0, 1]
    read = [trace.values[v] for n in trace.nodes for v in n.inputs()]
    assert ("buffer", "scale") in {(v.kind, v.name) for v in read}
    added = trace.values[find(trace, "add")[0].inputs()[1]]
    assert (added.kind, added.name) == ("result", "")  # made by torch.ones in this pass


def test_in_place_writes_make_new_values() -> None:
    class Net(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            y = x + 1
            y *= 2
            return y + 3

    trace = record(Net(), images())
    first, write, last = trace.nodes
    assert write.inputs() == [first.outputs[0]]
    assert write.outputs[0] != first.outputs[0]
    assert last.inputs() == [write.outputs[0]]


def test_a_write_into_a_view_changes_what_it_looks_into() -> None:
    class Net(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            y = x + 1
            y[:, :2].mul_(5)
            return y + 3

    trace = record(Net(), images())
    write = find(trace, "write_into_view")[0]
    base, part = write.inputs()
    assert trace.values[base].node == 0
    assert trace.nodes[trace.values[part].node].op == "aten.mul_.Tensor"
    assert trace.nodes[-1].inputs() == [write.outputs[0]]


def test_functions_are_numbered_by_name_in_their_module() -> None:
    class Net(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            y = F.relu(torch.sigmoid(x))
            return torch.sigmoid(y).sigmoid_()

    found = [(f.function, f.index, f.fresh) for f in record(Net(), images()).functions]
    assert found == [
        ("sigmoid", 1, True),
        ("relu", 1, True),
        ("sigmoid", 2, True),
        ("sigmoid_", 1, False),
    ]


class Attention(nn.Module):
    """Products of activations, and a convolution that goes up."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.qk = nn.ConvTranspose2d(3, 6, 2, stride=2), nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        t = self.up(x).flatten(2).transpose(1, 2)
        return (self.qk(t) @ t.transpose(1, 2)).softmax(-1) @ t


@pytest.mark.parametrize("net", [Residual, Inner, Attention])
def test_macs_are_half_of_what_the_flop_counter_says(net: type[nn.Module]) -> None:
    model, x = net().eval(), images(3, 8)
    counter = FlopCounterMode(display=False)
    with counter, torch.no_grad():
        model(x)
    assert counter.get_total_flops() > 0
    assert 2 * sum(n.macs for n in record(model, x).nodes) == counter.get_total_flops()


# -- inputs and outputs of all kinds ---------------------------------------------------------------


def test_a_forward_that_takes_more_than_an_image() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.fc = nn.Conv2d(3, 4, 3), nn.Linear(5, 4)

        def forward(self, x: Tensor, extra: dict[str, Tensor]) -> dict[str, Tensor]:
            return {"out": self.conv(x).mean((2, 3)) + self.fc(extra["vector"])}

    trace = record(Net(), (images(4), {"vector": torch.rand(4, 5)}))
    kinds = [(v.kind, v.shape) for v in trace.values if v.kind == "input"]
    assert kinds == [("input", (4, 3, 16, 16)), ("input", (4, 5))]
    assert [trace.shape(v) for v in trace.outputs] == [(4, 4)]
    assert trace.batch == 4


@pytest.mark.parametrize(
    ("inputs", "batch"),
    [
        (torch.rand(5, 3, 8), 5),
        (([torch.rand(3, 8, 8), torch.rand(3, 9, 9)],), 2),
        ((torch.tensor(3.0), torch.rand(4, 2)), 4),
    ],
)
def test_samples_of_a_batch(inputs: object, batch: int) -> None:
    class Any(nn.Module):
        def forward(self, *x: object) -> object:
            return x

    assert record(Any(), inputs).batch == batch


def test_scripted_modules_are_recorded_through() -> None:
    scripted = torch.jit.script(nn.Sigmoid())
    trace = record(nn.Sequential(nn.Conv2d(3, 4, 3), scripted), images())
    assert trace.nodes[-1].op == "aten.sigmoid.default"


# -- the model is left as found --------------------------------------------------------------------


def test_the_model_is_left_as_found() -> None:
    net = Residual().train()
    net.blocks[0].bn1.eval()  # each module has a mode of its own
    net.stem.weight.requires_grad_(False)
    before = state(net)
    with torch.enable_grad():
        record(net, images())
        assert torch.is_grad_enabled()
    assert_unchanged(before, net)


def test_weights_of_another_precision_are_named_where_the_forward_fails():
    with pytest.raises(InputError) as caught:
        record(nn.Conv2d(3, 4, 1).double(), torch.zeros(1, 3, 4, 4))
    assert "weights float32 (some are torch.float64)" in caught.value.fix


@pytest.mark.parametrize("error", [RuntimeError("no luck"), KeyError("k"), AssertionError()])
def test_a_forward_that_raises_names_the_layer_and_changes_nothing(error: Exception) -> None:
    net = Failing(error).train()
    before = state(net)
    with pytest.raises(InputError) as caught:
        record(net, images())
    assert caught.value.what == "the model's forward fails in layer 'bad'"
    assert caught.value.why.startswith(f"{type(error).__name__}: ")
    assert caught.value.fix.startswith("check the input shape (--input 3x224x224)")
    assert caught.value.code == "forward"
    assert_unchanged(before, net)
    assert torch.overrides._get_current_function_mode() is None


def test_parameters_without_a_shape_are_named() -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 1), nn.LazyConv2d(4, 1))
    with pytest.raises(InputError) as caught:
        record(net, torch.rand(1, 3, 4, 4))
    assert caught.value.what == "the model's parameter '1.weight' has no shape yet"
    assert "run the model once" in caught.value.fix
    net(torch.rand(1, 3, 4, 4))
    assert record(net, torch.rand(1, 3, 4, 4)).nodes


def test_an_interrupt_changes_nothing_either() -> None:
    net = Failing(KeyboardInterrupt()).train()  # type: ignore[arg-type]
    before = state(net)
    with pytest.raises(KeyboardInterrupt):
        record(net, images())
    assert_unchanged(before, net)


def test_an_exception_that_the_model_catches_is_its_own_business() -> None:
    class Net(Failing):
        def forward(self, x: Tensor) -> Tensor:
            y = self.norm(self.conv(x))
            try:
                return self.bad(y)
            except RuntimeError:
                return self.norm(y)

    trace = record(Net(RuntimeError()), images())
    assert [(c.module, c.call) for c in trace.calls] == [
        ("conv", 0),
        ("norm", 0),
        ("norm", 1),
        ("", 0),
    ]


def test_a_module_that_returns_nothing() -> None:
    class Silent(nn.Module):
        def forward(self, x: Tensor) -> None:
            return None

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.silent, self.conv = Silent(), nn.Conv2d(3, 4, 3)

        def forward(self, x: Tensor) -> Tensor:
            self.silent(x)
            return self.conv(x) + 1

    trace = record(Net(), images())
    assert [n.module for n in trace.nodes] == ["conv", ""]


# -- time ------------------------------------------------------------------------------------------


@pytest.fixture
def _slow_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every look at the clock finds it a second later."""
    ticks = iter(range(10**6))
    monkeypatch.setattr(time, "thread_time", lambda: float(next(ticks)))


@pytest.mark.usefixtures("_slow_clock")
def test_a_pass_that_does_not_end_names_the_layer() -> None:
    class Endless(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            while True:
                x = x + 1

    net = nn.Sequential(nn.Conv2d(3, 4, 3), Endless()).train()
    before = state(net)
    with pytest.raises(InputError) as caught:
        record(net, images(), limit_seconds=7)
    assert caught.value.what == "the forward pass did not end within 7 s"
    assert caught.value.why == "it was in layer '1'"
    assert caught.value.fix == "use a smaller input (--input) or leave the model as it is"
    assert caught.value.code == "trace-timeout"
    assert_unchanged(before, net)
