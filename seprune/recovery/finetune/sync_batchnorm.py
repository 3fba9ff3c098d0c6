"""BatchNorm over the batches of all processes, so that N processes train as one does."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.nn.modules.batchnorm import _BatchNorm


def share_norms(model: nn.Module) -> None:
    """Make every BatchNorm of `model` measure the batch of all processes while it trains.

    torch's SyncBatchNorm needs a GPU and changes the modules' type; this works on any backend and
    leaves the modules as they are but for their `forward`.
    """
    for module in model.modules():
        if isinstance(module, _BatchNorm):
            module.forward = partial(_forward, module)  # type: ignore[method-assign]


class _AllReduce(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor) -> Tensor:
        values = values.clone()
        dist.all_reduce(values)
        return values

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        gradient = gradient.contiguous().clone()
        dist.all_reduce(gradient)
        return gradient


def _forward(norm: _BatchNorm, x: Tensor) -> Tensor:
    if not norm.training:
        return type(norm).forward(norm, x)
    dims = [d for d in range(x.ndim) if d != 1]
    wide = x.float()
    local = torch.full((1,), wide.numel() / wide.shape[1], device=x.device)
    sums = _AllReduce.apply(torch.cat([wide.sum(dims), local]))
    count = sums[-1].detach()
    mean = sums[:-1] / count
    shape = [1, -1] + [1] * (x.ndim - 2)
    centred = wide - mean.view(shape)
    variance = _AllReduce.apply((centred * centred).sum(dims)) / count
    if norm.track_running_stats:
        _update(norm, mean.detach(), variance.detach() * count / (count - 1))
    out = centred * (variance + norm.eps).rsqrt().view(shape)
    if norm.affine:
        out = torch.addcmul(norm.bias.view(shape), out, norm.weight.view(shape))
    result: Tensor = out.to(x.dtype)
    return result


def _update(norm: _BatchNorm, mean: Tensor, variance: Tensor) -> None:
    assert norm.running_mean is not None
    assert norm.running_var is not None
    assert norm.num_batches_tracked is not None
    norm.num_batches_tracked.add_(1)
    part = norm.momentum if norm.momentum is not None else 1 / float(norm.num_batches_tracked)
    norm.running_mean.lerp_(mean, part)
    norm.running_var.lerp_(variance, part)
