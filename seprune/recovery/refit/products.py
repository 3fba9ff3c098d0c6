"""One call of a layer as a matrix product: which inputs the weights meet at an output position."""

from __future__ import annotations

import math
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

_DIMENSIONS = {
    name + f"{n}d": n for n in (1, 2, 3) for name in ("conv", "conv_transpose")
} | {"linear": 0}  # fmt: skip
_CONVOLUTION = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")
_TRANSPOSED = (*_CONVOLUTION[:5], "output_padding", "groups", "dilation")


@dataclass(frozen=True)
class Geometry:
    """Where a convolution reads; `before` is the padding in front of every dimension.

    Attributes:
        size: of the input, per dimension.
        outputs: the size of the output.
    """

    size: tuple[int, ...]
    outputs: tuple[int, ...]
    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    before: tuple[int, ...]
    dilation: tuple[int, ...]
    transposed: bool = False


@dataclass(frozen=True)
class MatrixProduct:
    """One call of a layer: output = weight times patches of `input` (+ bias).

    Attributes:
        input: (B, C, *size) of a convolution, (B, *tokens, C) of a linear layer.
        geometry: None for a linear layer.
    """

    input: Tensor
    geometry: Geometry | None = None
    groups: int = 1

    @cached_property
    def positions(self) -> int:
        """Output positions of one sample."""
        shape = self.geometry.outputs if self.geometry else self.input.shape[1:-1]
        return math.prod(shape)

    def images(self, part: slice) -> MatrixProduct:
        """The same call on some samples."""
        return replace(self, input=self.input[part])

    def patches(self, index_BP: Tensor) -> Tensor:
        """What the weights meet at output positions: (conv groups, B x P, kernel x channels).

        Args:
            index_BP: flat output positions of every sample.
        """
        rows = self._taken(index_BP)  # (B, P, kernel, C)
        if self.groups == 1:
            return rows.reshape(1, -1, rows.shape[2] * rows.shape[3])
        split = rows.reshape(-1, rows.shape[2], self.groups, rows.shape[3] // self.groups)
        return split.permute(2, 0, 1, 3).reshape(self.groups, len(split), -1)

    def _taken(self, index_BP: Tensor) -> Tensor:
        x, count = self.input, index_BP.shape[1]
        if self.geometry is None:
            return sampled(x, index_BP, dim=-1)[:, :, None]
        table = _table(self.geometry).to(x.device)
        size, kernel = math.prod(self.geometry.size), table.shape[1]
        where = table[index_BP].flatten(1)  # (B, P x kernel)
        flat = x.flatten(2)
        if 2 * where.shape[1] < size:  # few of all positions: fetch them one by one
            inside = where.clamp_max(size - 1)[:, None].expand(-1, x.shape[1], -1)
            taken = flat.gather(2, inside) * (where < size)[:, None]
            return taken.mT.reshape(len(x), count, kernel, -1)
        rows = x.new_zeros(len(x), size + 1, x.shape[1])  # the last one is padding
        rows[:, :size] = flat.mT
        first = torch.arange(len(x), device=x.device)[:, None] * (size + 1)
        taken = rows.flatten(0, 1).index_select(0, (where + first).flatten())
        return taken.reshape(len(x), count, kernel, -1)


@dataclass(frozen=True)
class WeightLayout:
    """How the weights of a layer make a matrix per conv group.

    Attributes:
        kernel: how many elements one kernel has; 1 for a linear layer.
    """

    groups: int
    kernel: int
    inputs: int
    transposed: bool

    @classmethod
    def of(cls, layer: Any) -> WeightLayout:
        """The layout of a convolution or a linear layer."""
        groups, shape = getattr(layer, "groups", 1), layer.weight.shape
        transposed = isinstance(layer, nn.modules.conv._ConvTransposeNd)
        inputs = shape[0] // groups if transposed else shape[1]
        return cls(groups, math.prod(shape[2:]), inputs, transposed)

    def matrix(self, weight: Tensor) -> Tensor:
        """Weights as (conv groups, kernel, inputs, outputs), inputs and outputs per conv group."""
        split = weight.reshape(self.groups, -1, weight.shape[1], self.kernel)
        return split.permute((0, 3, 1, 2) if self.transposed else (0, 3, 2, 1))

    def weight(self, matrix: Tensor, like: Tensor) -> Tensor:
        """The inverse of `matrix`, in the shape of `like`."""
        return matrix.permute((0, 2, 3, 1) if self.transposed else (0, 3, 2, 1)).reshape(like.shape)

    def fits(self, call: MatrixProduct) -> bool:
        """Whether a call uses the weights so."""
        transposed = call.geometry is not None and call.geometry.transposed
        return (call.groups, transposed) == (self.groups, self.transposed)


def sampled(values: Tensor, index_BP: Tensor, *, dim: int) -> Tensor:
    """(B, P, C): the channels, along `dim`, of a feature map at flat positions of every sample."""
    if values.dim() == 2:
        return values[:, None]
    if dim in (-1, values.dim() - 1):
        rows = values.flatten(1, -2)
        return rows.gather(1, index_BP[:, :, None].expand(-1, -1, rows.shape[2]))
    flat = values.movedim(dim, 1).flatten(2)
    return flat.gather(2, index_BP[:, None].expand(-1, flat.shape[1], -1)).mT


@lru_cache(maxsize=64)
def _table(geometry: Geometry) -> Tensor:
    """(output positions, kernel): flat input positions; one past the last one means padding."""
    g = geometry
    flat = torch.zeros(1, 1, dtype=torch.int64)
    valid = torch.ones(1, 1, dtype=torch.bool)
    for size, made, kernel, stride, before, dilation in zip(
        g.size, g.outputs, g.kernel, g.stride, g.before, g.dilation, strict=True
    ):
        out, tap = torch.arange(made)[:, None], torch.arange(kernel)[None] * dilation
        place = out + before - tap if g.transposed else out * stride - before + tap
        inside = place % stride == 0 if g.transposed else torch.ones_like(place, dtype=torch.bool)
        place = place.div(stride, rounding_mode="floor") if g.transposed else place
        inside &= (place >= 0) & (place < size)
        flat = (flat * size)[:, None, :, None] + place[None, :, None]
        valid = valid[:, None, :, None] & inside[None, :, None]
        flat, valid = (t.flatten(2).flatten(0, 1) for t in (flat, valid))
    return flat.where(valid, torch.tensor(math.prod(g.size)))


def observe(layer: nn.Module, x: Tensor) -> MatrixProduct | None:
    """Run `layer` on `x`; None where its output is not one product with the weight as it stands."""
    with _Products(layer.weight) as seen:  # type: ignore[arg-type]
        output = layer(x)
    (product, result), *more = seen.found or [(None, None)]
    return product if result is output and not more else None


def capture(layer: nn.Module, x: Tensor) -> MatrixProduct:
    """`observe` without the product itself, for a layer that was observed before."""
    with suppress(_Captured), _Products(layer.weight, stop=True) as seen:  # type: ignore[arg-type]
        layer(x)
    found: MatrixProduct = seen.found[0][0]
    return found


class _Captured(BaseException):
    """Ends a layer in front of its product."""


class _Products(TorchFunctionMode):
    def __init__(self, weight: Tensor, *, stop: bool = False) -> None:
        super().__init__()
        self.wanted, self.stop = weight, stop
        self.found: list[tuple[MatrixProduct, Tensor | None]] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name, kwargs = getattr(func, "__name__", ""), kwargs or {}
        names = _TRANSPOSED if "transpose" in name else _CONVOLUTION
        given = dict(zip(names, args)) | kwargs if name in _DIMENSIONS else {}
        if given.get("weight") is not self.wanted:
            return func(*args, **kwargs)
        result = None if self.stop else func(*args, **kwargs)
        self.found.append((_product(name, given), result))
        if self.stop:
            raise _Captured
        return result


def _product(name: str, given: dict[str, Any]) -> MatrixProduct:
    x, count = given["input"], _DIMENSIONS[name]
    if not count:
        return MatrixProduct(x)
    x = x if x.dim() == count + 2 else x[None]
    kernel = tuple(given["weight"].shape[2:])
    stride, dilation, extra = (
        _each(given.get(key, default), count)
        for key, default in (("stride", 1), ("dilation", 1), ("output_padding", 0))
    )
    spans = [d * (k - 1) for d, k in zip(dilation, kernel)]
    size, padding, transposed = tuple(x.shape[2:]), given.get("padding", 0), "transpose" in name
    if padding == "same":
        before, outputs = tuple(s // 2 for s in spans), size
    else:
        before = _each(0 if padding == "valid" else padding, count)
        numbers = zip(size, stride, before, spans, extra)
        outputs = tuple(
            (n - 1) * step - 2 * pad + span + more + 1 if transposed
            else (n + 2 * pad - span - 1) // step + 1
            for n, step, pad, span, more in numbers
        )  # fmt: skip
    geometry = Geometry(size, outputs, kernel, stride, before, dilation, transposed)
    return MatrixProduct(x, geometry, given.get("groups", 1))


def _each(value: Any, count: int) -> tuple[int, ...]:
    values = (value,) if isinstance(value, int) else tuple(value)
    return values * count if len(values) == 1 else values
