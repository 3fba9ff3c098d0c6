"""Networks that make trouble, given as `strange_nets.py:NAME` with --allow-code."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn


class Gate(nn.Module):
    """Squeeze and excitation; `weight` and `bias` are those of the second layer."""

    def __init__(self, channels: int = 16, weight: float | None = None, bias: float = 0.0):
        super().__init__()
        self.fc1, self.fc2 = nn.Conv2d(channels, 4, 1), nn.Conv2d(4, channels, 1)
        if weight is not None:
            nn.init.constant_(self.fc2.weight, weight)
            nn.init.constant_(self.fc2.bias, bias)

    def forward(self, x: Tensor) -> Tensor:
        squeezed = x.mean((2, 3), keepdim=True)
        return x * torch.sigmoid(self.fc2(self.fc1(squeezed).relu()))


class Net(nn.Module):
    """Two convolutions around `middle`, and a head of ten classes."""

    def __init__(self, middle: nn.Module, after: nn.Module | None = None):
        super().__init__()
        self.one = nn.Conv2d(1, 16, 3, padding=1)
        self.middle = middle
        self.two = nn.Conv2d(16, 16, 3, padding=1)
        self.after = after or nn.Identity()
        self.head = nn.Linear(16, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.middle(self.one(x).relu())
        return self.head(self.after(self.two(x).relu()).mean((2, 3)))


class Idle(Net):
    """Registers a gate that its forward never calls."""

    def __init__(self) -> None:
        super().__init__(Gate())
        self.idle = Gate()


class Jagged(nn.Module):
    """Fits no input."""

    def forward(self, x: Tensor) -> Tensor:
        return x.reshape(7, -1)


class Endless(nn.Module):
    """Works for ever, or sleeps, or turns round and round."""

    def __init__(self, how: str):
        super().__init__()
        self.how = how

    def forward(self, x: Tensor) -> Tensor:
        while True:
            if self.how == "works":
                x = x + 1
            elif self.how == "sleeps":
                time.sleep(3600)


class Fixed(nn.Module):
    """Takes 16 channels and no other number."""

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[1] != 16:
            raise ValueError(f"16 channels, please, not {x.shape[1]}")
        return x


class Own(torch.autograd.Function):
    """An operator that nobody has a rule for."""

    @staticmethod
    def forward(context, x, weight):
        return torch.from_numpy((x.numpy() * weight.numpy()).cumsum(1))


class Unknown(nn.Module):
    """Mixes all channels where no one can see it."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1, 16, 1, 1))
        self.num_features = 16

    def forward(self, x: Tensor) -> Tensor:
        return Own.apply(x, self.weight)


def plain() -> nn.Module:
    return Net(nn.BatchNorm2d(16))


def gated() -> nn.Module:
    return Net(Gate())


def idle() -> nn.Module:
    return Idle()


def equal() -> nn.Module:
    return Net(Gate(weight=0.0))


def saturated() -> nn.Module:
    return Net(Gate(weight=0.5, bias=8.0))


def jagged() -> nn.Module:
    return Net(Jagged())


def works() -> nn.Module:
    return Net(nn.Identity(), Endless("works"))


def sleeps() -> nn.Module:
    return Net(nn.Identity(), Endless("sleeps"))


def turns() -> nn.Module:
    return Net(nn.Identity(), Endless("turns"))


def fixed() -> nn.Module:
    return Net(Gate(), Fixed())


def unknown() -> nn.Module:
    return Net(Gate(), Unknown())


def nothing() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 10))


def fails() -> nn.Module:
    raise RuntimeError("the dog ate it")


def leaves() -> nn.Module:
    sys.exit(7)


class Leaving(nn.Module):
    """What a script does at its end, in the middle of a network."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        sys.exit("done")


def leaves_later() -> nn.Module:
    return Leaving()


class Doing(nn.Module):
    """Does something at each forward, and hands its input on."""

    def __init__(self, what: Callable[[], object]):
        super().__init__()
        self.what = what

    def forward(self, x: Tensor) -> Tensor:
        self.what()
        return x


class Ending(BaseException):
    """No Exception, so that nobody expects it."""


def interrupts() -> None:
    raise KeyboardInterrupt


def ends() -> None:
    raise Ending("enough")


def interrupting() -> nn.Module:
    return Net(Gate(), Doing(interrupts))


def ending() -> nn.Module:
    return Net(Gate(), Doing(ends))


def closing() -> nn.Module:
    print("not for the results")
    sys.stdout.close()
    return Net(Gate(), Doing(lambda: sys.stdout.close()))


def number() -> int:
    return 3


class Counting(nn.Module):
    """Every answer is another one."""

    calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return x * self.calls


class Deciding(nn.Module):
    """Looks at values, which no graph can."""

    def forward(self, x: Tensor) -> Tensor:
        return x if x.sum().item() > -1e9 else -x


def counting() -> nn.Module:
    return Net(Gate(), Counting())


def deciding() -> nn.Module:
    return Net(Gate(), Deciding())
