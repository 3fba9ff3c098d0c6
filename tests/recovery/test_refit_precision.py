"""Products in float32, sums in float64, solve each layer of ten networks as float64 does."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from seprune.models import build
from seprune.recovery.refit.least_squares import NormalEquations
from seprune.recovery.refit.products import observe

NETWORKS = (
    "seprune/se_resnet20", "seprune/se_preactresnet20", "seprune/se_resnet18",
    "seprune/se_mobilenet", "seprune/se_shufflenet", "seprune/se_vgg16",
    "torchvision/mobilenet_v3_small", "torchvision/efficientnet_b0",
    "timm/regnety_002", "timm/skresnet18",
)  # fmt: skip
ROWS, CHUNK, RIDGE, LAYERS = 4096, 1024, 1e-3, 6


def inputs_of(model: nn.Module, x: torch.Tensor) -> list[tuple[nn.Module, torch.Tensor]]:
    """Some convolutions and linear layers, spread over the network, with what they read."""
    seen: list[tuple[nn.Module, torch.Tensor]] = []
    handles = [
        layer.register_forward_pre_hook(lambda layer, given: seen.append((layer, given[0].clone())))
        for layer in model.modules()
        if isinstance(layer, nn.Conv2d | nn.Linear)
    ]
    with torch.no_grad():
        model(x)
    for handle in handles:
        handle.remove()
    return seen[1 :: max(1, len(seen) // LAYERS)]


def rows_of(layer: nn.Module, given: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Patches (groups, rows, columns / 2) and outputs (groups, outputs, rows) of a layer."""
    with torch.no_grad():
        call, output = observe(layer, given), layer(given)
    assert call is not None
    index = torch.arange(call.positions).expand(len(given), -1)
    patches = call.patches(index)
    wanted = output.movedim(1, -1) if output.dim() == 4 else output
    wanted = wanted.reshape(-1, len(patches), wanted.shape[-1] // len(patches)).permute(1, 2, 0)
    half = patches[:, :, : max(1, patches.shape[2] // 2)]
    order = torch.randperm(half.shape[1], generator=torch.Generator().manual_seed(0))[:ROWS]
    return half[:, order], wanted[:, :, order]


def solved(
    x: torch.Tensor, wanted: torch.Tensor, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """Change of the weights and of the intercept, from zero, as a refit finds them."""
    centre = x.mean(1, keepdim=True)
    sums = NormalEquations.empty(len(x), x.shape[2], wanted.shape[1], x.device)
    for start in range(0, x.shape[1], CHUNK):
        part = slice(start, start + CHUNK)
        target = wanted[:, :, part].to(dtype)
        sums.add((x[:, part] - centre).to(dtype), target, target)
    found = sums.solve(RIDGE, torch.zeros_like(sums.cross), intercept=True)
    return found.change, found.shift - (centre.double() @ found.change)[:, 0]


@pytest.mark.slow
@pytest.mark.parametrize("name", NETWORKS)
def test_float32_products_cost_less_than_a_ten_thousandth_of_the_residual(name):
    torch.manual_seed(0)
    model = build(name, classes=10).train()
    x = torch.randn(32, 3, 64, 64)
    with torch.no_grad():
        model(x)  # norms that have seen images
    for layer, given in inputs_of(model.eval(), x):
        patches, wanted = rows_of(layer, given)
        exact, fast = (solved(patches, wanted, dtype) for dtype in (torch.float64, torch.float32))
        rest, other = (
            wanted.double().mT - patches.double() @ change - shift[:, None]
            for change, shift in (exact, fast)
        )
        residual, moved = rest.square().sum(), (rest - other).square().sum()
        rounding = (1e-6 * wanted.double()).square().sum()  # where outputs hardly vary
        assert moved <= 1e-4 * residual + rounding, layer
