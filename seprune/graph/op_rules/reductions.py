"""Pooling, padding, resizing, sums and means: positions change or vanish."""

from __future__ import annotations

import torch
from torch import Tensor

from seprune.graph.channel_ids import FIXED, NEUTRAL, UnknownUse, Walker, along, varying
from seprune.graph.op_rules.elementwise import tie_all
from seprune.graph.trace import Node


def spatial(walker: Walker, node: Node) -> None:
    """Pooling, padding, resizing: channels stay, positions change."""
    read = walker.ids(node.args[0].value)
    for index, value in enumerate(node.outputs):
        shape = walker.trace.shape(value)
        kept = [d for d in varying(read) if shape[d] != read.shape[d]]
        if len(shape) != read.dim() or kept:
            raise UnknownUse("channels are resized")
        narrow = read
        for d in range(read.dim()):
            if shape[d] != read.shape[d]:
                narrow = narrow.narrow(d, 0, 1)
        walker.set(node, narrow, index)


def pad(walker: Walker, node: Node) -> None:
    """Positions are added; channels that are added are fixed."""
    read = walker.ids(node.args[0].value)
    widths = list(node.args[1])
    moved = {read.dim() - 1 - i // 2 for i, w in enumerate(widths) if w}
    if moved & set(varying(read)):
        walker.set(node, torch.constant_pad_nd(read, widths, FIXED))  # their number stays
    else:
        spatial(walker, node)


def reduce(walker: Walker, node: Node) -> None:
    """Sums and means: a reduced dimension of one channel disappears, several are mixed."""
    read = walker.ids(node.args[0].value)
    named = "norm" in node.op  # the order of the norm stands before the dimensions
    dims = walker.arg(node, 2 if named else 1, "dim")
    dims = list(range(read.dim())) if dims is None or dims == [] else dims
    dims = [d % read.dim() for d in (dims if isinstance(dims, (list, tuple)) else [dims])]
    differ = varying(read)
    for d in dims:
        if d in differ and set(differ) - set(dims):  # branches are added up: they are coupled
            walker.tie(read, read.narrow(d, 0, 1).expand_as(read), walker.place(node))
    narrow = read
    for d in dims:
        narrow = narrow.narrow(d, 0, 1)
    if set(differ) & set(dims) and not set(differ) - set(dims):
        narrow = walker.uniform(NEUTRAL, tuple(narrow.shape))
    for index, value in enumerate(node.outputs):
        shape = walker.trace.shape(value)
        gone = len(shape) != narrow.dim()
        made = narrow.squeeze(tuple(dims)) if gone and dims else narrow
        walker.set(node, made.reshape(shape) if made.numel() == 1 else made, index)


def extreme(walker: Walker, node: Node) -> None:
    """Where the largest value lies: fine among positions."""
    read = walker.ids(node.args[0].value)
    dim = walker.arg(node, 1, "dim")
    if varying(read) and (dim is None or dim % read.dim() in varying(read)):
        raise UnknownUse("its result is the number of a channel")
    reduce(walker, node)


def unpool(walker: Walker, node: Node) -> None:
    """Max unpooling: values and places come from the same channels."""
    tie_all(walker, node, walker.tensors(node))
    spatial(walker, node)


def patches(walker: Walker, node: Node) -> None:
    """im2col: k positions around each one become k channels of every channel."""
    channels = _map_channels(walker, node)
    count = walker.trace.shape(node.outputs[0])[1] // len(channels)
    walker.set(node, channels.repeat_interleave(count).view(1, -1, 1))


def fold(walker: Walker, node: Node) -> None:
    """col2im: k channels become the positions of one; they are one unit."""
    channels = _map_channels(walker, node)
    blocks = channels.view(walker.trace.shape(node.outputs[0])[1], -1)
    walker.tie(blocks, blocks[:, :1].expand_as(blocks), walker.place(node))
    walker.set(node, blocks[:, 0].view(1, -1, 1, 1))


def _map_channels(walker: Walker, node: Node) -> Tensor:
    read = walker.ids(node.args[0].value)
    channels = along(read, 1)
    if channels is None or len(walker.trace.shape(node.outputs[0])) != 7 - read.dim():
        raise UnknownUse("channels lie along positions")
    return channels
