"""Watching shows every gate in every forward, and leaves nothing behind."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from nets import SE, Gated, Residual, images
from spellings import SPELLINGS, C, Functional, Lone, Shared
from test_trace import hooks
from torch import Tensor, nn

from seprune.graph.gates import Gate, find_gates
from seprune.graph.hooks import flat, tapped, watch

Seen = list[tuple[str, Tensor, Tensor | None]]


def collector(seen: Seen) -> object:
    return lambda gate, gate_BC, features: seen.append((gate.name, gate_BC, features))


def modes() -> int:
    return torch._C._len_torch_function_stack()


def test_gate_and_features_come_together_in_order() -> None:
    net, x = Residual().eval(), images(3)
    gates, seen = find_gates(net, x), []
    with torch.no_grad(), watch(net, gates, collector(seen)):
        net(x)
    assert [name for name, _, _ in seen] == ["blocks.0.se", "blocks.1.se"]
    block, x = net.blocks[0], net.stem(x)
    before = block.bn2(block.conv2(F.relu(block.bn1(block.conv1(x)))))
    torch.testing.assert_close(seen[0][2], before)
    torch.testing.assert_close(seen[0][1], block.se.fc(before.mean((2, 3))))


def test_every_forward_is_seen_with_its_own_batch_size() -> None:
    net = Gated(SE(C))
    gates, seen = find_gates(net, images(2)), []
    with torch.no_grad(), watch(net, gates, collector(seen)):
        for count in (1, 5, 2):
            net(images(count, size=8 + count))
    assert [tuple(v.shape) for _, v, _ in seen] == [(1, C), (5, C), (2, C)]
    assert [tuple(f.shape[2:]) for _, _, f in seen] == [(9, 9), (13, 13), (10, 10)]


def test_shared_gate_is_told_apart_by_its_use() -> None:
    net, x = Shared(), images()
    gates, seen = find_gates(net, x), []
    with torch.no_grad(), watch(net, gates[1:], collector(seen)):
        net(x)
        net(x)
    assert [name for name, _, _ in seen] == ["se#2", "se#3"] * 2
    for (_, value, _), closed in zip(seen, [*net.closed(x)[1:]] * 2, strict=True):
        torch.testing.assert_close(value, closed.detach())


def test_function_tap_in_a_block_without_modules() -> None:
    net, x = Functional(), images()
    gates, seen = find_gates(net, x), []
    assert (gates[0].tap.kind, gates[0].tap.function) == ("function", "sigmoid")
    with torch.no_grad(), watch(net, gates, collector(seen)):
        net(x)
        assert modes() == 0  # only while the block runs
    torch.testing.assert_close(seen[0][1], net.closed(x)[0].detach())


def test_functions_of_other_names_do_not_move_a_tap() -> None:
    """Dropout in train mode calls functions that the recorded pass did not."""

    class Net(Functional):
        def forward(self, x: Tensor) -> Tensor:
            if self.training:
                x = x * torch.ones_like(x) + torch.zeros_like(x)
            return super().forward(x)

    net, x, seen = Net(), images(), []
    gates = find_gates(net, x)
    with torch.no_grad(), watch(net.train(), gates, collector(seen)):
        net(x)
    torch.testing.assert_close(seen[0][1], net.closed(x)[0].detach())


# -- what is changed -------------------------------------------------------------------------------

KEYS = [
    "view",
    "conv",
    "ECA",
    "SK stack of 2",
    "SK logits stacked of 3",
    "SK split of 2",
    "functional",
    "split attention",
    "shared by three blocks",
    "addcmul",
    "channels last by hand",
]


@pytest.mark.parametrize("key", KEYS)
def test_outputs_and_gradients_are_those_of_the_bare_model(key: str) -> None:
    net, x = SPELLINGS[key].net().eval(), images(3, 12)
    gates = find_gates(net, x)

    def run() -> list[Tensor]:
        out = net(x)
        grads = torch.autograd.grad(out.square().sum(), list(net.parameters()), allow_unused=True)
        return [out, *(g for g in grads if g is not None)]

    bare = run()
    with watch(net, gates, lambda *_: None):
        watched = run()
    torch.testing.assert_close(watched, bare)
    torch.testing.assert_close(run(), bare, rtol=0, atol=0)


def test_derivative_of_a_gate_is_that_of_the_loss() -> None:
    """For out = sum(x * g): dout/dg is the sum of x over positions."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.se = nn.Conv2d(3, C, 3), Lone()

        def forward(self, x: Tensor) -> Tensor:
            y = self.conv(x)
            return y * self.se(y.detach())

    net, x, found = Net(), images(3), []
    with watch(net, find_gates(net, x), lambda g, v, f: v.register_hook(found.append)):
        net(x).sum().backward()
    torch.testing.assert_close(found[0], net.conv(x).sum((2, 3)).detach(), atol=1e-4, rtol=1e-4)


def test_flat_reads_a_gradient_as_it_reads_the_gate() -> None:
    gates = find_gates(SPELLINGS["SK logits stacked of 3"].net(), images(2, 12))
    assert [g.tap.batch_dim for g in gates] == [1, 1, 1]
    raw = torch.arange(3 * 4 * C).view(3, 4, C, 1, 1)
    for branch, gate in enumerate(gates):
        assert torch.equal(flat(gate, raw), raw[branch, :, :, 0, 0])


def test_a_callback_may_put_another_tensor_in_the_place_of_one() -> None:
    net, x = Gated(Lone(), C), images()
    net.forward = lambda x: net.conv(x) * net.gate(net.conv(x))
    gate = find_gates(net, x)[0]
    with tapped(net, [(gate.tap, torch.zeros_like)]):
        assert net(x).abs().sum() == 0
    assert net(x).abs().sum() > 0


# -- nothing is left behind ------------------------------------------------------------------------


class Breaks(Functional):
    """Raises after its gate when it is told to."""

    broken = False

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        if self.broken:
            raise ValueError("the data are bad")
        return y


@pytest.mark.parametrize("net", [Breaks(), Residual()], ids=["functions", "modules"])
def test_hooks_are_removed_whatever_happens(net: nn.Module) -> None:
    x = images()
    gates, seen = find_gates(net, x), []
    before, stacked = hooks(net), modes()

    def collect() -> None:
        with watch(net, gates, collector(seen)):
            assert hooks(net) > before
            net(x)
            raise ValueError("the data are bad")

    net.broken = True
    with pytest.raises(ValueError, match="the data are bad"):
        collect()
    net.broken = False
    assert (hooks(net), modes()) == (before, stacked)
    count = len(seen)
    net(x)
    assert len(seen) == count > 0


def test_a_callback_that_raises() -> None:
    net, x = Functional(), images()

    def fail(gate: Gate, gate_BC: Tensor, features: Tensor | None) -> None:
        raise KeyError(gate.name)

    with pytest.raises(KeyError, match=":sigmoid"), watch(net, find_gates(net, x), fail):
        net(x)
    assert (hooks(net), modes()) == (0, 0)


def test_half_a_pair_of_a_failed_forward_is_forgotten() -> None:
    class Net(Gated):
        def forward(self, x: Tensor) -> Tensor:
            y = F.relu(self.conv(x))
            g = self.gate(y)
            if len(x) == 3:
                raise ValueError("three")
            return self.head(y * g).mean((2, 3))

    class Late(Lone):  # the features are known before the gate
        def forward(self, x: Tensor) -> Tensor:
            if len(x) == 3:
                raise ValueError("three")
            return super().forward(x)

    net, seen = Net(Late()), []
    with torch.no_grad(), watch(net, find_gates(net, images()), collector(seen)):
        with pytest.raises(ValueError, match="three"):
            net(images(3))
        net(images(2))
    assert [(len(v), len(f)) for _, v, f in seen] == [(2, 2)]


def test_a_gate_that_never_runs_is_not_waited_for() -> None:
    net, seen = Gated(SE(C)), []
    net.spare = SE(C)
    with torch.no_grad(), watch(net, find_gates(net, images()), collector(seen)):
        net(images())
    assert [name for name, _, _ in seen] == ["gate"]


# -- precision -------------------------------------------------------------------------------------


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("key", ["view", "conv", "SK stack of 2", "functional"])
def test_under_autocast_only_rounding_changes(key: str, grad: bool) -> None:
    net, x = SPELLINGS[key].net().eval(), images(3, 12)
    gates, seen = find_gates(net, x), []
    low = torch.autocast("cpu", torch.bfloat16)
    with torch.set_grad_enabled(grad), watch(net, gates, collector(seen)), low:
        net(x)
    assert [v.requires_grad for _, v, _ in seen] == [grad] * len(gates)
    for (_, value, _), closed in zip(seen, net.closed(x), strict=True):
        torch.testing.assert_close(value.float(), closed, atol=0.02, rtol=0.02)
