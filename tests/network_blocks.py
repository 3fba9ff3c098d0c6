"""Kinds of blocks that networks are drawn from: `channels` in, `out` channels out.

A kind registers itself in `KINDS`. `mixing` names what it computes across channels: there a cut
network may differ from its masked parent. `dims` are the numbers of positional dimensions it takes,
`fixed` says that it runs at one image size only.
"""

from __future__ import annotations

import random

import torch
import torch.nn.functional as F
from torch import Tensor, nn

KINDS: dict[str, type[Block]] = {}
CONVS = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
TRANSPOSED = {1: nn.ConvTranspose1d, 2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}
NORMS = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}
INSTANCE = {1: nn.InstanceNorm1d, 2: nn.InstanceNorm2d, 3: nn.InstanceNorm3d}
POOL = {1: F.adaptive_avg_pool1d, 2: F.adaptive_avg_pool2d, 3: F.adaptive_avg_pool3d}
SIDE = 8  # of the images


def spatial(x: Tensor) -> list[int]:
    return list(range(2, x.dim()))


def mean(x: Tensor) -> Tensor:
    return x.mean(spatial(x))


def wide(vector: Tensor, like: Tensor) -> Tensor:
    return vector.reshape(*vector.shape, *[1] * (like.dim() - 2))


class Gate(nn.Module):
    """A channel gate, written in one of several ways; returns (B, C, 1, ...)."""

    WAYS = ("linear", "conv", "pool", "view", "expand", "hard", "tanh", "max")

    def __init__(self, channels: int, dims: int, way: str) -> None:
        super().__init__()
        hidden, self.way, self.dims = max(3, channels // 2), way, dims
        layer = CONVS[dims] if way in ("conv", "pool") else nn.Linear
        kernel = (1,) if way in ("conv", "pool") else ()
        self.fc1 = layer(channels, hidden, *kernel)
        self.fc2 = layer(hidden, channels, *kernel)

    def forward(self, x: Tensor) -> Tensor:
        if self.way == "conv":
            s = x.mean(spatial(x), keepdim=True)
        elif self.way == "pool":
            s = POOL[self.dims](x, 1)
        else:
            s = x.amax(spatial(x)) if self.way == "max" else mean(x)
        z = self.fc2(F.relu(self.fc1(s)))
        if self.way == "hard":
            z = F.hardsigmoid(z)
        elif self.way == "tanh":
            z = 0.5 + 0.5 * torch.tanh(z)
        else:
            z = z.sigmoid()
        if self.way == "view":
            z = z.view(len(x), -1, *[1] * self.dims)
        z = z if z.dim() == x.dim() else wide(z, x)
        return z.expand_as(x) if self.way == "expand" else z


class Block(nn.Module):
    """What all kinds share."""

    dims = (1, 2, 3)
    mixing = ""
    fixed = False

    def __init__(self, channels: int, dims: int, draw: random.Random) -> None:
        super().__init__()
        self.channels, self.out, self.nd, self.draw = channels, channels, dims, draw
        self.make(channels)
        del self.draw

    def __init_subclass__(cls) -> None:
        KINDS[cls.__name__] = cls

    def make(self, c: int) -> None:
        """Register the layers."""

    def conv(self, i: int, o: int, k: int = 3, **how: object) -> nn.Module:
        how.setdefault("padding", k // 2)
        return CONVS[self.nd](i, o, k, **how)  # type: ignore[arg-type]

    def norm(self, c: int) -> nn.Module:
        return NORMS[self.nd](c)

    def gate(self, c: int) -> Gate:
        return Gate(c, self.nd, self.draw.choice(Gate.WAYS))

    def unit(self, i: int, o: int, k: int = 3, **how: object) -> nn.Sequential:
        act = self.draw.choice([nn.ReLU(), nn.SiLU(), nn.Hardswish(), nn.LeakyReLU(0.1)])
        return nn.Sequential(self.conv(i, o, k, **how), self.norm(o), act)


# -- convolutions --------------------------------------------------------------------------------


class Plain(Block):
    def make(self, c: int) -> None:
        self.out = c + 2
        self.body = self.unit(c, self.out)

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x)


class Residual(Block):
    def make(self, c: int) -> None:
        self.a, self.b = self.unit(c, c + 3), nn.Sequential(self.conv(c + 3, c), self.norm(c))

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x + self.b(self.a(x)))


class Bottleneck(Block):
    def make(self, c: int) -> None:
        self.out, w = c + 4, c // 2 + 1
        self.a, self.b = self.unit(c, w, 1), self.unit(w, w)
        self.c, self.skip = self.conv(w, self.out, 1), self.conv(c, self.out, 1)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.c(self.b(self.a(x))).add_(self.skip(x)))


class Inverted(Block):
    def make(self, c: int) -> None:
        w = 2 * c
        self.a, self.b, self.se = self.unit(c, w, 1), self.unit(w, w, groups=w), self.gate(w)
        self.c = nn.Sequential(self.conv(w, c, 1), self.norm(c))

    def forward(self, x: Tensor) -> Tensor:
        y = self.b(self.a(x))
        return x + self.c(y * self.se(y))


class Grouped(Block):
    def make(self, c: int) -> None:
        g = self.draw.choice([2, 3])
        self.w = 12
        self.a, self.b = self.conv(c, 12, 1), self.conv(12, 12, groups=g)
        self.c, self.n = self.conv(12, c, 1), self.norm(12)

    def forward(self, x: Tensor) -> Tensor:
        return self.c(F.relu(self.n(self.b(self.a(x)))))


class Dilated(Block):
    def make(self, c: int) -> None:
        self.out = c + 1
        self.a = self.conv(c, c + 1, 3, dilation=2, padding=2)
        self.b = self.conv(c, c + 1, 3, dilation=1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return F.elu(self.a(x) + self.b(x))


class Deconv(Block):
    def make(self, c: int) -> None:
        self.out = c + 1
        self.down = self.conv(c, c + 2, 3, stride=2)
        self.up = TRANSPOSED[self.nd](c + 2, self.out, 2, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.up(F.relu(self.down(x))))


class Depthwise(Block):
    def make(self, c: int) -> None:
        self.out = 2 * c
        self.a, self.b = self.conv(c, 2 * c, groups=c), self.norm(2 * c)
        self.p = self.conv(2 * c, 2 * c, 1)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu6(self.p(self.b(self.a(x))))


class Standardised(Block):
    mixing = "weights standardised over their inputs"

    def make(self, c: int) -> None:
        self.out = c + 2
        self.a, self.b = self.conv(c, c + 2), self.conv(c + 2, c + 2)

    def forward(self, x: Tensor) -> Tensor:
        w = self.b.weight
        dims = list(range(1, w.dim()))
        w = (w - w.mean(dims, True)) / (w.std(dims, keepdim=True) + 1e-5)
        call = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}[self.nd]
        return call(F.relu(self.a(x)), w, self.b.bias, padding=1)


class Reused(Block):
    def make(self, c: int) -> None:
        self.a = self.conv(c, c)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.a(F.relu(self.a(F.relu(x))))


class Sliced(Block):
    """A convolution of which only the first filters are used."""

    dims = (2,)

    def make(self, c: int) -> None:
        self.a = self.conv(c, c + 5)
        self.b = self.conv(self.out, self.out + 1)
        self.used, self.out = c, self.out + 1

    def forward(self, x: Tensor) -> Tensor:
        y = F.conv2d(x, self.a.weight[: self.used], self.a.bias[: self.used], padding=1)
        return self.b(F.relu(y))


class BareConv(Block):
    dims = (2,)

    def make(self, c: int) -> None:
        self.w, self.b = (
            nn.Parameter(torch.randn(c + 3, c, 3, 3) * 0.2),
            nn.Parameter(torch.randn(c + 3)),
        )
        self.read = self.conv(c + 3, c)

    def forward(self, x: Tensor) -> Tensor:
        return self.read(F.relu(F.conv2d(x, self.w, self.b, padding=1)))


class BareLinear(Block):
    dims = (2,)

    def make(self, c: int) -> None:
        self.w, self.b = nn.Parameter(torch.randn(c + 3, c) * 0.3), nn.Parameter(torch.randn(c + 3))
        self.read = self.conv(c + 3, c)

    def forward(self, x: Tensor) -> Tensor:
        y = F.linear(x.permute(0, 2, 3, 1), self.w, self.b).permute(0, 3, 1, 2)
        return self.read(F.relu(y))


class Resample(Block):
    dims = (2,)

    def make(self, c: int) -> None:
        self.out = c + 2
        self.a, self.mode = self.conv(c, c + 2), self.draw.choice(["nearest", "bilinear"])

    def forward(self, x: Tensor) -> Tensor:
        y = F.max_pool2d(F.relu(self.a(x)), 2)
        return F.interpolate(y, scale_factor=2, mode=self.mode)


class PReLU(Block):
    def make(self, c: int) -> None:
        self.a, self.act, self.b = self.conv(c, c + 2), nn.PReLU(c + 2), self.conv(c + 2, c, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.act(self.a(x)))


# -- joins and splits ----------------------------------------------------------------------------


class Dense(Block):
    def make(self, c: int) -> None:
        self.out = c + 6
        self.a, self.b = self.unit(c, 3), self.unit(c + 3, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.cat([x, self.a(x)], 1)
        return torch.cat([x, self.b(x)], 1)


class Inception(Block):
    def make(self, c: int) -> None:
        self.out = 12
        self.ways = nn.ModuleList([self.unit(c, w, k) for w, k in ((3, 1), (5, 3), (4, 5))])
        self.se = self.gate(12)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.cat([way(x) for way in self.ways], 1)
        return y * self.se(y)


class Chunk(Block):
    def make(self, c: int) -> None:
        self.how = self.draw.choice(["chunk", "split", "slice"])
        self.a, self.b, self.half = self.unit(c, 2 * c), self.conv(c, c), c

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x)
        if self.how == "chunk":
            one, two = y.chunk(2, 1)
        elif self.how == "split":
            one, two = y.split(self.half, 1)
        else:
            one, two = y[:, : self.half], y[:, self.half :]
        return one + self.b(two)


class NegativeSlice(Block):
    def make(self, c: int) -> None:
        self.out = c + 1
        self.a, self.b, self.k = self.unit(c, c + 3), self.conv(3, c + 1, 1), 3
        self.d = self.conv(c, c + 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x)
        return self.b(y[:, -3:]) + self.d(y[:, :-3])


class Temperature(Block):
    """A number in the code that happens to equal a width."""

    def make(self, c: int) -> None:
        self.temperature, self.width = c + 2, c + 2
        self.a, self.b, self.d = self.conv(c, 2 * c + 4), self.conv(c + 2, c), self.conv(c + 2, c)

    def forward(self, x: Tensor) -> Tensor:
        one, two = F.relu(self.a(x)).split(self.width, 1)
        return self.b(one) / self.temperature + self.d(two)


class Shuffle(Block):
    dims = (2,)

    def make(self, c: int) -> None:
        self.a, self.b = self.conv(c, 12, 1), self.conv(12, 12, groups=2)
        self.c = self.conv(12, c, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.a(x))
        b, c, h, w = y.shape
        y = y.view(b, 2, c // 2, h, w).transpose(1, 2).reshape(b, c, h, w)
        return self.c(F.relu(self.b(y)))


class Pixels(Block):
    dims = (2,)

    def make(self, c: int) -> None:
        self.a, self.shuffle = self.conv(c, 20, 3, stride=2), nn.PixelShuffle(2)
        self.b = self.conv(5, c)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(F.relu(self.shuffle(self.a(x))))


class Unpixels(Block):
    dims = (2,)

    def make(self, c: int) -> None:
        self.a, self.b = self.unit(c, 5), self.conv(20, c, 1)
        self.out = c

    def forward(self, x: Tensor) -> Tensor:
        return F.interpolate(self.b(F.pixel_unshuffle(self.a(x), 2)), scale_factor=2)


class HardView(Block):
    """The width is written into a view."""

    def make(self, c: int) -> None:
        self.a, self.b, self.w = self.unit(c, c + 3), self.conv(c + 3, c, 1), c + 3

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x)
        return self.b(y.view(-1, self.w, *y.shape[2:]).relu())


# -- gates ---------------------------------------------------------------------------------------


class Gated(Block):
    """Residual block with the gate in one of the places of the SE paper."""

    def make(self, c: int) -> None:
        self.place = self.draw.choice(["standard", "pre", "post", "identity", "inner"])
        self.se = self.gate(c)
        self.a, self.b = self.unit(c, c), nn.Sequential(self.conv(c, c), self.norm(c))

    def forward(self, x: Tensor) -> Tensor:
        if self.place == "pre":
            return x + self.b(self.a(x * self.se(x)))
        if self.place == "identity":
            return x * self.se(x) + self.b(self.a(x))
        y = self.a(x)
        y = self.b(y * self.se(y) if self.place == "inner" else y)
        if self.place == "standard":
            return F.relu(x + y * self.se(y))
        y = x + y
        return y * self.se(y) if self.place == "post" else y


class GatedSkip(Block):
    """x + x * g."""

    def make(self, c: int) -> None:
        self.out = c + 1
        self.se, self.a, self.b = self.gate(c + 1), self.unit(c, c + 1), self.conv(c + 1, c + 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x)
        return self.b(y + y * self.se(y))


class SecondReader(Block):
    def make(self, c: int) -> None:
        self.a, self.se = self.unit(c, c + 2), self.gate(c + 2)
        self.b, self.d = self.conv(c + 2, c), self.conv(c + 2, c, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x)
        return self.b(y * self.se(y)) + self.d(y)


class SharedGate(Block):
    """One gate tensor scales two maps."""

    def make(self, c: int) -> None:
        self.se, self.a, self.b = self.gate(c), self.unit(c, c), self.conv(c, c)

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x)
        g = self.se(y)
        return y * g + self.b(x) * g


class Selective(Block):
    """SK: two branches weighed by a softmax over branches."""

    def make(self, c: int) -> None:
        self.how = self.draw.choice(["stack", "chunk", "slice"])
        self.w = c
        self.a, self.b = self.unit(c, c), self.unit(c, c, 5)
        self.fc1, self.fc2 = nn.Linear(c, 4), nn.Linear(4, 2 * c)

    def forward(self, x: Tensor) -> Tensor:
        one, two = self.a(x), self.b(x)
        z = self.fc2(F.relu(self.fc1(mean(one + two))))
        w = z.view(len(x), 2, -1).softmax(1)
        if self.how == "stack":
            return (torch.stack([one, two], 1) * wide(w.flatten(1), one).view(
                len(x), 2, -1, *[1] * self.nd)).sum(1)  # fmt: skip
        if self.how == "chunk":
            g, h = (p.squeeze(1) for p in w.chunk(2, 1))
        else:
            g, h = w[:, 0], w[:, 1]
        return one * wide(g, one) + two * wide(h, two)


class SplitAttention(Block):
    dims = (2,)

    def make(self, c: int) -> None:
        self.conv1 = self.conv(c, 16)
        self.fc1, self.fc2 = nn.Conv2d(8, 4, 1), nn.Conv2d(4, 16, 1)
        self.last = self.conv(8, c, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.conv1(x))
        maps = y.view(len(y), 2, -1, *y.shape[2:])
        z = self.fc2(F.relu(self.fc1(maps.sum(1).mean((2, 3), keepdim=True))))
        z = z.view(len(y), 2, -1).softmax(1).view(len(y), 2, -1, 1, 1)
        return self.last((maps * z).sum(1))


class Eca(Block):
    mixing = "a convolution over neighbouring channels"
    dims = (2,)

    def make(self, c: int) -> None:
        self.a, self.k = self.unit(c, c), nn.Conv1d(1, 1, 3, padding=1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x)
        g = self.k(mean(y).unsqueeze(1)).squeeze(1).sigmoid()
        return y * g[:, :, None, None]


class Cbam(Block):
    mixing = "mean and max over channels"

    def make(self, c: int) -> None:
        self.a, self.se, self.space = self.unit(c, c + 1), self.gate(c + 1), self.conv(2, 1)
        self.last = self.conv(c + 1, c, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x)
        y = y * self.se(y)
        both = torch.cat([y.mean(1, keepdim=True), y.amax(1, keepdim=True)], 1)
        return self.last(y * self.space(both).sigmoid())


class Scse(Block):
    def make(self, c: int) -> None:
        self.a, self.se, self.space = self.unit(c, c + 1), self.gate(c + 1), self.conv(c + 1, 1, 1)
        self.last = self.conv(c + 1, c, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x)
        return self.last(y * self.se(y) + y * self.space(y).sigmoid())


class GlobalContext(Block):
    """The squeeze is a mean over positions weighted by attention."""

    dims = (2,)

    def make(self, c: int) -> None:
        self.a, self.attend = self.unit(c, c + 2), self.conv(c + 2, 1, 1)
        self.fc1, self.fc2, self.last = (
            nn.Conv2d(c + 2, 4, 1),
            nn.Conv2d(4, c + 2, 1),
            self.conv(c + 2, c),
        )

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x)
        w = self.attend(y).flatten(2).softmax(-1)
        s = (y.flatten(2) @ w.transpose(1, 2)).unsqueeze(-1)
        return self.last(y * self.fc2(F.relu(self.fc1(s))).sigmoid())


class Ema(Block):
    """Groups of channels folded into the batch (EMA attention)."""

    mixing = "a softmax over the channels of a group"
    dims = (2,)

    def make(self, c: int) -> None:
        self.a, self.fc = self.unit(c, 12), nn.Conv2d(6, 6, 1)
        self.last = self.conv(12, c, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x)
        b, c, h, w = y.shape
        g = y.reshape(b * 2, -1, h, w)
        g = g * self.fc(g.mean((2, 3), keepdim=True)).sigmoid()
        return self.last(g.reshape(b, c, h, w))


class Nam(Block):
    """A norm whose weight is also read by name."""

    mixing = "weights divided by their sum"
    dims = (2,)

    def make(self, c: int) -> None:
        self.a, self.bn, self.last = self.conv(c, c + 2), nn.BatchNorm2d(c + 2), self.conv(c + 2, c)

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x)
        z = self.bn(y)
        w = self.bn.weight.abs() / self.bn.weight.abs().sum()
        return self.last(y * (z * w[:, None, None]).sigmoid())


class Grn(Block):
    mixing = "a mean over channels"

    def make(self, c: int) -> None:
        self.a, self.last = self.unit(c, c + 2), self.conv(c + 2, c, 1)
        self.gamma = nn.Parameter(torch.rand(1, c + 2, *[1] * self.nd))

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x)
        g = y.square().sum(spatial(y), keepdim=True).sqrt()
        return self.last(y + self.gamma * y * (g / (g.mean(1, keepdim=True) + 1e-6)))


class PermutedGate(Block):
    """The channels of the gate are turned round before the product."""

    def make(self, c: int) -> None:
        self.a, self.se, self.last = self.unit(c, c + 2), self.gate(c + 2), self.conv(c + 2, c, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x)
        return self.last(y * self.se(y).flip(1))


class Coordinate(Block):
    dims = (2,)

    def make(self, c: int) -> None:
        self.a, self.mid = self.unit(c, c + 2), self.conv(c + 2, 4, 1)
        self.h, self.w, self.last = (
            self.conv(4, c + 2, 1),
            self.conv(4, c + 2, 1),
            self.conv(c + 2, c),
        )

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x)
        rows, columns = y.mean(3, keepdim=True), y.mean(2, keepdim=True)
        g = F.relu(self.mid(rows))
        k = F.relu(self.mid(columns))
        return self.last(y * self.h(g).sigmoid() * self.w(k).sigmoid())


class GatedMap(Block):
    """A map gates another one, position by position."""

    def make(self, c: int) -> None:
        self.a, self.b = self.unit(c, c + 1), self.conv(c, c + 1)
        self.last = self.conv(c + 1, c, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.a(x) * self.b(x).sigmoid())


class SoftmaxChannels(Block):
    mixing = "a softmax over channels"

    def make(self, c: int) -> None:
        self.a, self.last = self.unit(c, c + 2), self.conv(c + 2, c, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x)
        return self.last(y * y.softmax(1))


class InstanceGate(Block):
    """A gate directly after an instance norm."""

    def make(self, c: int) -> None:
        self.a = nn.Sequential(self.conv(c, c + 1), INSTANCE[self.nd](c + 1, affine=True))
        self.se, self.last = self.gate(c + 1), self.conv(c + 1, c, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = F.leaky_relu(self.a(x), 0.1)
        return self.last(y * self.se(y))


# -- norms, tokens, positions --------------------------------------------------------------------


class GroupNorm(Block):
    mixing = "a norm over the channels of a group"

    def make(self, c: int) -> None:
        self.a, self.n = self.conv(c, 12), nn.GroupNorm(self.draw.choice([1, 2, 3, 12]), 12)
        self.b = self.conv(12, c)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(F.relu(self.n(self.a(x))))


class LayerNorm(Block):
    mixing = "a norm over channels"
    dims = (2,)

    def make(self, c: int) -> None:
        self.a, self.n, self.b = self.conv(c, c + 2), nn.LayerNorm(c + 2), self.conv(c + 2, c)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.n(self.a(x).permute(0, 2, 3, 1)).permute(0, 3, 1, 2))


class Instance(Block):
    def make(self, c: int) -> None:
        affine = self.draw.random() < 0.5
        self.a, self.n = self.conv(c, c + 2), INSTANCE[self.nd](c + 2, affine=affine)
        self.b = self.conv(c + 2, c)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(F.relu(self.n(self.a(x))))


class ConvNext(Block):
    mixing = "a norm over channels"
    dims = (2,)

    def make(self, c: int) -> None:
        self.dw, self.n = self.conv(c, c, groups=c), nn.LayerNorm(c)
        self.fc1, self.fc2 = nn.Linear(c, 2 * c), nn.Linear(2 * c, c)
        self.gamma = nn.Parameter(torch.rand(c))

    def forward(self, x: Tensor) -> Tensor:
        y = self.n(self.dw(x).permute(0, 2, 3, 1))
        return x + (self.fc2(F.gelu(self.fc1(y))) * self.gamma).permute(0, 3, 1, 2)


class PermutedLinear(Block):
    dims = (2,)

    def make(self, c: int) -> None:
        self.fc1, self.fc2 = nn.Linear(c, c + 4), nn.Linear(c + 4, c)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.fc2(F.relu(self.fc1(x.permute(0, 2, 3, 1)))).permute(0, 3, 1, 2)


class Tokens(Block):
    def make(self, c: int) -> None:
        self.out = c + 1
        self.a, self.fc = self.unit(c, c + 3), nn.Linear(c + 3, c + 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x)
        t = self.fc(y.flatten(2).transpose(1, 2))
        return t.transpose(1, 2).reshape(len(x), -1, *x.shape[2:])


class LinearDeconv(Block):
    """Linear -> view -> transposed convolution, concatenated."""

    dims = (2,)
    fixed = True

    def make(self, c: int) -> None:
        self.fc, self.up = nn.Linear(c, 5 * 4 * 4), nn.ConvTranspose2d(5, 3, 2, stride=2)
        self.out = c + 3

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.fc(mean(x))).view(-1, 5, 4, 4)
        return torch.cat([x, self.up(y)], 1)


class Masked(Block):
    """A mask over positions."""

    fixed = True

    def make(self, c: int) -> None:
        self.a, self.b = self.unit(c, c + 2), self.conv(c + 2, c)
        self.register_buffer("mask", torch.rand([SIDE] * self.nd))

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.a(x) * self.mask)


class Frames(Block):
    """Rows folded into the batch as a video network folds its frames."""

    dims = (2,)

    def make(self, c: int) -> None:
        self.a, self.se, self.b = self.unit(c, c + 2), self.gate(c + 2), self.conv(c + 2, c)

    def forward(self, x: Tensor) -> Tensor:
        b, c, h, w = x.shape
        y = x.view(b, c, 2, h // 2, w).transpose(1, 2).reshape(b * 2, c, h // 2, w)
        y = self.a(y)
        y = self.b(y * self.se(y))
        return y.view(b, 2, -1, h // 2, w).transpose(1, 2).reshape(b, -1, h, w)


class Scaled(Block):
    def make(self, c: int) -> None:
        self.a, self.b = self.unit(c, c + 2), self.conv(c + 2, c)
        self.gamma = nn.Parameter(torch.rand(c, *[1] * self.nd))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.gamma * self.b(self.a(x))


class CarriedBuffer(Block):
    """A buffer with a number for every channel."""

    def make(self, c: int) -> None:
        self.a, self.b = self.unit(c, c + 2), self.conv(c + 2, c)
        self.register_buffer("shift", torch.rand(1, c + 2, *[1] * self.nd))

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.a(x) - self.shift)


class Attention(Block):
    dims = (2,)

    def make(self, c: int) -> None:
        self.q, self.k, self.v = self.conv(c, 4, 1), self.conv(c, 4, 1), self.conv(c, c, 1)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (m(x).flatten(2) for m in (self.q, self.k, self.v))
        w = (q.transpose(1, 2) @ k / 2.0).softmax(-1)
        return x + (v @ w.transpose(1, 2)).view_as(x)


class Dropped(Block):
    def make(self, c: int) -> None:
        self.a, self.drop, self.b = self.unit(c, c + 2), nn.Dropout(0.3), self.conv(c + 2, c)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.drop(self.b(self.a(x)))
