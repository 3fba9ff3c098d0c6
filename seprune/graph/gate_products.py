"""Multiplications of a feature map by a squeezed tensor, and which number meets which channel.

`x / (1 + exp(-z))` multiplies by a sigmoid that no tensor holds: the gate is read at the divisor.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from seprune.graph.channel_ids import ChannelIds, compact, varying
from seprune.graph.dataflow import COPIES, PRODUCTS, Flow, base
from seprune.graph.trace import Node, Ref


@dataclass(frozen=True)
class Sampled:
    """A tensor's elements by number: `samples` says whose they are, `elements` which of its own."""

    batch_dim: int
    samples: Tensor
    elements: Tensor


@dataclass(frozen=True)
class Product:
    """A gate times a feature map.

    Attributes:
        gate: the squeezed operand; `root` is the same tensor before it was reshaped.
        features: the other operand, before it was reshaped.
        elements: element of one sample of `root` at every position of one sample of `features`.
        dims: dimensions of `features` along which the gate varies.
        batch_dim: of `root`.
        divides: the gate is 1 over the squeezed operand.
    """

    node: Node
    gate: int
    root: int
    features: int
    elements: Tensor
    ids: Tensor
    dims: tuple[int, ...]
    batch_dim: int
    divides: bool = False


_Start = tuple[int, Tensor | None]  # a map, and where its elements went if they moved


def find_products(flow: Flow, channel_ids: ChannelIds) -> list[Product]:
    """Every product of a map with a tensor that holds one value per sample and channel."""
    return [p for node in flow.trace.nodes for p in _products(flow, channel_ids, node)]


def _products(flow: Flow, channel_ids: ChannelIds, node: Node) -> list[Product]:
    for gate, features in _operands(flow, node):
        live = gate in flow.depends and features in flow.depends
        if live and gate in flow.squeezed and features not in flow.squeezed:
            found = next(_placed(flow, channel_ids, (node, gate, features)), None)
            return [found] if found else []
    return []


def _operands(flow: Flow, node: Node) -> Iterator[tuple[int, int]]:
    """What may be the gate and what the features in a node."""
    reads = [a.value for a in node.args if isinstance(a, Ref)]
    if len(reads) < 2:
        return
    features, gate = reads[-2:]
    if base(node) in PRODUCTS:
        yield from ((gate, features), (features, gate))
    elif base(node) == "lerp":  # x + gate * (features - x), by a tensor or by a number
        if len(reads) == 3 and not _constant(flow, features):
            yield gate, features
    elif base(node) == "div" and flow.logistic(gate):
        yield gate, features


def _constant(flow: Flow, value: int) -> bool:
    """Whether a value takes nothing but its shape from what it is made of."""
    maker = flow.producer(value)
    return maker is not None and ("_like" in maker.op or ".new_" in maker.op)


def _placed(
    flow: Flow, channel_ids: ChannelIds, product: tuple[Node, int, int]
) -> Iterator[Product]:
    """The product for every way to tell samples from channels that fits; the usual one first."""
    node, gate, features = product
    if base(node) == "bmm" and not _branchwise(flow, channel_ids, gate, features):
        return
    wide = flow.trace.shape(features if base(node) == "bmm" else node.outputs[0])
    starts: list[_Start] = [(features, None)]
    if wide == flow.trace.shape(features):  # features that are broadcast have no way back
        origin = _origin(flow, features)
        starts = starts if origin[0] == features else [origin, *starts]
    for start in starts:  # what lies before views may mix samples and channels: an instance norm
        yield from _placed_at(flow, channel_ids, product, start, wide)


def _placed_at(
    flow: Flow,
    channel_ids: ChannelIds,
    product: tuple[Node, int, int],
    start: _Start,
    wide: tuple[int, ...],
) -> Iterator[Product]:
    (node, gate, features), (origin, moved) = product, start
    chain = flow.strip(gate)
    shape = flow.trace.shape(origin) if moved is not None or origin != features else wide
    ids = channel_ids.values[origin].expand(shape)
    for numbers in sampled(flow, chain[0]):
        samples, elements = (
            _pulled_back(_aligned(node, gate, flow.positions(chain, ids), wide), moved, shape)
            for ids in (numbers.samples, numbers.elements)
        )
        batch_dim = _batch_dim(flow, origin, samples)
        if batch_dim < 0:
            continue
        one, own = (t.narrow(batch_dim, 0, 1) for t in (elements, ids))
        dims = tuple(varying(one))
        if _channelwise(dims, own, batch_dim):
            root, batch = chain[0], numbers.batch_dim
            divides = base(node) == "div"
            yield Product(node, gate, root, origin, one, own, dims, batch, divides)


def sampled(flow: Flow, value: int) -> Iterator[Sampled]:
    """The readings of a tensor as one row per sample, the usual one (dimension 0) first.

    A sample is a frame where frames are folded into the batch.
    """
    shape = flow.trace.shape(value)
    for d, length in enumerate(shape):
        batch = flow.rows(value) if d == 0 else flow.trace.batch
        if length == batch or (d == 0 and length and length % batch == 0):
            rows = torch.arange(length) // (length // batch)
            samples = rows.reshape([-1 if i == d else 1 for i in range(len(shape))])
            own = [length // batch if i == d else n for i, n in enumerate(shape)]
            elements = torch.arange(torch.Size(own).numel()).reshape(own)
            yield Sampled(d, samples.expand(shape), torch.cat([elements] * batch, d))


def _origin(flow: Flow, features: int) -> _Start:
    """The map before it was reshaped, and where its elements went; None where nothing moved."""
    chain = flow.strip(features)
    size = torch.Size(flow.trace.shape(features)).numel()
    start = len(chain) - 1
    while start and torch.Size(flow.trace.shape(chain[start - 1])).numel() == size:
        start -= 1
    makers = [flow.producer(value) for value in chain[start + 1 :]]
    if all(node is not None and base(node) in COPIES for node in makers):
        return chain[start], None
    shape = flow.trace.shape(chain[start])
    return chain[start], flow.positions(chain[start:], torch.arange(size).reshape(shape))


def _aligned(node: Node, gate: int, ids: Tensor, shape: tuple[int, ...]) -> Tensor:
    """A gate's numbers in the layout of the features; a matrix product meets them crosswise."""
    return ids.transpose(1, 2).expand(shape) if base(node) == "bmm" else ids.expand(shape)


def _pulled_back(ids: Tensor, moved: Tensor | None, shape: tuple[int, ...]) -> Tensor:
    if moved is None:
        return ids.expand(shape)
    made = torch.empty(moved.numel(), dtype=ids.dtype)
    made[moved.reshape(-1)] = ids.reshape(-1)
    return _distinct(made.reshape(shape)).expand(shape)


def _distinct(ids: Tensor) -> Tensor:
    """The same numbers with every dimension that repeats them at length 1."""
    differ = varying(ids)
    for d in range(ids.dim()):
        if d not in differ:
            ids = ids.narrow(d, 0, 1)
    return ids


def _branchwise(flow: Flow, channel_ids: ChannelIds, gate: int, features: int) -> bool:
    """Whether a batched matrix product keeps channels apart: it adds up branches, not channels."""
    rows, columns = flow.trace.shape(gate)[1:]
    ids = channel_ids.values[features].expand(flow.trace.shape(features))
    return 1 in (rows, columns) and 0 in varying(ids)


def _batch_dim(flow: Flow, features: int, samples: Tensor) -> int:
    """The dimension of the features that counts samples, if the gate's samples go along it."""
    made = flow.producer(features)
    stacked = made.args[1] if made and base(made) == "stack" and len(made.args) > 1 else 0
    stacked = stacked if made and base(made) == "stack" else -1
    for numbers in sampled(flow, features):
        d = numbers.batch_dim
        count = flow.rows(features) if d == 0 else flow.trace.batch
        rows = samples.shape == numbers.samples.shape and samples.shape[d] == count
        if d != stacked and rows and torch.equal(_distinct(samples), _distinct(numbers.samples)):
            return d
    return -1


def _channelwise(dims: tuple[int, ...], ids: Tensor, batch_dim: int) -> bool:
    """Whether a gate that varies along `dims` varies with the channels of the features."""
    if not dims:
        return False
    differ = varying(ids)
    if int(compact(ids).max()) <= 0:  # features of unknown origin: go by the usual layout
        return dims == (1,) and batch_dim == 0 and ids.dim() > 2
    return bool(differ) and set(differ) <= set(dims) and dims[-1] in differ
