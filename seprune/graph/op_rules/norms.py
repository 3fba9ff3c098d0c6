"""Normalisations: channels stay what they are, and the layer has parameters for each."""

from __future__ import annotations

from torch import nn

from seprune.graph.channel_ids import Slot, UnknownUse, Walker, along
from seprune.graph.trace import Node, Ref


def batch_norm(walker: Walker, node: Node) -> None:
    """Channels stay, and the layer has parameters and statistics for each."""
    _norm(walker, node, dim=1, parameters=range(1, 5))


def group_norm(walker: Walker, node: Node) -> None:
    """Channels stay; those at one place of every norm group go together."""
    groups = int(node.args[6])
    channels = along(walker.ids(node.args[0].value), 1)
    if channels is not None and groups > 1:
        rows = channels.reshape(groups, -1)
        walker.tie(rows, rows[:1].expand_as(rows), f"the groups of {node.module}")
    _norm(walker, node, dim=1, parameters=range(1, 3))


def layer_norm(walker: Walker, node: Node) -> None:
    """Channels stay, and the layer has parameters for each."""
    if len(node.args[1]) != 1:
        raise UnknownUse("normalised over several dimensions")
    _norm(walker, node, dim=-1, parameters=range(2, 4))


def _norm(walker: Walker, node: Node, *, dim: int, parameters: range) -> None:
    read = walker.ids(node.args[0].value)
    channels = along(read, dim)
    module = walker.modules.get(node.module)
    if isinstance(module, nn.modules.instancenorm._InstanceNorm) and channels is not None:
        channels = channels[: module.num_features]  # torch folds samples and channels together
    if channels is None:
        raise UnknownUse("channels are mixed with positions")
    names = [
        walker.parameter_name(node.args[i].value)[0]
        for i in parameters
        if len(node.args) > i and isinstance(node.args[i], Ref)
    ]
    if module is not None and any(True for _ in module.parameters(recurse=False)):
        walker.slot(Slot(node.module, "out", channels, node.id))
    elif any(names):
        for i in parameters:
            if len(node.args) > i and isinstance(node.args[i], Ref):
                walker.tie(channels, walker.ids(node.args[i].value), walker.place(node))
    elif any(hasattr(module, n) for n in ("num_features", "num_channels", "normalized_shape")):
        walker.slot(Slot(node.module, "out", channels, node.id))
    walker.set(node, read)
