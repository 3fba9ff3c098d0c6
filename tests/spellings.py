"""Every way of writing a channel gate that we could think of, each with its closed form.

`SPELLINGS` are gates: a net, the gates it has, and `net.closed(x)`, the (B, C) gates that its
forward uses, worked out another way. `NEGATIVES` are nets that multiply, but have no channel gate.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from nets import SE
from torch import Tensor, nn

C, H = 8, 4  # channels of every gated map, width of every bottleneck
Forward = Callable[["Excite", Tensor], Tensor]


@dataclass(frozen=True)
class Want:
    """What `find_gates` must say about one gate."""

    name: str = "gate"
    channels: int = C
    squeeze: str = "mean"
    activation: str = "sigmoid"
    placement: str = "inner"
    scales: tuple[str, ...] = ("conv",)


@dataclass(frozen=True)
class Spelling:
    """A net and its gates."""

    net: Callable[[], nn.Module]
    gates: tuple[Want, ...] = (Want(),)
    input: tuple[int, ...] = (2, 3, 12, 10)


SPELLINGS: dict[str, Spelling] = {}
NEGATIVES: dict[str, Callable[[], nn.Module]] = {}


# -- frames --------------------------------------------------------------------------------------


class Frame(nn.Module):
    """conv -> gate -> head; the gate module gets the map and returns the gated map."""

    def __init__(self, gate: nn.Module, dims: int = 2) -> None:
        super().__init__()
        conv = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}[dims]
        self.conv = conv(3, C, 3, padding=1)
        self.gate = gate
        self.head = conv(C, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.gate(F.relu(self.conv(x)))).flatten(2).mean(2)

    def closed(self, x: Tensor) -> list[Tensor]:
        made = self.gate.closed(F.relu(self.conv(x)))
        return made if isinstance(made, list) else [made]


def spatial(x: Tensor) -> list[int]:
    return list(range(2, x.dim()))


def mean(x: Tensor) -> Tensor:
    return x.mean(spatial(x))


def peak(x: Tensor) -> Tensor:
    return x.amax(spatial(x))


def wide(g: Tensor) -> Tensor:
    return g.view(*g.shape, 1, 1)


def hard(x: Tensor) -> Tensor:
    return (x + 3).clamp(0, 6) / 6


class Excite(nn.Module):
    """`write` is the spelling; the closed form is act(W2 relu(W1 squeeze(x) + b1) + b2)."""

    def __init__(
        self,
        write: Forward,
        *,
        squeeze: Callable[[Tensor], Tensor] = mean,
        act: Callable[[Tensor], Tensor] = torch.sigmoid,
        bias: bool = True,
        conv: bool = False,
    ) -> None:
        super().__init__()
        layer = (lambda i, o: nn.Conv2d(i, o, 1, bias=bias)) if conv else None
        self.fc1 = layer(C, H) if layer else nn.Linear(C, H, bias=bias)
        self.fc2 = layer(H, C) if layer else nn.Linear(H, C, bias=bias)
        self.write, self.squeeze, self.act = write, squeeze, act

    def forward(self, x: Tensor) -> Tensor:
        return self.write(self, x)

    def mlp(self, s: Tensor) -> Tensor:
        return self.fc2(F.relu(self.fc1(s)))

    def plain(self, s: Tensor) -> Tensor:
        """`mlp` on (B, C), in arithmetic."""
        for layer in (self.fc1, self.fc2):
            s = s @ layer.weight.flatten(1).T
            s = s if layer.bias is None else s + layer.bias
            s = s.clamp(min=0) if layer is self.fc1 else s
        return s

    def closed(self, x: Tensor) -> Tensor:
        return self.act(self.plain(self.squeeze(x)))


def spelled(key: str, write: Forward, *, want: Want | None = None, **how: object) -> None:
    """Register an `Excite` spelling in the 2-d frame."""
    SPELLINGS[key] = Spelling(lambda: Frame(Excite(write, **how)), (want or Want(),))  # type: ignore[arg-type]


def pooled(x: Tensor) -> Tensor:
    return F.adaptive_avg_pool2d(x, 1)


# -- shapes: how (B, C) becomes (B, C, 1, 1) ------------------------------------------------------

spelled("view", lambda m, x: x * torch.sigmoid(m.mlp(mean(x))).view(*x.shape[:2], 1, 1))
spelled("view -1", lambda m, x: x * torch.sigmoid(m.mlp(mean(x))).view(len(x), -1, 1, 1))
spelled("unsqueeze", lambda m, x: x * torch.sigmoid(m.mlp(mean(x))).unsqueeze(-1).unsqueeze(-1))
spelled("index None", lambda m, x: x * torch.sigmoid(m.mlp(mean(x)))[:, :, None, None])
spelled("index ...", lambda m, x: torch.sigmoid(m.mlp(mean(x)))[..., None, None] * x)
spelled("expand_as", lambda m, x: x * wide(torch.sigmoid(m.mlp(mean(x)))).expand_as(x))
spelled("expand", lambda m, x: x * wide(torch.sigmoid(m.mlp(mean(x)))).expand(*x.shape))
spelled("repeat", lambda m, x: x * wide(m.mlp(mean(x)).sigmoid()).repeat(1, 1, *x.shape[2:]))
spelled("reshape_as", lambda m, x: x * m.mlp(pooled(x).flatten(1)).sigmoid().reshape(-1, C, 1, 1))
spelled("unflatten", lambda m, x: x * m.mlp(mean(x)).sigmoid().unflatten(1, (C, 1, 1)))
spelled("flatten", lambda m, x: x * wide(torch.sigmoid(m.mlp(torch.flatten(pooled(x), 1)))))
spelled("squeeze", lambda m, x: x * wide(torch.sigmoid(m.mlp(pooled(x).squeeze(-1).squeeze(-1)))))
spelled("conv", lambda m, x: x * torch.sigmoid(m.mlp(pooled(x))), conv=True)
spelled("conv keepdim", lambda m, x: x * m.mlp(x.mean((2, 3), keepdim=True)).sigmoid(), conv=True)
spelled("no bias", lambda m, x: x * wide(torch.sigmoid(m.mlp(mean(x)))), bias=False)
spelled("conv no bias", lambda m, x: x * m.mlp(pooled(x)).sigmoid(), conv=True, bias=False)
spelled(
    "flat map",
    lambda m, x: (x.flatten(2) * m.mlp(x.flatten(2).mean(2)).sigmoid()[:, :, None]).view_as(x),
)
spelled(
    "batch and channels in one",
    lambda m, x: (x.reshape(-1, *x.shape[2:]) * m.mlp(mean(x)).sigmoid().reshape(-1, 1, 1)).reshape(
        x.shape
    ),
)
spelled(
    "channels last by hand",
    lambda m, x: (
        (y := x.permute(0, 2, 3, 1)) * m.mlp(y.mean((1, 2))).sigmoid()[:, None, None]
    ).permute(0, 3, 1, 2),
)
spelled(
    "tokens",
    lambda m, x: (
        ((y := x.flatten(2).transpose(1, 2)) * m.mlp(y.mean(1, keepdim=True)).sigmoid())
        .transpose(1, 2)
        .view_as(x)
    ),
)

# -- products ------------------------------------------------------------------------------------

spelled("einsum", lambda m, x: torch.einsum("bchw,bc->bchw", x, m.mlp(mean(x)).sigmoid()))
spelled("einsum turned", lambda m, x: torch.einsum("bc,bchw->bchw", m.mlp(mean(x)).sigmoid(), x))
spelled(
    "einsum flat",
    lambda m, x: torch.einsum("ncl,nc->ncl", x.flatten(2), m.mlp(mean(x)).sigmoid()).view_as(x),
)
spelled(
    "einsum to nhwc",
    lambda m, x: torch.einsum("bchw,bc->bhwc", x, m.mlp(mean(x)).sigmoid()).permute(0, 3, 1, 2),
)
spelled(
    "einsum over excitations",
    lambda m, x: (
        x
        * torch.einsum("bh,ch->bc", F.relu(m.fc1(mean(x))), m.fc2.weight)
        .add(m.fc2.bias)
        .sigmoid()[..., None, None]
    ),
)
spelled("mul_", lambda m, x: x.clone().mul_(wide(m.mlp(mean(x)).sigmoid())))
spelled("torch.mul", lambda m, x: torch.mul(x, wide(m.mlp(mean(x)).sigmoid())))
spelled("multiply", lambda m, x: torch.multiply(x, wide(m.mlp(mean(x)).sigmoid())))
spelled(
    "mul out",
    lambda m, x: (
        torch.mul(x, wide(m.mlp(mean(x)).sigmoid()), out=torch.empty_like(x))
        if not torch.is_grad_enabled()
        else x * wide(m.mlp(mean(x)).sigmoid())
    ),
)


spelled(
    "bmm of one by one",
    lambda m, x: torch.bmm(
        x.reshape(-1, x[0, 0].numel(), 1), m.mlp(mean(x)).sigmoid().reshape(-1, 1, 1)
    ).view_as(x),
)
spelled(
    "conv groups apart",
    lambda m, x: (
        x.unflatten(1, (2, -1)) * m.mlp(mean(x)).sigmoid().view(-1, 2, C // 2, 1, 1)
    ).flatten(1, 2),
)
spelled(
    "channels first of all",
    lambda m, x: (x.permute(1, 2, 3, 0) * m.mlp(mean(x)).sigmoid().t()[:, None, None]).permute(
        3, 0, 1, 2
    ),
)


def _times_assign(m: Excite, x: Tensor) -> Tensor:
    y = x + 0
    y *= wide(m.mlp(mean(x)).sigmoid())
    return y


def _write_view(m: Excite, x: Tensor) -> Tensor:
    y = x + 0
    y.view(len(x), C, -1).mul_(m.mlp(mean(x)).sigmoid()[:, :, None])
    return y


def _divide_assign(m: Excite, x: Tensor) -> Tensor:
    y = x + 0
    y /= 1 + wide(m.mlp(mean(x))).neg().exp()
    return y


spelled("divided by 1 + exp", lambda m, x: x / (1 + torch.exp(-wide(m.mlp(mean(x))))))
spelled("divided, flat", lambda m, x: x.div(wide(m.mlp(mean(x)).mul(-1).exp() + 1).expand_as(x)))
spelled("/=", _divide_assign)
spelled("lerp", lambda m, x: torch.zeros_like(x).lerp(x, wide(m.mlp(mean(x)).sigmoid())))
spelled("lerp of two", lambda m, x: torch.lerp(x, 2 * x, wide(m.mlp(mean(x)).sigmoid())))
spelled("*=", _times_assign)
spelled("mul_ on a view", _write_view)

# -- activations ---------------------------------------------------------------------------------


def act(key: str, write: Callable[[Tensor], Tensor], name: str, closed: object = None) -> None:
    spelled(
        key,
        lambda m, x: x * wide(write(m.mlp(mean(x)))),
        want=Want(activation=name),
        act=closed or write,
    )


act("sigmoid module", nn.Sigmoid(), "sigmoid")
act("sigmoid method in place", lambda z: z.sigmoid_(), "sigmoid", torch.sigmoid)
act("sigmoid by hand", lambda z: 1 / (1 + torch.exp(-z)), "sigmoid", torch.sigmoid)
act("sigmoid by pow", lambda z: (1 + (-z).exp()).pow(-1), "sigmoid", torch.sigmoid)
act("sigmoid by a power", lambda z: 1 / (1 + math.e**-z), "sigmoid", torch.sigmoid)
act("sigmoid by tanh", lambda z: 0.5 * torch.tanh(0.5 * z) + 0.5, "tanh", torch.sigmoid)
act(
    "sigmoid of two logits",
    lambda z: torch.stack([z, 0 * z]).softmax(0)[0],
    "softmax",
    torch.sigmoid,
)
act("hardsigmoid module", nn.Hardsigmoid(), "hardsigmoid", hard)
act("hardsigmoid function", F.hardsigmoid, "hardsigmoid", hard)
act("hardsigmoid in place", nn.Hardsigmoid(inplace=True), "hardsigmoid", hard)
act("relu6 / 6", lambda z: F.relu6(z + 3) / 6, "hardsigmoid", hard)
act("relu6 module / 6", lambda z: nn.ReLU6()(z + 3.0) * (1 / 6), "hardsigmoid", hard)
act("relu6 in place / 6", lambda z: F.relu6(z + 3, inplace=True).div_(6.0), "hardsigmoid", hard)
act("clamp 0 6", lambda z: (z + 3).clamp(0, 6) / 6, "hardsigmoid", hard)
act("clamp 0 1", lambda z: (z / 6 + 0.5).clamp(0, 1), "hardsigmoid", hard)
act("clamp min max", lambda z: (z * 0.2 + 0.5).clamp(min=0.0).clamp(max=1.0), "hardsigmoid")
act("hardtanh", lambda z: F.hardtanh(z * 0.2 + 0.5, 0, 1), "hardsigmoid")
act("tanh", torch.tanh, "tanh")
act("1 + tanh", lambda z: 1 + torch.tanh(z), "tanh")
act("1 + sigmoid", lambda z: 1.0 + torch.sigmoid(z), "sigmoid")
act("2 sigmoid", lambda z: 2 * torch.sigmoid(z), "sigmoid")
act("relu", torch.relu, "relu", lambda z: z.clamp(min=0))
act("softmax over channels", lambda z: z.softmax(1), "softmax")
act("softmax times C", lambda z: C * F.softmax(z, dim=-1), "softmax")
act("no activation", lambda z: z, "identity")
act("softplus", F.softplus, "softplus")
act("elu", lambda z: F.elu(z) + 1, "elu")
act("exp", torch.exp, "exp")
act("log of sigmoid", lambda z: F.logsigmoid(z).exp(), "exp", torch.sigmoid)
act("temperature", lambda z: torch.sigmoid(z / 0.5), "sigmoid")
act("threshold", lambda z: torch.where((g := z.sigmoid()) > 0.5, g, torch.zeros_like(g)), "sigmoid")
act("scripted", torch.jit.script(nn.Sigmoid()), "sigmoid")
act("dropped out", lambda z: F.dropout(z.sigmoid(), 0.1, training=False), "sigmoid")
act("normalised by its mean", lambda z: (g := z.sigmoid()) / g.mean(1, keepdim=True), "sigmoid")
act("mul of two", lambda z: z.sigmoid() * z.tanh(), "tanh")

# -- squeezes ------------------------------------------------------------------------------------


def std(x: Tensor) -> Tensor:
    return x.std((2, 3))


def squeezed(key: str, write: Callable[[Tensor], Tensor], kind: str, closed: object = None) -> None:
    spelled(
        key,
        lambda m, x: x * wide(m.mlp(write(x)).sigmoid()),
        want=Want(squeeze=kind),
        squeeze=closed or write,
    )


squeezed("adaptive avg module", lambda x: nn.AdaptiveAvgPool2d(1)(x).flatten(1), "mean", mean)
squeezed("adaptive (1, 1)", lambda x: nn.AdaptiveAvgPool2d((1, 1))(x)[:, :, 0, 0], "mean", mean)
squeezed("avg_pool2d", lambda x: F.avg_pool2d(x, x.shape[2:]).flatten(1), "mean", mean)
squeezed("avg_pool2d list", lambda x: F.avg_pool2d(x, list(x.shape[2:])).view(-1, C), "mean", mean)
squeezed("mean twice", lambda x: x.mean(2).mean(2), "mean", mean)
squeezed(
    "mean 3 then 2",
    lambda x: x.mean(3, keepdim=True).mean(2, keepdim=True).flatten(1),
    "mean",
    mean,
)
squeezed("view mean", lambda x: x.view(*x.shape[:2], -1).mean(-1), "mean", mean)
squeezed("view mean dim 2", lambda x: x.flatten(2).mean(dim=2), "mean", mean)
squeezed("sum / area", lambda x: x.sum((2, 3)) / (x.shape[2] * x.shape[3]), "mean", mean)
squeezed("sum", lambda x: x.sum(dim=[2, 3]), "mean")
squeezed("einsum mean", lambda x: torch.einsum("bchw->bc", x) / x[0, 0].numel(), "mean", mean)
squeezed("torch.mean", lambda x: torch.mean(x, dim=(-2, -1)), "mean", mean)
squeezed("interpolate", lambda x: F.interpolate(x, 1, mode="area").flatten(1), "mean", mean)
squeezed("max", lambda x: x.flatten(2).max(2).values, "max", peak)
squeezed("max twice", lambda x: x.max(2)[0].max(2)[0], "max", peak)
squeezed("amax", lambda x: x.amax((2, 3)), "max", peak)
squeezed("adaptive max", lambda x: F.adaptive_max_pool2d(x, 1).flatten(1), "max", peak)
squeezed("max_pool2d", lambda x: F.max_pool2d(x, x.shape[2:]).flatten(1), "max", peak)
squeezed("mean + max", lambda x: mean(x) + peak(x), "mean+max")
squeezed("std", lambda x: x.std((2, 3)), "other")
squeezed("mean + std", lambda x: mean(x) + x.flatten(2).std(2), "other")
squeezed("variance by hand", lambda x: (x - x.mean((2, 3), True)).square().mean((2, 3)), "mean")
squeezed("norm", lambda x: x.flatten(2).norm(dim=2), "other")
squeezed("rms", lambda x: x.square().mean((2, 3)).sqrt(), "mean")
squeezed("generalised mean", lambda x: x.clamp(min=1e-6).pow(3).mean((2, 3)).pow(1 / 3), "mean")
squeezed("logsumexp", lambda x: x.flatten(2).logsumexp(2), "other")
squeezed("median", lambda x: x.flatten(2).median(2)[0], "other")
squeezed("top", lambda x: x.flatten(2).topk(3, 2)[0].mean(2), "mean")
squeezed("of the input's square", lambda x: (x * x).mean((2, 3)), "mean")
squeezed("detached", lambda x: x.detach().mean((2, 3)), "mean")
squeezed("in float32", lambda x: x.float().mean((2, 3)).to(x.dtype), "mean", mean)


# -- whole gate modules, each with its own closed form -------------------------------------------


def framed(key: str, gate: Callable[[], nn.Module], *wants: Want, dims: int = 2) -> None:
    size = (2, 3, *(12, 10, 8)[:dims])
    SPELLINGS[key] = Spelling(lambda: Frame(gate(), dims), wants or (Want(),), size)


class ChannelGate(nn.Module):
    """CBAM's channel gate (Woo et al. 2018): one MLP on mean and max."""

    def __init__(self) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Conv2d(C, H, 1), nn.ReLU(), nn.Conv2d(H, C, 1))

    def forward(self, x: Tensor) -> Tensor:
        both = self.mlp(F.adaptive_avg_pool2d(x, 1)) + self.mlp(F.adaptive_max_pool2d(x, 1))
        return x * torch.sigmoid(both)

    def closed(self, x: Tensor) -> Tensor:
        def mlp(s: Tensor) -> Tensor:
            for i in (0, 2):
                s = s.clamp(min=0) if i else s
                s = s @ self.mlp[i].weight[:, :, 0, 0].T + self.mlp[i].bias
            return s

        return 1 / (1 + torch.exp(-mlp(mean(x)) - mlp(peak(x))))


class SpatialGate(nn.Module):
    """CBAM's spatial gate: one number per position, no channel gate."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 1, 7, padding=3)

    def forward(self, x: Tensor) -> Tensor:
        maps = torch.cat([x.mean(1, keepdim=True), x.amax(1, keepdim=True)], 1)
        return x * torch.sigmoid(self.conv(maps))


class Cbam(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.channel, self.space = ChannelGate(), SpatialGate()

    def forward(self, x: Tensor) -> Tensor:
        return self.space(self.channel(x))

    def closed(self, x: Tensor) -> Tensor:
        return self.channel.closed(x)


class Eca(nn.Module):
    """ECA (Wang et al. 2020): a 1-d convolution over neighbouring channels."""

    def __init__(self, mode: str = "zeros") -> None:
        super().__init__()
        self.conv = nn.Conv1d(1, 1, 3, padding=1, bias=False, padding_mode=mode)

    def forward(self, x: Tensor) -> Tensor:
        y = F.adaptive_avg_pool2d(x, 1)
        y = self.conv(y.squeeze(-1).transpose(-1, -2)).transpose(-1, -2).unsqueeze(-1)
        return x * y.sigmoid().expand_as(x)

    def closed(self, x: Tensor) -> Tensor:
        mode = "circular" if self.conv.padding_mode == "circular" else "constant"
        s = F.pad(mean(x)[:, None], (1, 1), mode=mode)[:, 0]
        w = self.conv.weight.flatten()
        return (s[:, :-2] * w[0] + s[:, 1:-1] * w[1] + s[:, 2:] * w[2]).sigmoid()


class EcaView(Eca):
    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x.mean((2, 3)).view(len(x), 1, -1)).sigmoid()
        return x * y.view(len(x), -1, 1, 1)


class OneLayer(nn.Module):
    """Effective SE (Lee and Park 2020): one layer, no bottleneck, hard sigmoid."""

    def __init__(self, layer: nn.Module, gate: nn.Module) -> None:
        super().__init__()
        self.fc, self.gate = layer, gate

    def forward(self, x: Tensor) -> Tensor:
        s = x.mean((2, 3), keepdim=isinstance(self.fc, nn.Conv2d))
        return x * self.gate(self.fc(s)).view(len(x), -1, 1, 1)

    def closed(self, x: Tensor) -> Tensor:
        z = mean(x) @ self.fc.weight.flatten(1).T + self.fc.bias
        return hard(z) if isinstance(self.gate, nn.Hardsigmoid) else z.sigmoid()


class PerChannel(nn.Module):
    """One weight and bias per channel on its own mean and std (SRM, GCT, SGE without groups)."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.rand(C)), nn.Parameter(torch.rand(C))

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(mean(x) * self.weight + self.bias)[:, :, None, None]

    def closed(self, x: Tensor) -> Tensor:
        return 1 / (1 + torch.exp(-(mean(x) * self.weight) - self.bias))


class StyleGate(nn.Module):
    """SRM (Lee et al. 2019): mean and std of a channel through a weight of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.cfc, self.bn = nn.Conv1d(C, C, 2, groups=C, bias=False), nn.BatchNorm1d(C)

    def forward(self, x: Tensor) -> Tensor:
        flat = x.flatten(2)
        u = torch.stack([flat.mean(2), flat.std(2)], -1)
        return x * torch.sigmoid(self.bn(self.cfc(u))).view(len(x), C, 1, 1)

    def closed(self, x: Tensor) -> Tensor:
        w = self.cfc.weight[:, 0]
        z = mean(x) * w[:, 0] + std(x) * w[:, 1]
        return (z / (1 + self.bn.eps) ** 0.5).sigmoid()


class GaussianContext(nn.Module):
    """GCT (Ruan et al. 2021): no parameter, exp(-z^2 / 2c^2) of the standardised means."""

    def forward(self, x: Tensor) -> Tensor:
        y = F.adaptive_avg_pool2d(x, 1)
        z = (y - y.mean(1, keepdim=True)) / (y.var(1, keepdim=True) + 1e-5).sqrt()
        return x * torch.exp(-(z**2) / 8)

    def closed(self, x: Tensor) -> Tensor:
        s = mean(x)
        return torch.exp(-((s - s.mean(1, True)) ** 2) / (s.var(1, keepdim=True) + 1e-5) / 8)


class Normed(nn.Module):
    """A norm inside the excitation."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.fc1, self.norm, self.fc2 = nn.Linear(C, H), norm, nn.Linear(H, C)

    def forward(self, x: Tensor) -> Tensor:
        return x * wide(torch.sigmoid(self.fc2(F.relu(self.norm(self.fc1(mean(x)))))))

    def closed(self, x: Tensor) -> Tensor:
        z = mean(x) @ self.fc1.weight.T + self.fc1.bias
        if isinstance(self.norm, nn.LayerNorm):
            z = (z - z.mean(1, True)) / (z.var(1, correction=0, keepdim=True) + 1e-5).sqrt()
        else:
            z = z / (1 + self.norm.eps) ** 0.5
        return (z.clamp(min=0) @ self.fc2.weight.T + self.fc2.bias).sigmoid()


class Nd(nn.Module):
    """SE on (B, C, T) and (B, C, D, H, W)."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(C, C)

    def forward(self, x: Tensor) -> Tensor:
        g = self.fc(x.flatten(2).mean(2)).sigmoid()
        return x * g.reshape(*g.shape, *[1] * (x.dim() - 2))

    def closed(self, x: Tensor) -> Tensor:
        return (mean(x) @ self.fc.weight.T + self.fc.bias).sigmoid()


class Row(nn.Module):
    """Several gates in a row."""

    def __init__(self, *gates: nn.Module) -> None:
        super().__init__()
        self.gates = nn.ModuleList(gates)

    def forward(self, x: Tensor) -> Tensor:
        for gate in self.gates:
            x = gate(x)
        return x

    def closed(self, x: Tensor) -> list[Tensor]:
        made = []
        for gate in self.gates:
            made.append(gate.closed(x))
            x = x * made[-1].view(len(x), C, 1, 1)
        return made


class Skip(Nd):
    """x + x * g, written as one addcmul."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.addcmul(x, x, wide(self.fc(mean(x)).sigmoid()))


class FromOther(nn.Module):
    """The gate of one map is squeezed from another one (SCA, attention between branches)."""

    def __init__(self) -> None:
        super().__init__()
        self.other, self.fc = nn.Conv2d(C, C, 3, padding=1), nn.Linear(C, C)

    def forward(self, x: Tensor) -> Tensor:
        return x * wide(self.fc(mean(F.relu(self.other(x)))).sigmoid())

    def closed(self, x: Tensor) -> Tensor:
        return (mean(F.relu(self.other(x))) @ self.fc.weight.T + self.fc.bias).sigmoid()


class GlobalContext(nn.Module):
    """GC block with a multiplicative fusion: an attention pooling is the squeeze."""

    def __init__(self) -> None:
        super().__init__()
        self.attend, self.fc = nn.Conv2d(C, 1, 1), nn.Conv2d(C, C, 1)

    def forward(self, x: Tensor) -> Tensor:
        weights = self.attend(x).flatten(2).softmax(-1).unsqueeze(3)
        context = torch.matmul(x.flatten(2).unsqueeze(1), weights).view(len(x), C, 1, 1)
        return x * self.fc(context).sigmoid()

    def closed(self, x: Tensor) -> Tensor:
        weights = self.attend(x).flatten(2).softmax(-1)
        z = (x.flatten(2) * weights).sum(2) @ self.fc.weight.flatten(1).T + self.fc.bias
        return z.sigmoid()


framed("CBAM channel gate", ChannelGate, Want(squeeze="mean+max"))
framed("CBAM", Cbam, Want(name="gate.channel", squeeze="mean+max"))
framed("ECA", Eca)
framed("ECA circular", lambda: Eca("circular"))
framed("ECA view", EcaView)
framed(
    "effective SE", lambda: OneLayer(nn.Conv2d(C, C, 1), nn.Hardsigmoid()),
    Want(activation="hardsigmoid"),
)  # fmt: skip
framed("one linear layer", lambda: OneLayer(nn.Linear(C, C), nn.Sigmoid()))
framed("per channel", PerChannel)
framed("SRM", StyleGate, Want(squeeze="other"))
framed("GCT", GaussianContext, Want(activation="exp"))
framed("BN inside", lambda: Normed(nn.BatchNorm1d(H)))
framed("LN inside", lambda: Normed(nn.LayerNorm(H)))
framed("1-d", Nd, dims=1)
framed("3-d", Nd, dims=3)
framed("addcmul", Skip)
framed("squeezed from another map", FromOther, Want(scales=("conv",)))
framed("global context times", GlobalContext, Want(squeeze="other"))
framed(
    "three in a row", lambda: Row(Eca(), ChannelGate(), OneLayer(nn.Linear(C, C), nn.Sigmoid())),
    Want(name="gate.gates.0"), Want(name="gate.gates.1", squeeze="mean+max"),
    Want(name="gate.gates.2"),
)  # fmt: skip


# -- blocks --------------------------------------------------------------------------------------


class Lone(nn.Module):
    """An excitation that returns the gate and leaves the product to its block."""

    def __init__(self, channels: int = C) -> None:
        super().__init__()
        self.fc = nn.Linear(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.closed(x).view(len(x), -1, 1, 1)

    def closed(self, x: Tensor) -> Tensor:
        return torch.sigmoid(self.fc(mean(x)))


class Functional(nn.Module):
    """No module but convolutions: everything inline on bare parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, C, 3, padding=1)
        self.w1, self.b1 = nn.Parameter(torch.rand(H, C) - 0.5), nn.Parameter(torch.rand(H))
        self.w2 = nn.Parameter(torch.rand(C, H, 1, 1) - 0.5)
        self.kernel = nn.Parameter(torch.rand(C, C, 3, 3) - 0.5)
        self.head = nn.Linear(C, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(F.conv2d(self.stem(x), self.kernel, padding=1))
        g = F.relu(F.linear(y.mean((2, 3)), self.w1, self.b1))
        g = F.conv2d(g[:, :, None, None], self.w2)
        return self.head((y * torch.sigmoid(g)).mean((2, 3)))

    def closed(self, x: Tensor) -> list[Tensor]:
        y = F.relu(F.conv2d(self.stem(x), self.kernel, padding=1))
        h = (mean(y) @ self.w1.T + self.b1).clamp(min=0)
        return [torch.sigmoid(h @ self.w2[:, :, 0, 0].T)]


class Placed(nn.Module):
    """One residual block with a gate at `place` (Hu et al. 2018, fig. 5)."""

    def __init__(self, place: str) -> None:
        super().__init__()
        self.place = place
        self.stem = nn.Conv2d(3, C, 3, padding=1)
        self.conv1, self.conv2 = (nn.Conv2d(C, C, 3, padding=1) for _ in "12")
        self.se, self.head = Lone(), nn.Linear(C, 3)

    def gated(self, x: Tensor, here: str) -> Tensor:
        return x * self.se(x) if here == self.place else x

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x))
        y = F.relu(self.conv1(self.gated(x, "pre")))
        y = self.gated(self.conv2(self.gated(y, "inner")), "standard")
        x = self.gated(F.relu(self.gated(x, "identity") + y), "post")
        return self.head(x.mean((2, 3)))

    def closed(self, x: Tensor) -> list[Tensor]:
        x = F.relu(self.stem(x))
        y = F.relu(self.conv1(x))
        at = {"pre": x, "identity": x, "inner": y, "standard": self.conv2(y)}
        at["post"] = F.relu(x + self.conv2(y))
        return [self.se.closed(at[self.place])]


class Inception(nn.Module):
    """A gate on a concatenation."""

    def __init__(self) -> None:
        super().__init__()
        self.branches = nn.ModuleList(nn.Conv2d(3, n, 1) for n in (4, 6, 2))
        self.se, self.head = SE(12), nn.Conv2d(12, 3, 1)

    def cat(self, x: Tensor) -> Tensor:
        return torch.cat([F.relu(b(x)) for b in self.branches], 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.se(self.cat(x))).mean((2, 3))

    def closed(self, x: Tensor) -> list[Tensor]:
        return [self.se.fc(mean(self.cat(x)))]


class Shared(nn.Module):
    """One gate module in three blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.convs = nn.ModuleList(nn.Conv2d(i, C, 3, padding=1) for i in (3, C, C))
        self.se, self.head = Lone(), nn.Conv2d(C, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        for conv in self.convs:
            x = conv(x)
            x = x * self.se(x)
        return self.head(x).mean((2, 3))

    def closed(self, x: Tensor) -> list[Tensor]:
        made = []
        for conv in self.convs:
            x = conv(x)
            made.append(self.se.closed(x))
            x = x * self.se(x)
        return made


class Grouped(nn.Module):
    """A gate on a grouped convolution, then one on a depthwise one."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.grouped = nn.Conv2d(3, C, 1), nn.Conv2d(C, C, 3, padding=1, groups=4)
        self.se1 = SE(C)
        self.depthwise = nn.Conv2d(C, C, 3, padding=1, groups=C)
        self.se2, self.head = SE(C), nn.Conv2d(C, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.se1(F.relu(self.grouped(self.stem(x))))
        return self.head(self.se2(F.relu(self.depthwise(x)))).mean((2, 3))

    def closed(self, x: Tensor) -> list[Tensor]:
        x = F.relu(self.grouped(self.stem(x)))
        first = self.se1.fc(mean(x))
        x = F.relu(self.depthwise(x * wide(first)))
        return [first, self.se2.fc(mean(x))]


class Selective(nn.Module):
    """SK (Li et al. 2019): a softmax over two branches, in several spellings."""

    def __init__(self, spelling: str, branches: int = 2) -> None:
        super().__init__()
        self.spelling, self.n = spelling, branches
        self.convs = nn.ModuleList(
            nn.Conv2d(3, C, 3, padding=1 + i, dilation=1 + i) for i in range(branches)
        )
        self.fc, self.select = nn.Linear(C, H), nn.Linear(H, branches * C)
        self.head = nn.Conv2d(C, 3, 1)

    def weights(self, maps: list[Tensor]) -> Tensor:
        z = self.select(F.relu(self.fc(sum(maps).mean((2, 3)))))
        return z.view(len(z), self.n, C).softmax(1)

    def forward(self, x: Tensor) -> Tensor:
        maps = [F.relu(conv(x)) for conv in self.convs]
        w = self.weights(maps)
        return self.head(self.fuse(maps, w)).mean((2, 3))

    def fuse(self, maps: list[Tensor], w: Tensor) -> Tensor:
        if self.spelling == "stack":
            return (torch.stack(maps, 1) * w[..., None, None]).sum(1)
        if self.spelling == "logits stacked":  # the sample is not the first dimension
            w = w.log().transpose(0, 1).contiguous().softmax(0)
            return (torch.stack(maps) * w[..., None, None]).sum(0)
        if self.spelling == "stack 0":
            return (torch.stack(maps) * w.transpose(0, 1)[..., None, None]).sum(0)
        if self.spelling == "cat":
            b, _, h, v = maps[0].shape
            return (torch.cat(maps, 1) * w.view(b, -1, 1, 1)).view(b, self.n, C, h, v).sum(1)
        if self.spelling == "bkchw,bkc->bchw":
            return torch.einsum("bkchw,bkc->bchw", torch.stack(maps, 1), w)
        if self.spelling == "kbchw,bkc->bchw":
            return torch.einsum("kbchw,bkc->bchw", torch.stack(maps), w)
        w = w[..., None, None]
        parts: dict[str, Callable[[], list[Tensor]]] = {
            "split": lambda: [p.squeeze(1) for p in torch.split(w, 1, 1)],
            "chunk": lambda: [p[:, 0] for p in w.chunk(self.n, 1)],
            "unbind": lambda: list(w.unbind(1)),
            "select": lambda: [w[:, i] for i in range(self.n)],
        }
        return sum(m * p for m, p in zip(maps, parts[self.spelling]()))

    def closed(self, x: Tensor) -> list[Tensor]:
        maps = [F.relu(conv(x)) for conv in self.convs]
        z = self.select(F.relu(self.fc(mean(torch.stack(maps).sum(0)))))
        e = z.exp().view(len(z), self.n, C)
        return list((e / e.sum(1, keepdim=True)).unbind(1))


class SplitAttention(nn.Module):
    """ResNeSt (Zhang et al. 2020) with radix 2 and two cardinal groups."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 2 * C, 3, padding=1)
        self.fc1, self.fc2 = nn.Conv2d(C, H, 1, groups=2), nn.Conv2d(H, 2 * C, 1, groups=2)
        self.head = nn.Conv2d(C, 3, 1)

    def logits(self, maps: Tensor) -> Tensor:
        return self.fc2(F.relu(self.fc1(maps.sum(1).mean((2, 3), keepdim=True))))

    def maps(self, x: Tensor) -> Tensor:
        y = F.relu(self.conv(x))
        return y.view(len(y), 2, C, *y.shape[2:])

    def forward(self, x: Tensor) -> Tensor:
        maps = self.maps(x)
        z = self.logits(maps).view(len(x), 2, 2, -1).transpose(1, 2).softmax(1)
        z = z.reshape(len(x), -1).view(len(x), 2, C, 1, 1)
        return self.head((maps * z).sum(1).contiguous()).mean((2, 3))

    def closed(self, x: Tensor) -> list[Tensor]:
        z = self.logits(self.maps(x))[:, :, 0, 0].view(len(x), 2, 2, C // 2)
        first = torch.sigmoid(z[:, :, 0] - z[:, :, 1]).flatten(1)
        return [torch.cat([first, 1 - first], 1)]


class Tiny(nn.Module):
    """The map is 1x1 where the gate sits, as in the last stage at a small input."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.conv = nn.Conv2d(3, C, 3, stride=16), nn.Conv2d(C, C, 1)
        self.se, self.head = SE(C), nn.Conv2d(C, 3, 1)

    def features(self, x: Tensor) -> Tensor:
        return F.relu(self.conv(self.stem(x)))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.se(self.features(x))).mean((2, 3))

    def closed(self, x: Tensor) -> list[Tensor]:
        return [self.se.fc(mean(self.features(x)))]


def placed(place: str, *scales: str) -> None:
    placement = "inner" if place == "inner" else "residual"
    want = Want(name="se", placement=placement, scales=scales)
    SPELLINGS[f"SE {place}"] = Spelling(lambda: Placed(place), (want,))


SPELLINGS["functional"] = Spelling(Functional, (Want(name=":sigmoid", scales=("kernel",)),))
placed("standard", "conv2")
placed("pre", "stem")
placed("identity", "stem")
placed("inner", "conv1")
placed("post", "conv2")
SPELLINGS["SE on a concatenation"] = Spelling(
    Inception, (Want(name="se", channels=12, scales=("branches.0", "branches.1", "branches.2")),)
)
SPELLINGS["shared by three blocks"] = Spelling(
    Shared,
    (
        Want(name="se", scales=("convs.0",)),
        Want(name="se#2", scales=("convs.1",)),
        Want(name="se#3", scales=("convs.2",)),
    ),
)
SPELLINGS["grouped and depthwise"] = Spelling(
    Grouped, (Want(name="se1", scales=("grouped",)), Want(name="se2", scales=("depthwise",)))
)
for _how in ("stack", "logits stacked", "stack 0", "cat", "split", "chunk", "unbind", "select",
             "bkchw,bkc->bchw", "kbchw,bkc->bchw"):  # fmt: skip
    for _n in (2, 3):
        SPELLINGS[f"SK {_how} of {_n}"] = Spelling(
            lambda how=_how, n=_n: Selective(how, n),  # type: ignore[misc]
            tuple(
                Want(name=f":softmax[{i}]", activation="softmax", scales=(f"convs.{i}",))
                for i in range(_n)
            ),
        )
SPELLINGS["split attention"] = Spelling(
    SplitAttention, (Want(name=":softmax", channels=2 * C, activation="softmax"),)
)
SPELLINGS["1x1 maps"] = Spelling(Tiny, (Want(name="se", scales=("conv",)),))


# -- no gates ------------------------------------------------------------------------------------


class Negative(nn.Module):
    """conv -> `write` -> head, with a few parameters to write with."""

    def __init__(self, write: Callable[[nn.Module, Tensor], Tensor], size: int = C) -> None:
        super().__init__()
        self.conv, self.write = nn.Conv2d(3, size, 3, padding=1), write
        self.head = nn.LazyLinear(3)
        self.gamma = nn.Parameter(torch.full((C, 1, 1), 0.1))
        self.one, self.fc = nn.Conv2d(C, 1, 1), nn.Linear(C, C)
        self.wide, self.score = nn.Conv2d(C, 2 * C, 1), nn.Linear(C, 1)
        self.narrow, self.route = nn.Conv2d(C, C, 1), nn.Linear(C, 2)
        self.experts = nn.Parameter(torch.rand(2, C * C))

    def forward(self, x: Tensor) -> Tensor:
        y = self.write(self, F.relu(self.conv(x)))
        return self.head(y.flatten(2).mean(2) if y.dim() > 2 else y)


def _norm(m: nn.Module, x: Tensor) -> Tensor:
    """Instance norm, by hand."""
    return (x - x.mean((2, 3), True)) * (x.var((2, 3), keepdim=True) + 1e-5).rsqrt()


def _grn(m: nn.Module, x: Tensor) -> Tensor:
    """Global response normalisation (ConvNeXt V2)."""
    g = x.norm(dim=(2, 3), keepdim=True)
    return m.gamma * (x * (g / (g.mean(1, keepdim=True) + 1e-6))) + x


def _attention(m: nn.Module, x: Tensor) -> Tensor:
    t = x.flatten(2).transpose(1, 2)
    weights = (t @ m.fc(t).transpose(1, 2) / C**0.5).softmax(-1)
    return (weights @ t).transpose(1, 2)


def _coordinate(m: nn.Module, x: Tensor) -> Tensor:
    """Coordinate attention: a gate for every row and one for every column."""
    rows, columns = x.mean(3, keepdim=True), x.mean(2, keepdim=True)
    return x * m.narrow(rows).sigmoid() * m.narrow(columns).sigmoid()


def _routed(m: nn.Module, x: Tensor) -> Tensor:
    """CondConv: the kernel is a mixture, weighed for every sample."""
    kernels = (m.route(mean(x)).sigmoid() @ m.experts).view(len(x) * C, C, 1, 1)
    y = F.conv2d(x.reshape(1, -1, *x.shape[2:]), kernels, groups=len(x))
    return y.view(x.shape)


def _head(m: nn.Module, x: Tensor) -> Tensor:
    """Hard swish by hand on pooled features, in front of a classifier."""
    s = m.fc(mean(x))
    return s * F.relu6(s + 3) / 6


class Film(nn.Module):
    """Scale and shift from a second input: no squeeze of a map."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.fc = nn.Conv2d(3, C, 3, padding=1), nn.Linear(5, 2 * C)
        self.head = nn.Conv2d(C, 3, 1)

    def forward(self, x: Tensor, vector: Tensor) -> Tensor:
        scale, shift = self.fc(vector).sigmoid().chunk(2, 1)
        return self.head(self.conv(x) * wide(scale) + wide(shift)).mean((2, 3))


_WRITTEN: dict[str, Callable[[Negative, Tensor], Tensor]] = {
    "nothing": lambda m, x: x,
    "LayerScale": lambda m, x: x * m.gamma,
    "a learned sigmoid mask": lambda m, x: x * m.gamma.sigmoid(),
    "spatial attention": lambda m, x: x * m.one(x).sigmoid(),
    "CBAM's spatial gate": lambda m, x: SpatialGate()(x),
    "swish by hand": lambda m, x: x * torch.sigmoid(x),
    "swish by division": lambda m, x: x / (1 + torch.exp(-x)),
    "divided by its size": lambda m, x: x / x.flatten(2).norm(dim=2)[..., None, None].clamp_min(1),
    "softmax by hand": lambda m, x: x.exp() / (1 + x.exp().sum((2, 3), keepdim=True)),
    "lerp to zeros": lambda m, x: x.lerp(torch.zeros_like(x), wide(m.fc(mean(x)).sigmoid())),
    "lerp by a number": lambda m, x: torch.lerp(x, wide(m.fc(mean(x)).sigmoid()), 0.5),
    "hard swish by hand": lambda m, x: x * F.relu6(x + 3) / 6,
    "gelu by hand": lambda m, x: x * (0.5 * (1 + torch.erf(x / 2**0.5))),
    "GLU": lambda m, x: F.glu(m.wide(x), 1),
    "GLU by hand": lambda m, x: (y := m.wide(x).chunk(2, 1))[0] * y[1].sigmoid(),
    "gated by a map": lambda m, x: x * m.narrow(x).sigmoid(),
    "gated by a pooled map": lambda m, x: (
        x * F.interpolate(m.narrow(F.avg_pool2d(x, 2)), x.shape[2:]).sigmoid()
    ),
    "dropout": lambda m, x: F.dropout2d(x, 0.5, training=True),
    "drop path": lambda m, x: x * x.new_empty(len(x), 1, 1, 1).bernoulli_(0.9) / 0.9,
    "instance norm": _norm,
    "layer norm": lambda m, x: (x - x.mean(1, True)) * (x.var(1, keepdim=True) + 1e-5).rsqrt(),
    "global norm": lambda m, x: x * (x.var((1, 2, 3), keepdim=True) + 1e-5).rsqrt(),
    "l2 norm": lambda m, x: x / x.norm(dim=1, keepdim=True),
    "GRN": _grn,
    "scalar for every sample": lambda m, x: x * m.score(mean(x)).sigmoid().view(-1, 1, 1, 1),
    "stochastic depth by a policy": lambda m, x: (
        x + x * m.route(mean(x)).softmax(1)[:, :1, None, None]
    ),
    "attention over tokens": lambda m, x: (
        (t := x.flatten(2).transpose(1, 2)) * m.score(t).sigmoid()
    ).transpose(1, 2),
    "self-attention": _attention,
    "coordinate attention": _coordinate,
    "global context added": lambda m, x: x + wide(m.fc(mean(x)).sigmoid()),
    "CondConv": _routed,
    "swish on pooled features": lambda m, x: (s := mean(x)) * s.sigmoid(),
    "hard swish in the head": _head,
    "SE on pooled features": lambda m, x: (s := mean(x)) * m.fc(s).sigmoid(),
    "positions weighed by a descriptor": lambda m, x: torch.einsum(
        "bchw,bc->bhw", x, m.fc(mean(x)).sigmoid()
    )[:, None],
    "standardised": lambda m, x: x * (1 / (x.std((2, 3), keepdim=True) + 1e-5)),
}
NEGATIVES |= {key: lambda write=write: Negative(write) for key, write in _WRITTEN.items()}
