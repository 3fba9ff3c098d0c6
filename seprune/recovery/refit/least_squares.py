"""Least squares for one layer: streamed normal equations, solved for a change of its weights."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from seprune.runtime.distributed import sum_over_processes

_PARTS = 4  # column blocks of a Gram matrix, of which only the upper half is multiplied out
_SMALL = 64  # columns below which one product is faster than blocks


@dataclass
class NormalEquations:
    """Normal equations of one block of columns, summed over rows, float64, one per conv group."""

    gram: Tensor  # (groups, K, K)
    cross: Tensor  # (groups, K, outputs per group): columns times residual
    sums: Tensor  # (groups, K)
    residual: Tensor  # (2, groups, outputs per group): sum and sum of squares
    target: Tensor  # the same
    rows: int = 0
    complete: bool = False  # gram and sums are known; only other residuals are added
    factor: Tensor | None = None  # Cholesky factor of the damped gram

    @classmethod
    def empty(cls, groups: int, width: int, outputs: int, device: torch.device) -> NormalEquations:
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

    def again(self) -> NormalEquations:
        """The same columns, for other residuals."""
        zeros = [torch.zeros_like(t) for t in (self.cross, self.residual, self.target)]
        return NormalEquations(
            self.gram, zeros[0], self.sums, zeros[1], zeros[2],
            complete=True, factor=self.factor,
        )  # fmt: skip

    def add(self, x: Tensor, residual: Tensor, target: Tensor) -> None:
        """Add some rows; products in the precision of `x`, sums in float64.

        Args:
            x: (groups, rows, K).
            residual: (groups, outputs per group, rows), as is `target`.
        """
        if not self.complete:
            self.gram += gram(x)
            self.sums += x.sum(1)
        self.cross += product(residual, x).mT
        for sums, values in ((self.residual, residual), (self.target, target)):
            sums += torch.stack([values.sum(2), values.square().sum(2)])
        self.rows += x.shape[1]

    def over_processes(self) -> NormalEquations:
        """The sums of all processes, in each of them."""
        known = [t if self.complete else sum_over_processes(t) for t in (self.gram, self.sums)]
        new = [sum_over_processes(t) for t in (self.cross, self.residual, self.target)]
        rows = sum_over_processes(torch.tensor(self.rows, device=self.gram.device))
        return NormalEquations(
            known[0], new[0], known[1], new[1], new[2], int(rows), self.complete, self.factor
        )

    def solve(self, ridge: float, pull: Tensor, *, intercept: bool) -> Solution:
        """The change of the weights, and of the intercept, with the least ridge loss.

        Args:
            ridge: relative to the mean square of a column.
            pull: (groups, K, outputs per group): weights minus those that the ridge shrinks to.

        Raises:
            ArithmeticError: the sums are not finite, or the system has no unique solution.
        """
        cross, (_, square) = self.cross, self.residual
        means = self.sums / self.rows
        if intercept:
            cross = cross - means[:, :, None] * self.residual[0][:, None]
            square = square - self.residual[0].square() / self.rows
        weight = ridge * self._diagonal(intercept).mean(1)[:, None, None] + 1e-30
        if self.factor is None:
            self.factor = self._factorised(weight, intercept)
        right = cross - weight * pull
        change = torch.cholesky_solve(right, self.factor)
        if not bool(change.isfinite().all()):
            raise ArithmeticError("its normal equations have no finite unique solution")
        shift = (self.residual[0] - torch.einsum("gk,gko->go", self.sums, change)) / self.rows
        # gram @ change = right - weight * change, as (gram + weight) @ change = right
        after = square - (change * (2 * cross - right + weight * change)).sum(1)
        spread = self.target[1] - self.target[0].square() / self.rows
        return Solution(
            change,
            shift if intercept else shift * 0,
            before=float(self.residual[1].sum()),
            after=float(after.sum()),
            spread=float(spread.sum().clamp_min(1e-30)),
        )

    def _diagonal(self, intercept: bool) -> Tensor:
        own = self.gram.diagonal(dim1=1, dim2=2)
        return own - self.sums.square() / self.rows if intercept else own

    def _factorised(self, weight: Tensor, intercept: bool) -> Tensor:
        damped = self.gram.clone()
        if intercept:
            damped.baddbmm_(self.sums[:, :, None], self.sums[:, None], alpha=-1 / self.rows)
        damped.diagonal(dim1=1, dim2=2).add_(weight[:, 0])
        factor: Tensor
        factor, info = torch.linalg.cholesky_ex(damped)
        if bool((info != 0).any()):
            raise ArithmeticError("its normal equations have no finite unique solution")
        return factor


def gram(x: Tensor) -> Tensor:
    """(G, K, K) from (G, rows, K): columns times columns, symmetric parts multiplied out once."""
    width = x.shape[2]
    if len(x) > 1 or width < _SMALL:
        return x.mT @ x
    full, step = x.new_empty(1, width, width), -(-width // _PARTS)
    for start in range(0, width, step):
        rows = x[0, :, start : start + step].mT @ x[0, :, start:]
        full[0, start : start + step, start:] = rows
        full[0, start:, start : start + step] = rows.mT
    return full


def product(a: Tensor, b: Tensor) -> Tensor:
    """The batched product; of one matrix without the slower batched call."""
    return (a[0] @ b[0])[None] if len(a) == 1 else a @ b


@dataclass(frozen=True)
class Solution:
    """A change of weights (groups, K, outputs per group) and intercept (groups, outputs per group).

    `before`, `after`: sums of squared errors; `spread`: of the target about its mean.
    """

    change: Tensor
    shift: Tensor
    before: float
    after: float
    spread: float
