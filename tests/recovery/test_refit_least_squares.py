"""The refit of one layer against numpy's least squares in float64, for every kind of layer."""

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from seprune.graph.groups import find_structure
from seprune.pruning.plan import plan_of
from seprune.pruning.prune import prune
from seprune.recovery.refit import RefitOptions, refit

EXACT = RefitOptions(ridge=1e-12, precision="float64", device="cpu", rows=1 << 20)
SHAPES = {1: (60, 10, 9), 2: (24, 10, 9, 8), 3: (16, 10, 5, 6, 4)}
EACH = [{}, {"groups": 2}, {"groups": 8}, {"stride": 2}, {"dilation": 2}, {"bias": False}]
PADDED = [
    {"padding": 2 if "dilation" in o else 1, "padding_mode": mode, **o}
    for o in EACH for mode in ("zeros", "reflect", "replicate", "circular")
]  # fmt: skip
PLAIN = [
    {"padding": 1}, {"groups": 2, "padding": 1}, {"groups": 8}, {"dilation": 2, "padding": 2},
    {"padding": "same"}, {"padding": "valid"}, {"padding": 1, "bias": False},
]  # fmt: skip
UNPADDED = [{"groups": 8}, {"padding": "same"}, {"padding": "valid"}]
TRANSPOSED = [
    {"stride": 2}, {"stride": 2, "padding": 1, "output_padding": 1},
    {"dilation": 2, "bias": False}, {"groups": 8, "stride": 2},
]  # fmt: skip
ODD = [
    (nn.Conv1d, 2, {"stride": 3}),  # gaps between the kernels
    (nn.Conv2d, 2, {"stride": 3, "padding": 1}),
    (nn.Conv2d, 3, {"stride": (5, 4), "groups": 2}),
    (nn.Conv2d, 1, {"stride": 2}),
    (nn.Conv3d, 1, {"stride": 2, "bias": False}),
    (nn.Conv1d, 4, {"padding": "same"}),  # one more behind than in front
    (nn.Conv2d, 2, {"padding": "same", "dilation": 3}),
    (nn.Conv2d, 4, {"padding": "same", "padding_mode": "circular"}),
    (nn.Conv2d, 2, {"padding": "same", "padding_mode": "reflect", "dilation": (1, 3)}),
    (nn.Conv2d, (1, 3), {"padding": (0, 1), "stride": (2, 1)}),
    (nn.Conv2d, (3, 2), {"stride": (1, 2), "dilation": (2, 1), "padding": (2, 1),
                         "padding_mode": "replicate"}),
    (nn.Conv2d, 3, {"padding": 1, "stride": 2, "groups": 8, "padding_mode": "circular"}),
    (nn.Conv3d, (1, 2, 3), {"padding": (0, 1, 2), "padding_mode": "circular"}),
    (nn.Conv3d, 3, {"padding": 1, "padding_mode": "replicate", "groups": 2}),
    (nn.Conv3d, 3, {"stride": (1, 2, 2), "groups": 8, "padding": 1}),
    (nn.ConvTranspose1d, 2, {"stride": 3}),  # outputs that no input reaches
    (nn.ConvTranspose2d, 1, {"stride": 2}),
    (nn.ConvTranspose2d, (2, 3), {"stride": (3, 2), "output_padding": (1, 0), "padding": (0, 1)}),
    (nn.ConvTranspose2d, 3, {"stride": 2, "groups": 2, "dilation": (1, 2)}),
    (nn.ConvTranspose3d, 2, {"stride": (1, 2, 1), "groups": 2}),
]  # fmt: skip
LAYERS = [
    *((kind, 3, o) for kind in (nn.Conv1d, nn.Conv2d) for o in (*PADDED, *UNPADDED)),
    *((nn.Conv3d, 3, o) for o in PLAIN),
    *((kind, 3, o) for kind in (nn.ConvTranspose1d, nn.ConvTranspose2d) for o in TRANSPOSED),
    (nn.ConvTranspose3d, 3, {"stride": 2}),
    *ODD,
]


def network(kind, kernel, options):
    """A 1x1 layer whose outputs are halved, the layer in question, and a reader of its outputs."""
    torch.manual_seed(0)
    dim = int(kind.__name__[-2])
    first = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[dim - 1]
    layer = kind(8, 8 if options.get("groups") == 8 else 6, kernel, **options)
    model = nn.Sequential(first(10, 8, 1, bias=False), layer, first(layer.out_channels, 2, 1))
    return model.eval(), torch.randn(*SHAPES[dim], dtype=torch.float64)


def halved(model, x):
    """The plan that keeps the lower half of every group, and the cut network."""
    groups = find_structure(model, x).groups
    plan = plan_of(groups, {g.name: range(g.units // 2) for g in groups if g.prunable}, {})
    return plan, prune(model, plan)


@pytest.mark.parametrize(("kind", "kernel", "options"), LAYERS)
def test_the_solution_is_that_of_plain_least_squares(kind, kernel, options):
    model, x = network(kind, kernel, options)
    model.double()
    plan, small = halved(model, x)
    kept = plan.layers()["1"].get("out", np.arange(model[1].out_channels))
    result = refit(model, small, plan, [x], options=EXACT)
    assert result.skipped == {}
    with torch.no_grad():
        want, inputs = model[1](model[0](x))[:, kept], small[0](x)
    weight, bias = least_squares(small[1], inputs, want)
    found = result.model[1]
    assert torch.allclose(found.weight, weight, rtol=1e-4, atol=1e-6)
    if bias is not None:
        assert torch.allclose(found.bias, bias, rtol=1e-4, atol=1e-6)


def least_squares(layer, inputs, want, *, ridge=0.0):
    """Weights and bias by numpy's lstsq on columns made by running the layer, a weight at a time.

    Args:
        ridge: times the mean square of a column about its mean, on the distance to the weights.
    """
    design, outputs = columns(layer, inputs), want.shape[1]
    rows = want.movedim(1, -1).reshape(-1, outputs).double().numpy()
    old, weight, bias = (
        layer.weight.detach().double().flatten().numpy(),
        torch.zeros(layer.weight.numel(), dtype=torch.float64),
        torch.zeros(outputs, dtype=torch.float64),
    )
    owner = columns(layer, torch.ones_like(inputs[:1])).sum(1).argmax(1)  # whose output it makes
    for output in range(outputs):
        used = owner == output
        matrix = design[used, :, output].T
        residual = rows[:, output] - matrix @ old[used]
        mean = (matrix.mean(0), residual.mean()) if layer.bias is not None else (0 * matrix[0], 0.0)
        x, y = matrix - mean[0], residual - mean[1]
        damp = ridge * np.square(x).sum() / x.shape[1]
        x = np.vstack([x, np.sqrt(damp) * np.eye(x.shape[1])])
        change = np.linalg.lstsq(x, np.append(y, np.zeros(x.shape[1])), rcond=None)[0]
        weight[used] = torch.from_numpy(old[used] + change)
        bias[output] = mean[1] - mean[0] @ change
    return weight.view_as(layer.weight), bias if layer.bias is not None else None


def columns(layer, inputs):
    """(weights, rows, outputs): what each weight alone gives for a unit of it, in float64."""
    layer, made = copy.deepcopy(layer).double(), []
    with torch.no_grad():
        if layer.bias is not None:
            layer.bias.zero_()
        for number in range(layer.weight.numel()):
            layer.weight.zero_()
            layer.weight.view(-1)[number] = 1
            output = layer(inputs.double())
            made.append(output.movedim(1, -1).reshape(-1, output.shape[1]).numpy())
    return np.stack(made)


RIDGES = [
    *((nn.Conv2d, o) for o in ({"padding": 1}, {"groups": 2}, {"groups": 8}, {"bias": False})),
    (nn.Conv2d, {"padding": 1, "padding_mode": "replicate"}),
    (nn.ConvTranspose2d, {"padding": 1}),
]


@pytest.mark.parametrize(("kind", "options"), RIDGES)
def test_inputs_without_variance_change_only_what_the_ridge_leaves_open(kind, options):
    """Of the kept inputs one is always 0, and one always the same."""
    model, x = network(kind, 3, options)
    model[0] = nn.Conv2d(10, 8, 1)
    with torch.no_grad():
        model[0].weight[:2] = 0
        model[0].bias[:2] = torch.tensor([0.0, 2.0])
    compare_ridge(model.double(), x, ridge=1e-6, within=1e-6)


@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize(
    "options", [{"padding": 1}, {"padding": 1, "groups": 2}, {"padding": 1, "bias": False}]
)
def test_fewer_rows_than_unknowns_have_the_solution_nearest_the_sliced_weights(options, count):
    model, x = network(nn.Conv2d, 3, options)
    compare_ridge(model.double(), x[:count, :, :3, :3], ridge=1e-3, within=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "options", [{"padding": 1}, {"groups": 2, "bias": False}, {"groups": 8}, {"stride": 2}]
)
def test_half_precision_costs_no_more_than_the_rounding_of_the_weights(dtype, options):
    model, x = network(nn.Conv2d, 3, options)
    step = torch.finfo(dtype).eps
    compare_ridge(model.to(dtype), (x + 3).to(dtype), ridge=1e-3, within=step)


def compare_ridge(model, x, *, ridge, within):
    """The refit in its default precision beside numpy's ridge regression."""
    plan, small = halved(model, x)
    kept = plan.layers()["1"].get("out", np.arange(model[1].out_channels))
    precision = "float64" if x.dtype == torch.float64 else "float32"
    options = replace(EXACT, ridge=ridge, precision=precision)
    result = refit(model, small, plan, [x], options=options)
    assert result.skipped == {}
    with torch.no_grad():
        want, inputs = model[1](model[0](x))[:, kept], small[0](x)
    weight, bias = least_squares(small[1], inputs, want, ridge=ridge)
    found = result.model[1]
    assert torch.allclose(found.weight.double(), weight, rtol=within, atol=within / 8)
    if bias is not None:
        assert torch.allclose(found.bias.double(), bias, rtol=within, atol=within)
    assert not torch.equal(found.weight, small[1].weight)
