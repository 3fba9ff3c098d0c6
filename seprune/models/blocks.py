"""What the networks of this folder share: SE settings and modules, chains, rows of a table."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, fields, replace
from functools import reduce
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from seprune.errors import UsageError

SQUEEZES: dict[str, Callable[[Tensor], Tensor]] = {
    "mean": lambda x: x.mean((2, 3)),
    "max": lambda x: x.amax((2, 3)),
}
EXCITATIONS: dict[str, type[nn.Module]] = {
    "sigmoid": nn.Sigmoid,
    "tanh": nn.Tanh,
    "relu": nn.ReLU,
}
PLACEMENTS = ("standard", "pre", "post", "identity", "inner")


def _one_of(key: str, value: object, allowed: Iterable[str]) -> None:
    if value not in tuple(allowed):
        raise UsageError(
            f"{key}={value!r}: no such {key} for an SE block",
            why=f"known: {', '.join(allowed)}",
            fix=f"{key}={next(iter(allowed))}",
        )


@dataclass(frozen=True)
class SE:
    """How the SE blocks of a network look (Hu et al., arXiv:1709.01507, sec. 6).

    Args:
        reduction: channels per hidden unit of the excitation.
        squeeze, excitation, placement: a key of the tables above.
        stages: names of the stages that carry SE blocks (`layer3`); None means all of them.
        bias: whether the two linear layers have one.
    """

    reduction: int = 16
    squeeze: str = "mean"
    excitation: str = "sigmoid"
    placement: str = "standard"
    stages: tuple[str, ...] | None = None
    bias: bool = True

    def __post_init__(self) -> None:
        if not isinstance(self.reduction, int) or self.reduction < 1:
            raise UsageError(
                f"reduction={self.reduction!r}: not a whole number of at least 1",
                why="it is the number of channels per hidden unit of an SE block",
                fix="reduction=16",
            )
        _one_of("squeeze", self.squeeze, SQUEEZES)
        _one_of("excitation", self.excitation, EXCITATIONS)
        _one_of("placement", self.placement, PLACEMENTS)


GATE = ("reduction", "squeeze", "excitation", "bias")
EVERYTHING = tuple(field.name for field in fields(SE))


@dataclass(frozen=True)
class Network:
    """One row of a `NETWORKS` table: how to make it, and what its paper feeds it."""

    make: Callable[[int, int, SE], nn.Module]  # input channels, classes, SE settings
    input: tuple[int, int, int] = (3, 224, 224)
    classes: int = 1000
    se: SE = SE()
    accepts: tuple[str, ...] = GATE

    def settings(self, name: str, args: Mapping[str, Any]) -> SE:
        """The SE settings of this network with `args` applied."""
        for key in args:
            if key not in self.accepts:
                raise UsageError(
                    f"{name}: unknown argument {key!r}",
                    why=f"it takes {', '.join(self.accepts)}",
                    fix=f"remove {key} or correct its name",
                )
        chosen: dict[str, Any] = dict(args)
        if (stages := args.get("stages")) is not None:
            # a command line has no lists: stages=layer2,layer3
            listed = stages if isinstance(stages, list | tuple) else str(stages).split(",")
            chosen["stages"] = tuple(stage for stage in listed if stage)
        return replace(self.se, **chosen)


class SqueezeExcitation(nn.Module):
    """x (B, C, H, W) -> x times a gate (B, C) computed from its squeeze."""

    def __init__(self, channels: int, se: SE) -> None:
        super().__init__()
        hidden = max(1, channels // se.reduction)
        self.squeeze = se.squeeze
        self.fc = nn.Sequential(
            nn.Linear(channels, hidden, bias=se.bias),
            nn.ReLU(),
            nn.Linear(hidden, channels, bias=se.bias),
            EXCITATIONS[se.excitation](),
        )

    def forward(self, x: Tensor) -> Tensor:
        gate_BC = self.fc(SQUEEZES[self.squeeze](x))
        return x * gate_BC[:, :, None, None]  # type: ignore[no-any-return]


class SelectiveKernel(nn.Module):
    """Two receptive fields and a softmax gate between them (Li et al., arXiv:1903.06586, sec. 3.1).

    Stands in the place of a grouped 3x3 convolution with BN and ReLU. The 5x5 branch is a dilated
    3x3, and the descriptor has max(channels / reduction, 32) units, both as in the paper.
    """

    def __init__(self, inputs: int, step: Conv, se: SE) -> None:
        super().__init__()
        channels, hidden = step.outputs, max(step.outputs // se.reduction, 32)
        self.squeeze = se.squeeze
        self.branches = nn.ModuleList(
            chain(inputs, [step._replace(dilation=dilation)])[0] for dilation in (1, 2)
        )
        self.reduce = nn.Sequential(
            nn.Linear(channels, hidden, bias=False), nn.BatchNorm1d(hidden), nn.ReLU()
        )
        self.expand = nn.ModuleList(nn.Linear(hidden, channels) for _ in self.branches)

    def forward(self, x: Tensor) -> Tensor:
        features = [branch(x) for branch in self.branches]
        hidden = self.reduce(SQUEEZES[self.squeeze](reduce(torch.add, features)))
        gates = torch.stack([layer(hidden) for layer in self.expand]).softmax(0)
        # indexed, since torch-pruning takes iteration (`unbind`) for a split of the channels
        gated = [x * gates[i, :, :, None, None] for i, x in enumerate(features)]
        return reduce(torch.add, gated)  # type: ignore[no-any-return]


class Conv(NamedTuple):
    """A convolution with BN and ReLU in a table; `padding` None keeps the size at stride 1."""

    outputs: int
    kernel: int | tuple[int, int] = 1
    stride: int = 1
    conv_groups: int = 1
    padding: int | None = None
    dilation: int = 1
    bias: bool = False

    def module(self, inputs: int) -> nn.Conv2d:
        kernel = (self.kernel, self.kernel) if isinstance(self.kernel, int) else self.kernel
        same = (self.dilation * (kernel[0] // 2), self.dilation * (kernel[1] // 2))
        return nn.Conv2d(
            inputs,
            self.outputs,
            kernel,
            stride=self.stride,
            padding=same if self.padding is None else self.padding,
            dilation=self.dilation,
            groups=self.conv_groups,
            bias=self.bias,
        )


class Pool(NamedTuple):
    """A 3x3 pooling in a table."""

    kind: str
    stride: int = 1
    padding: int = 1

    def module(self) -> nn.Module:
        kinds = {"mean": nn.AvgPool2d, "max": nn.MaxPool2d}
        return kinds[self.kind](3, stride=self.stride, padding=self.padding)


def chain(inputs: int, steps: Iterable[Conv | Pool]) -> tuple[nn.Sequential, int]:
    """The steps in a row, and the number of channels that leave them."""
    modules = nn.Sequential()
    for step in steps:
        if isinstance(step, Pool):
            modules.append(step.module())
            continue
        modules.extend([step.module(inputs), nn.BatchNorm2d(step.outputs), nn.ReLU()])
        inputs = step.outputs
    return modules, inputs


class Pooled(nn.Module):
    """`features`, the mean over space, a classifier `fc`."""

    def __init__(
        self, features: nn.Sequential, outputs: int, classes: int, *, dropout: float = 0.0
    ) -> None:
        super().__init__()
        self.features = features
        self.dropout = nn.Dropout(dropout)
        self.fc = nn.Linear(outputs, classes)
        initialize(self)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.dropout(self.features(x).mean((2, 3))))  # type: ignore[no-any-return]


def initialize(model: nn.Module) -> None:
    """He initialisation (arXiv:1502.01852) by fan-in, which fits depthwise convolutions too."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
            if module.bias is not None:
                nn.init.zeros_(module.bias)
