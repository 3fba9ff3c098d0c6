"""SE-BN-Inception and SE-Inception-ResNet-v2: branches over one input, concatenated.

BN-Inception (Ioffe & Szegedy, arXiv:1502.03167, fig. 5) has an SE block on every concatenation.
Inception-ResNet-v2 (Szegedy et al., arXiv:1602.07261, in the widths of the released network) has
one on every residual branch, before it is scaled and added.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, nn

from seprune.models.blocks import SE, Conv, Network, Pool, Pooled, SqueezeExcitation, chain

Branch = tuple[Conv | Pool, ...]
MEAN = Pool("mean")
HALVE, HALVE_VALID = Pool("max", 2), Pool("max", 2, 0)

# name: 1x1, (reduced, 3x3), (reduced, double 3x3), pooling, its projection; no 1x1 where it halves
BN_MODULES = {
    "3a": (64, (64, 64), (64, 96), "mean", 32),
    "3b": (64, (64, 96), (64, 96), "mean", 64),
    "3c": (None, (128, 160), (64, 96), "max", None),
    "4a": (224, (64, 96), (96, 128), "mean", 128),
    "4b": (192, (96, 128), (96, 128), "mean", 128),
    "4c": (160, (128, 160), (128, 160), "mean", 128),
    "4d": (96, (128, 192), (160, 192), "mean", 128),
    "4e": (None, (128, 192), (192, 256), "max", None),
    "5a": (352, (192, 320), (160, 224), "mean", 128),
    "5b": (352, (192, 320), (192, 224), "max", 128),
}

IR_STEM: Branch = (
    Conv(32, 3, 2, padding=0),
    Conv(32, 3, padding=0),
    Conv(64, 3),
    HALVE_VALID,
    Conv(80),
    Conv(192, 3, padding=0),
    HALVE_VALID,
)
IR_MIXED: dict[str, tuple[Branch, ...]] = {
    "mixed_5b": (
        (Conv(96),),
        (Conv(48), Conv(64, 5)),
        (Conv(64), Conv(96, 3), Conv(96, 3)),
        (MEAN, Conv(64)),
    ),
    "mixed_6a": (
        (Conv(384, 3, 2, padding=0),),
        (Conv(256), Conv(256, 3), Conv(384, 3, 2, padding=0)),
        (HALVE_VALID,),
    ),
    "mixed_7a": (
        (Conv(256), Conv(384, 3, 2, padding=0)),
        (Conv(256), Conv(288, 3, 2, padding=0)),
        (Conv(256), Conv(288, 3), Conv(320, 3, 2, padding=0)),
        (HALVE_VALID,),
    ),
}
# after the mixed module of that name: scale of the residual, branches
IR_RESIDUAL: dict[str, tuple[float, tuple[Branch, ...]]] = {
    "mixed_5b": (
        0.17,
        ((Conv(32),), (Conv(32), Conv(32, 3)), (Conv(32), Conv(48, 3), Conv(64, 3))),
    ),
    "mixed_6a": (0.10, ((Conv(192),), (Conv(128), Conv(160, (1, 7)), Conv(192, (7, 1))))),
    "mixed_7a": (0.20, ((Conv(192),), (Conv(192), Conv(224, (1, 3)), Conv(256, (3, 1))))),
}


class Mixed(nn.Module):
    """Branches concatenated over channels, then an SE block where there is one."""

    def __init__(self, inputs: int, branches: tuple[Branch, ...], se: SE | None = None) -> None:
        super().__init__()
        chains = [chain(inputs, branch) for branch in branches]
        self.branches = nn.ModuleList(modules for modules, _ in chains)
        self.outputs = sum(outputs for _, outputs in chains)
        self.se = SqueezeExcitation(self.outputs, se) if se else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        out = torch.cat([branch(x) for branch in self.branches], 1)
        return self.se(out)  # type: ignore[no-any-return]


class Residual(nn.Module):
    """x + scale * se(conv(branches(x))), ReLU."""

    def __init__(
        self, channels: int, branches: tuple[Branch, ...], se: SE, *, scale: float
    ) -> None:
        super().__init__()
        self.scale = scale
        self.mixed = Mixed(channels, branches)
        self.conv = nn.Conv2d(self.mixed.outputs, channels, 1)
        self.se = SqueezeExcitation(channels, se)
        self.relu = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        out = self.se(self.conv(self.mixed(x)))
        return self.relu(x + self.scale * out)  # type: ignore[no-any-return]


def bn_inception(channels: int, classes: int, se: SE) -> nn.Module:
    stem: Branch = (Conv(64, 7, 2), HALVE, Conv(64), Conv(192, 3), HALVE)
    features = nn.Sequential()
    features.stem, outputs = chain(channels, stem)
    for name in BN_MODULES:
        module = Mixed(outputs, _bn_branches(name), se)
        features.add_module(f"inception_{name}", module)
        outputs = module.outputs
    return Pooled(features, outputs, classes)


def _bn_branches(name: str) -> tuple[Branch, ...]:
    single, (reduced, out), (reduced_double, double), pooling, projection = BN_MODULES[name]
    stride = 1 if single else 2
    pool: Branch = (Pool(pooling, stride),)
    branches: tuple[Branch, ...] = (
        (Conv(reduced), Conv(out, 3, stride)),
        (Conv(reduced_double), Conv(double, 3), Conv(double, 3, stride)),
        (*pool, Conv(projection)) if projection else pool,
    )
    return ((Conv(single),), *branches) if single else branches


def inception_resnet_v2(
    channels: int, classes: int, se: SE, *, repeats: tuple[int, int, int]
) -> nn.Module:
    features = nn.Sequential()
    features.stem, outputs = chain(channels, IR_STEM)
    for count, (name, branches) in zip(repeats, IR_MIXED.items()):
        mixed = Mixed(outputs, branches)
        features.add_module(name, mixed)
        outputs = mixed.outputs
        scale, residual = IR_RESIDUAL[name]
        blocks = (Residual(outputs, residual, se, scale=scale) for _ in range(count))
        features.add_module(f"{name}_residual", nn.Sequential(*blocks))
    features.head, outputs = chain(outputs, [Conv(1536)])
    return Pooled(features, outputs, classes, dropout=0.2)


NETWORKS = {
    "se_bn_inception": Network(bn_inception),
    # The SE paper does not say how often it repeats the blocks: at these widths 5/20/5 gives its
    # 11.76 G. The released Inception-ResNet-v2 has 10/20/10 and 13.16 G.
    "se_inception_resnet_v2": Network(
        partial(inception_resnet_v2, repeats=(5, 20, 5)), (3, 299, 299)
    ),
    "se_inception_resnet_v2_tf": Network(
        partial(inception_resnet_v2, repeats=(10, 20, 10)), (3, 299, 299)
    ),
}
