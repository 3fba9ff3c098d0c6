"""Least squares for one layer: streamed normal equations, solved for a change of its weights."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from seprune.runtime.distributed import sum_over_processes


@dataclass(frozen=True)
class Product:
    """One call of a layer: `output` = weight times `input` (+ bias).

    `kernel` is () for a linear layer; the geometry of a 1-d convolution is that of a flat 2-d one.
    """

    input: Tensor
    output: Tensor
    kernel: tuple[int, ...] = ()
    stride: tuple[int, ...] = ()
    dilation: tuple[int, ...] = ()
    groups: int = 1

    def columns(self, part: slice, block: slice) -> Tensor:
        """What the weights multiply: (B, conv groups, block of channels x kernel, positions)."""
        x = self.input[part]
        if not self.kernel:
            x = x.flatten(1, -2) if x.dim() > 2 else x.unsqueeze(1)
            return x.movedim(-1, 1)[:, None, block]
        x = x.reshape(len(x), self.groups, -1, *x.shape[2:])[:, :, block].flatten(1, 2)
        if set(self.kernel) == {1}:
            x = x[:, :, :: self.stride[0], :: self.stride[1]].flatten(2)
        else:
            x = F.unfold(x, self.kernel, dilation=self.dilation, stride=self.stride)
        return x.reshape(len(x), self.groups, -1, x.shape[-1])

    def rows(self, made: Tensor) -> Tensor:
        """A tensor like `output` as (B, conv groups, outputs per group, positions)."""
        if not self.kernel:
            made = made.flatten(1, -2) if made.dim() > 2 else made.unsqueeze(1)
            return made.movedim(-1, 1)[:, None]
        flat = made.flatten(2)
        return flat.reshape(len(flat), self.groups, -1, flat.shape[-1])


def observe(layer: nn.Module, x: Tensor) -> Product | None:
    """Run `layer` on `x`; None where its output is not one product with the weight as it stands."""
    with _Products(layer.weight) as seen:  # type: ignore[arg-type]
        output = layer(x)
    (product, result), *more = seen.found or [(None, None)]
    return product if result is output and not more else None


class _Products(TorchFunctionMode):
    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = weight
        self.found: list[tuple[Product, Tensor]] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        name = getattr(func, "__name__", "")
        if name in ("conv1d", "conv2d", "linear"):
            x, weight, *_ = args
            if weight is self.weight:
                geometry = dict(zip(("stride", "padding", "dilation", "groups"), args[3:]))
                made = Product(x, result)
                if name != "linear":
                    made = _convolution(made, weight, **(geometry | (kwargs or {})))
                self.found.append((made, result))
        return result


def _convolution(
    call: Product, weight: Tensor, stride: Any = 1, padding: Any = 0, dilation: Any = 1,
    groups: int = 1,
) -> Product:  # fmt: skip
    kernel = tuple(weight.shape[2:])
    steps, holes = (_each(v, kernel, 1) for v in (stride, dilation))
    x, out, kernel = call.input, call.output, _each(kernel, kernel, 1)
    if weight.dim() == 3:
        x, out = x.unsqueeze(2), out.unsqueeze(2)
    spans = [d * (k - 1) for d, k in zip(holes, kernel)]
    if padding == "same":
        sides = [(s // 2, s - s // 2) for s in spans]
    else:
        widths = _each(0 if padding == "valid" else padding, tuple(weight.shape[2:]), 0)
        sides = [(w, w) for w in widths]
    x = F.pad(x, [*sides[1], *sides[0]])
    return Product(x, out, kernel, steps, holes, groups)


def _each(value: Any, kernel: tuple[int, ...], filler: int) -> tuple[int, ...]:
    """A value per dimension, of two dimensions."""
    values = (value,) if isinstance(value, int) else tuple(value)
    values = values * len(kernel) if len(values) == 1 else values
    return (filler,) * (2 - len(values)) + values


@dataclass
class Normal:
    """Normal equations of one block of columns, summed over rows, float64, one per conv group."""

    gram: Tensor  # (groups, K, K)
    cross: Tensor  # (groups, K, outputs per group): columns times residual
    sums: Tensor  # (groups, K)
    residual: Tensor  # (2, groups, outputs per group): sum and sum of squares
    target: Tensor  # the same
    rows: int = 0
    whole: bool = False  # gram and sums are complete

    @classmethod
    def empty(cls, groups: int, width: int, outputs: int, device: torch.device) -> Normal:
        """Sums of nothing."""

        def zeros(*shape: int) -> Tensor:
            return torch.zeros(shape, dtype=torch.float64, device=device)

        pairs = zeros(2, groups, outputs)
        return cls(
            gram=zeros(groups, width, width),
            cross=zeros(groups, width, outputs),
            sums=zeros(groups, width),
            residual=pairs,
            target=pairs.clone(),
        )

    def again(self) -> Normal:
        """The same columns, for other residuals."""
        zeros = [torch.zeros_like(t) for t in (self.cross, self.residual, self.target)]
        return Normal(self.gram, zeros[0], self.sums, zeros[1], zeros[2], whole=True)

    def add(self, x_BGKP: Tensor, residual_BGOP: Tensor, target_BGOP: Tensor) -> None:
        """Add the rows of some images."""
        parts = (x_BGKP, residual_BGOP, target_BGOP)
        x, r, t = (part.movedim(0, 2).flatten(2).double() for part in parts)
        if not self.whole:
            self.gram += x @ x.mT
            self.sums += x.sum(2)
        self.cross += x @ r.mT
        self.residual += torch.stack([r.sum(2), r.square().sum(2)])
        self.target += torch.stack([t.sum(2), t.square().sum(2)])
        self.rows += x.shape[2]

    def over_processes(self) -> Normal:
        """The sums of all processes, in each of them."""
        known = [t if self.whole else sum_over_processes(t) for t in (self.gram, self.sums)]
        new = [sum_over_processes(t) for t in (self.cross, self.residual, self.target)]
        rows = sum_over_processes(torch.tensor(self.rows, device=self.gram.device))
        return Normal(known[0], new[0], known[1], new[1], new[2], int(rows), self.whole)

    def solve(self, ridge: float, pull: Tensor, *, intercept: bool) -> Solution:
        """The change of the weights, and of the intercept, with the least ridge loss.

        Args:
            ridge: relative to the mean square of a column.
            pull: (groups, K, outputs per group): weights minus those that the ridge shrinks to.

        Raises:
            ArithmeticError: the sums are not finite, or the system has no unique solution.
        """
        gram, cross, (_, square) = self.gram, self.cross, self.residual
        means = self.sums / self.rows
        if intercept:
            gram = gram - self.rows * means[:, :, None] * means[:, None]
            cross = cross - means[:, :, None] * self.residual[0][:, None]
            square = square - self.residual[0].square() / self.rows
        diagonal = gram.diagonal(dim1=1, dim2=2)
        weight = ridge * diagonal.mean(1)[:, None, None] + 1e-30
        damped = gram.clone()
        damped.diagonal(dim1=1, dim2=2).add_(weight[:, 0])
        factor, info = torch.linalg.cholesky_ex(damped)
        change = torch.cholesky_solve(cross - weight * pull, factor)
        if bool((info != 0).any()) or not bool(change.isfinite().all()):
            raise ArithmeticError("its normal equations have no finite unique solution")
        shift = (self.residual[0] - torch.einsum("gk,gko->go", self.sums, change)) / self.rows
        after = square - (change * (2 * cross - gram @ change)).sum(1)
        spread = self.target[1] - self.target[0].square() / self.rows
        scale = float(spread.sum().clamp_min(1e-30))
        before = float(self.residual[1].sum()) / scale
        return Solution(
            change, shift if intercept else shift * 0, before, float(after.sum()) / scale
        )


@dataclass(frozen=True)
class Solution:
    """A change of weights (groups, K, outputs per group) and intercept (groups, outputs per group).

    `before`, `after`: squared error relative to the variance of the target.
    """

    change: Tensor
    shift: Tensor
    before: float
    after: float
