"""Gates are found by what they do, however they are written."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from nets import SE, Gated, Inner, Residual, images
from spellings import NEGATIVES, SPELLINGS, C, Eca, Film, Frame, Lone, OneLayer, Shared, Want
from torch import Tensor, nn

from seprune.errors import InputError
from seprune.graph.gates import Gate, find_gates
from seprune.graph.hooks import watch


def facts(gates: tuple[Gate, ...]) -> list[Want]:
    return [Want(g.name, g.channels, g.squeeze, g.activation, g.placement, g.scales) for g in gates]


def built(key: str) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    return SPELLINGS[key].net().eval(), torch.rand(SPELLINGS[key].input)


@pytest.mark.parametrize("key", SPELLINGS)
def test_spelling(key: str) -> None:
    net, x = built(key)
    gates = find_gates(net, x)
    assert facts(gates) == list(SPELLINGS[key].gates)
    assert all(g.runs for g in gates)


@pytest.mark.parametrize("key", SPELLINGS)
def test_watched_gate_is_the_one_that_multiplies(key: str) -> None:
    net, x = built(key)
    gates = find_gates(net, x)
    x = torch.rand(3, *x.shape[1:])
    values, gradients = {}, {}

    def see(gate: Gate, gate_BC: Tensor, features: Tensor | None) -> None:
        values[gate.name] = gate_BC.detach().clone()
        gate_BC.register_hook(lambda g: gradients.__setitem__(gate.name, g))
        assert features is None or features.shape[:2] == gate_BC.shape

    with watch(net, gates, see):
        net(x).square().sum().backward()
    for gate, closed in zip(gates, net.closed(x), strict=True):
        torch.testing.assert_close(values[gate.name], closed.detach(), atol=1e-5, rtol=1e-4)
        assert gradients[gate.name].shape == closed.shape
        assert gradients[gate.name].abs().sum() > 0


@pytest.mark.parametrize("key", NEGATIVES)
def test_no_gate(key: str) -> None:
    net, x = NEGATIVES[key]().eval(), torch.rand(2, 3, 12, 10)
    net(x)
    assert find_gates(net, x) == ()


def test_a_vector_input_is_no_squeeze() -> None:
    assert find_gates(Film(), (torch.rand(2, 3, 12, 10), torch.rand(2, 5))) == ()


# -- the same gates however the pass is run --------------------------------------------------------

SOME = ["view", "conv", "ECA", "CBAM", "SK stack of 2", "SK kbchw,bkc->bchw of 3", "functional",
        "batch and channels in one", "split attention", "SE standard"]  # fmt: skip


@pytest.mark.parametrize("key", SOME)
@pytest.mark.parametrize("batch", [1, 3, 5])
def test_batch_size_changes_nothing(key: str, batch: int) -> None:
    net, x = built(key)
    gates = find_gates(net, torch.rand(batch, *x.shape[1:]))
    assert facts(gates) == list(SPELLINGS[key].gates)
    seen = {}
    with torch.no_grad(), watch(net, gates, lambda g, v, f: seen.__setitem__(g.name, v.clone())):
        net(x)
    for gate, closed in zip(gates, net.closed(x), strict=True):
        torch.testing.assert_close(seen[gate.name], closed.detach(), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("key", SOME)
def test_train_mode_and_channels_last(key: str) -> None:
    net, x = built(key)
    net = net.train().to(memory_format=torch.channels_last)
    gates = find_gates(net, x.contiguous(memory_format=torch.channels_last))
    assert facts(gates) == list(SPELLINGS[key].gates)
    assert all(m.training for m in net.modules())


def test_order_of_a_permuted_gate() -> None:
    """The gate's channels are handed on in the order of the channels that they scale."""

    class Shuffled(Lone):
        def forward(self, x: Tensor) -> Tensor:
            g = torch.sigmoid(self.fc(x.mean((2, 3))))
            return g.view(-1, 2, C // 2).transpose(1, 2).reshape(-1, C, 1, 1)

    class Net(Frame):
        def forward(self, x: Tensor) -> Tensor:
            y = F.relu(self.conv(x))
            return self.head(y * self.gate(y)).mean((2, 3))

    net, x, seen = Net(Shuffled()), images(), []
    gates = find_gates(net, x)
    with watch(net, gates, lambda g, v, f: seen.append(v)):
        net(x)
    torch.testing.assert_close(seen[0], net.gate(F.relu(net.conv(x)))[:, :, 0, 0])
    assert [g.name for g in gates] == ["gate"]


def test_detached_gate() -> None:
    class Detached(Lone):
        def forward(self, x: Tensor) -> Tensor:
            return x * super().forward(x).detach()

    assert facts(find_gates(Frame(Detached()), images())) == [Want()]


def test_a_gate_squeezed_from_a_map_and_a_vector() -> None:
    class Conditional(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.fc = nn.Conv2d(3, C, 3), nn.Linear(C + 5, C)

        def forward(self, x: Tensor, vector: Tensor) -> Tensor:
            y = self.conv(x)
            g = self.fc(torch.cat([y.mean((2, 3)), vector], 1)).sigmoid()
            return (y * g[:, :, None, None]).mean((2, 3))

    gates = find_gates(Conditional(), (images(), torch.rand(2, 5)))
    assert facts(gates) == [Want(name=":sigmoid")]


def test_one_gate_tensor_on_two_maps_is_used_twice() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.se = nn.Conv2d(3, C, 3), nn.Conv2d(3, C, 3), Lone()

        def forward(self, x: Tensor) -> Tensor:
            a, b = self.a(x), self.b(x)
            g = self.se(a)
            return torch.cat([a * g, b * g], 1).mean((2, 3))

    gates = find_gates(Twice(), images())
    assert [(g.name, g.scales) for g in gates] == [("se", ("a",)), ("se#2", ("b",))]


# -- the hand-off ----------------------------------------------------------------------------------


def test_names_layers_and_placement() -> None:
    residual, inner = find_gates(Residual(), images()), find_gates(Inner(), images())
    assert [(g.name, g.placement, g.scales) for g in residual] == [
        ("blocks.0.se", "residual", ("blocks.0.conv2",)),
        ("blocks.1.se", "residual", ("blocks.1.conv2",)),
    ]
    assert residual[0].excitation == ("blocks.0.se.fc.0", "blocks.0.se.fc.2")
    assert [(g.name, g.placement, g.scales, g.channels) for g in inner] == [
        ("se", "inner", ("depthwise",), 12)
    ]


def test_no_function_is_watched_where_a_module_shows_the_gate() -> None:
    """A function tap costs Python work for every operator of its block."""
    gates = [*find_gates(Residual(), images()), *find_gates(Inner(), images())]
    assert {g.tap.kind for g in gates} == {"output"}
    assert {g.features.kind for g in gates} <= {"output", "input"}


# -- gate modules that the forward never calls -----------------------------------------------------


class Idle(nn.Module):
    """Registers gates that its forward leaves out (SE-Inception-v3 of senet.pytorch does)."""

    def __init__(self, **idle: nn.Module) -> None:
        super().__init__()
        self.conv, self.head = nn.Conv2d(3, C, 3), nn.Linear(C, 3)
        for name, module in idle.items():
            self.add_module(name, module)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.conv(x).mean((2, 3)))


@pytest.mark.parametrize(
    ("module", "channels", "activation"),
    [
        (lambda: SE(16), 16, "sigmoid"),  # returns the gated map
        (lambda: Lone(24), 24, "sigmoid"),  # returns the gate
        (lambda: OneLayer(nn.Conv2d(C, C, 1), nn.Hardsigmoid()), C, "hardsigmoid"),
        (lambda: nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Conv2d(C, C, 1), nn.Tanh()), C, "tanh"),
        (Eca, 0, "sigmoid"),  # any number of channels
    ],
)
def test_idle_gate(module: object, channels: int, activation: str) -> None:
    gates = find_gates(Idle(se=module()), images())
    assert [(g.name, g.channels, g.activation, g.runs) for g in gates] == [
        ("se", channels, activation, False)
    ]
    assert gates[0].tap is None
    assert gates[0].scales == ()


def test_idle_gates_inside_an_idle_container() -> None:
    branch = nn.Sequential(nn.Conv2d(3, C, 3), SE(C), nn.ReLU(), nn.Conv2d(C, C, 3), SE(C))
    gates = find_gates(Idle(aux=branch), images())
    assert [(g.name, g.runs) for g in gates] == [("aux.1", False), ("aux.4", False)]
    listed = find_gates(Idle(gates=nn.ModuleList([SE(4), SE(C)])), images())
    assert [(g.name, g.channels) for g in listed] == [("gates.0", 4), ("gates.1", C)]


def test_idle_modules_that_are_no_gates() -> None:
    idle = {"conv2": nn.Conv2d(C, C, 1), "fc": nn.Linear(C, C), "norm": nn.BatchNorm2d(C)}
    branch = nn.Sequential(nn.Conv2d(3, C, 3), nn.ReLU())
    attention = nn.MultiheadAttention(C, 2)
    assert find_gates(Idle(**idle, branch=branch, attention=attention), images()) == ()


def test_running_and_idle_gates_together() -> None:
    net = Gated(SE(C))
    net.spare = SE(C)
    assert [(g.name, g.runs) for g in find_gates(net, images())] == [
        ("gate", True),
        ("spare", False),
    ]


def test_a_shared_gate_is_listed_for_each_use() -> None:
    assert [g.tap.call for g in find_gates(Shared(), images())] == [0, 1, 2]


def test_a_forward_that_fails_names_the_layer() -> None:
    with pytest.raises(InputError) as caught:
        find_gates(Residual(), torch.rand(2, 4, 16, 16))
    assert caught.value.what == "the model's forward fails in layer 'stem'"
    assert "to have 3 channels, but got 4 channels" in caught.value.why
    assert "--input 3x224x224" in caught.value.fix
