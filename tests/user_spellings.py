"""Channel gates as people write them, each with the gates (B, C) that it uses, worked out apart.

`USERS` maps a name to a module that takes a map and returns the gated map; `module.closed(x)` is
the gate. `SPREAD` are those that do more with the map than to scale it.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

C, H = 8, 4


class User(nn.Module):
    """Two linear layers and two convolutions with the same weights, and a way to write a gate."""

    def __init__(self, write: Callable[[User, Tensor], Tensor], closed: Closed, dims: int) -> None:
        super().__init__()
        self.write, self.form, self.dims = write, closed, dims
        self.fc1, self.fc2 = nn.Linear(C, H), nn.Linear(H, C)
        conv = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[dims - 1]
        self.conv1, self.conv2 = conv(C, H, 1), conv(H, C, 1)
        for layer, same in ((self.conv1, self.fc1), (self.conv2, self.fc2)):
            layer.weight.data = same.weight.data.view_as(layer.weight).clone()
            layer.bias.data = same.bias.data.clone()
        self.list = nn.ModuleList([self.fc1, nn.ReLU(), self.fc2, nn.Sigmoid()])
        self.steps = nn.Sequential(nn.AdaptiveAvgPool2d(1), self.conv1, nn.ReLU(), self.conv2)
        self.bn, self.prelu = nn.BatchNorm2d(H), nn.PReLU(H)
        self.both, self.mask, self.one = nn.Linear(2 * C, C), nn.Conv2d(C, 1, 1), nn.Linear(C, C)
        self.style = nn.Parameter(torch.randn(C, 2))
        nn.init.uniform_(self.bn.running_mean, -0.2, 0.2)

    def forward(self, x: Tensor) -> Tensor:
        return self.write(self, x)

    def closed(self, x: Tensor) -> Tensor:
        return self.form(self, x)

    def z(self, s: Tensor, act: Callable[[Tensor], Tensor] = torch.relu) -> Tensor:
        """The logits of pooled values (B, C)."""
        return self.fc2(act(self.fc1(s)))


Closed = Callable[[User, Tensor], Tensor]
USERS: dict[str, Callable[[], User]] = {}
SPREAD: set[str] = set()


def mean(x: Tensor) -> Tensor:
    return x.flatten(2).mean(2)


def standard(m: User, x: Tensor) -> Tensor:
    return torch.sigmoid(m.z(mean(x)))


def user(
    name: str, closed: Closed = standard, dims: int = 2, spread: bool = False
) -> Callable[[Callable[[User, Tensor], Tensor]], None]:
    """Register a way to write a gate."""

    def register(write: Callable[[User, Tensor], Tensor]) -> None:
        USERS[name] = lambda: User(write, closed, dims)
        if spread:
            SPREAD.add(name)

    return register


@user("channels last")
def _(m: User, x: Tensor) -> Tensor:
    y = x.permute(0, 2, 3, 1).contiguous()
    return (y * m.z(y.mean(dim=(1, 2))).sigmoid()[:, None, None, :]).permute(0, 3, 1, 2)


@user("memory format")
def _(m: User, x: Tensor) -> Tensor:
    x = x.contiguous(memory_format=torch.channels_last)
    return x * m.conv2(m.conv1(x.mean((2, 3), keepdim=True)).relu()).sigmoid()


@user("module list")
def _(m: User, x: Tensor) -> Tensor:
    s = F.adaptive_avg_pool2d(x, 1).flatten(1)
    for layer in m.list:
        s = layer(s)
    return x * s.view(x.size(0), x.size(1), 1, 1)


@user("sequential by index")
def _(m: User, x: Tensor) -> Tensor:
    s = m.steps[0](x)
    return x * F.sigmoid(m.steps[3](m.steps[2](m.steps[1](s))))


@user("sequential by slice")
def _(m: User, x: Tensor) -> Tensor:
    return x * m.steps[1:](m.steps[:1](x)).sigmoid()


def hard(m: User, x: Tensor) -> Tensor:
    return (m.z(mean(x)) / 6 + 0.5).clamp(0, 1)


@user("relu6 / 6", hard)
def _(m: User, x: Tensor) -> Tensor:
    return x * (F.relu6(m.conv2(m.conv1(x.mean((2, 3), True)).relu()) + 3.0) / 6.0)


@user("hardsigmoid in place", hard)
def _(m: User, x: Tensor) -> Tensor:
    z = m.conv2(F.relu(m.conv1(F.adaptive_avg_pool2d(x, (1, 1))), inplace=True))
    return x.mul(F.hardsigmoid(z, inplace=True))


@user("clamp", lambda m, x: (0.2 * m.z(mean(x)) + 0.5).clamp(0, 1))
def _(m: User, x: Tensor) -> Tensor:
    z = m.z(x.view(*x.shape[:2], -1).mean(-1))
    return x * torch.clamp(0.2 * z + 0.5, min=0.0, max=1.0)[:, :, None, None]


@user("weights by hand")
def _(m: User, x: Tensor) -> Tensor:
    s = x.mean([-1, -2]) @ m.fc1.weight.t() + m.fc1.bias
    return x * torch.sigmoid(F.linear(s.relu(), m.fc2.weight, m.fc2.bias)).unsqueeze(2).unsqueeze(3)


@user("conv2d by hand")
def _(m: User, x: Tensor) -> Tensor:
    s = F.avg_pool2d(x, x.shape[2:])
    s = F.conv2d(s, m.conv1.weight, m.conv1.bias).relu_()
    return torch.mul(x, F.conv2d(s, m.conv2.weight, m.conv2.bias).sigmoid_().expand_as(x))


@user("expit")
def _(m: User, x: Tensor) -> Tensor:
    return x * torch.special.expit(m.z(x.sum((2, 3)) / math.prod(x.shape[2:])))[..., None, None]


@user("exponential")
def _(m: User, x: Tensor) -> Tensor:
    gate = 1 / (1 + torch.exp(-m.z(mean(x))))
    return x * gate.reshape(*gate.shape, 1, 1)


@user("einsum")
def _(m: User, x: Tensor) -> Tensor:
    return torch.einsum(
        "bchw,bc->bchw", x, m.z(torch.einsum("bchw->bc", x) / x[0, 0].numel()).sigmoid()
    )


@user("in place")
def _(m: User, x: Tensor) -> Tensor:
    gate = m.z(mean(x)).sigmoid()[:, :, None, None]
    x = x.clone()
    x *= gate
    return x


@user("divided")
def _(m: User, x: Tensor) -> Tensor:
    return x / (1 + torch.exp(-m.z(mean(x))))[..., None, None]


@user("divided in tokens")
def _(m: User, x: Tensor) -> Tensor:
    t = x.flatten(2).transpose(1, 2)
    t = torch.div(t, torch.exp(-m.z(t.mean(1, keepdim=True))) + 1)
    return t.transpose(1, 2).view_as(x)


@user("lerp from zeros", spread=True)
def _(m: User, x: Tensor) -> Tensor:
    gate = m.z(mean(x)).sigmoid()[..., None, None]
    return torch.lerp(torch.zeros_like(x), x, gate)


@user("twice sigmoid", lambda m, x: 2 * standard(m, x))
def _(m: User, x: Tensor) -> Tensor:
    return x * (2 * m.z(mean(x)).sigmoid())[..., None, None]


@user("1 + tanh", lambda m, x: 1 + torch.tanh(m.z(mean(x))))
def _(m: User, x: Tensor) -> Tensor:
    return x * (1.0 + torch.tanh(m.z(mean(x)))[..., None, None])


def batch_norm(m: User, x: Tensor) -> Tensor:
    s = m.fc1(mean(x))
    s = (s - m.bn.running_mean) / (m.bn.running_var + m.bn.eps).sqrt() * m.bn.weight + m.bn.bias
    return m.fc2(s.relu()).sigmoid()


@user("batch norm inside", batch_norm)
def _(m: User, x: Tensor) -> Tensor:
    return x * m.conv2(m.bn(m.conv1(x.mean((2, 3), keepdim=True))).relu()).sigmoid()


@user("SiLU inside", lambda m, x: m.z(mean(x), lambda s: s * torch.sigmoid(s)).sigmoid())
def _(m: User, x: Tensor) -> Tensor:
    return m.conv2(F.silu(m.conv1(x.mean((2, 3), keepdim=True)))).sigmoid() * x


@user("PReLU inside", lambda m, x: m.z(
    mean(x), lambda s: s.clamp_min(0) + m.prelu.weight * s.clamp_max(0)).sigmoid())  # fmt: skip
def _(m: User, x: Tensor) -> Tensor:
    return x * m.fc2(m.prelu(m.fc1(mean(x)))).sigmoid()[:, :, None, None]


@user("dropout inside")
def _(m: User, x: Tensor) -> Tensor:
    z = m.fc2(F.dropout(m.fc1(mean(x)).relu(), 0.2, m.training))
    return x * F.dropout(z, 0.1, m.training).sigmoid().unflatten(1, (-1, 1, 1))


@user("one layer", lambda m, x: m.one(mean(x)).sigmoid())
def _(m: User, x: Tensor) -> Tensor:
    return x * m.one(mean(x)).sigmoid()[..., None, None]


@user("no layer", lambda m, x: mean(x).sigmoid())
def _(m: User, x: Tensor) -> Tensor:
    return x * x.mean((-2, -1), keepdim=True).sigmoid()


def two_pools(m: User, x: Tensor) -> Tensor:
    return (m.z(mean(x)) + m.z(x.flatten(2).max(2)[0])).sigmoid()


@user("average and maximum", two_pools)
def _(m: User, x: Tensor) -> Tensor:
    pools = (F.adaptive_avg_pool2d(x, 1), F.adaptive_max_pool2d(x, 1))
    return x * sum(m.conv2(m.conv1(p).relu()) for p in pools).sigmoid()


@user("pools side by side", lambda m, x: m.both(
    torch.cat([mean(x), x.flatten(2).amax(2)], 1)).sigmoid())  # fmt: skip
def _(m: User, x: Tensor) -> Tensor:
    pools = torch.cat([x.mean((2, 3)), x.amax((2, 3))], dim=1)
    return x * m.both(pools).sigmoid()[:, :, None, None]


def style(m: User, x: Tensor) -> Tensor:
    pools = torch.stack([mean(x), x.flatten(2).std(2)], 2)
    return (pools * m.style).sum(2).sigmoid()


@user("style (SRM)", style)
def _(m: User, x: Tensor) -> Tensor:
    flat = x.view(x.size(0), x.size(1), -1)
    t = torch.cat([flat.mean(-1, keepdim=True), flat.std(-1, keepdim=True)], -1)
    return x * (t * m.style[None]).sum(2).sigmoid()[:, :, None, None]


@user("generalised mean", lambda m, x: m.z(
    x.clamp_min(1e-3).pow(3).flatten(2).mean(2).pow(1 / 3)).sigmoid())  # fmt: skip
def _(m: User, x: Tensor) -> Tensor:
    s = F.avg_pool2d(x.clamp(min=1e-3).pow(3), x.shape[-2:]).pow(1.0 / 3)
    return x * m.conv2(m.conv1(s).relu()).sigmoid()


@user("logsumexp", lambda m, x: m.z(x.flatten(2).exp().sum(2).log()).sigmoid())
def _(m: User, x: Tensor) -> Tensor:
    return x * m.z(torch.logsumexp(x, dim=(2, 3))).sigmoid()[:, :, None, None]


@user("tokens")
def _(m: User, x: Tensor) -> Tensor:
    t = x.flatten(2).transpose(1, 2)
    t = t * m.z(t.mean(1, keepdim=True)).sigmoid()
    return t.transpose(1, 2).view_as(x)


@user("1-d", dims=1)
def _(m: User, x: Tensor) -> Tensor:
    return x * m.conv2(m.conv1(F.adaptive_avg_pool1d(x, 1)).relu()).sigmoid()


@user("3-d", dims=3)
def _(m: User, x: Tensor) -> Tensor:
    return x * m.conv2(m.conv1(F.adaptive_avg_pool3d(x, 1)).relu()).sigmoid()


@user("3-d by linear layers", dims=3)
def _(m: User, x: Tensor) -> Tensor:
    b, c = x.shape[:2]
    return x * m.z(x.mean(dim=(2, 3, 4))).sigmoid().view(b, c, 1, 1, 1)


@user("concurrent (scSE)", spread=True)
def _(m: User, x: Tensor) -> Tensor:
    return x * m.conv2(m.conv1(x.mean((2, 3), True)).relu()).sigmoid() + x * m.mask(x).sigmoid()


def context(m: User, x: Tensor) -> Tensor:
    weights = m.mask(x).flatten(2).softmax(-1)
    return m.z((x.flatten(2) * weights).sum(2)).sigmoid()


@user("context (GC)", context, spread=True)
def _(m: User, x: Tensor) -> Tensor:
    weights = F.softmax(m.mask(x).view(x.size(0), 1, -1), dim=2).unsqueeze(-1)
    s = torch.matmul(x.flatten(2).unsqueeze(1), weights).view(x.size(0), x.size(1), 1, 1)
    return x * m.conv2(m.conv1(s).relu()).sigmoid()


@user("residual", spread=True)
def _(m: User, x: Tensor) -> Tensor:
    return torch.addcmul(x, x, m.z(mean(x)).sigmoid()[..., None, None])


@user("mix", spread=True)
def _(m: User, x: Tensor) -> Tensor:
    gate = m.z(mean(x)).sigmoid()[..., None, None]
    return x * gate + 0.5 * x * (1 - gate)


@user("lerp", spread=True)
def _(m: User, x: Tensor) -> Tensor:
    return torch.lerp(0.5 * x, x, m.z(mean(x)).sigmoid()[..., None, None])
