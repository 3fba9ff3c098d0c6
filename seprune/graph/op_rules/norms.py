"""Normalisations: channels stay what they are, and the layer has parameters for each."""

from __future__ import annotations

from torch import Tensor, nn

from seprune.graph.channel_ids import Slot, UnknownUse, Walker, along
from seprune.graph.trace import Node, Ref

_NORMS = (
    nn.modules.batchnorm._BatchNorm,
    nn.modules.instancenorm._InstanceNorm,
    nn.GroupNorm,
    nn.LayerNorm,
)
_FEW = 8  # norm groups: their channels go one by one, and the cut norm is not its masked parent


def batch_norm(walker: Walker, node: Node) -> None:
    """Channels stay, and the layer has parameters and statistics for each."""
    _norm(walker, node, dim=1, parameters=range(1, 5))


def group_norm(walker: Walker, node: Node) -> None:
    """Channels stay; norm groups go whole, or lose as many channels each where they are few."""
    groups = int(node.args[6])
    channels = along(walker.ids(node.args[0].value), 1)
    if channels is not None and groups > 1:
        rows = channels.reshape(groups, -1)
        whole = groups >= min(_FEW, rows.shape[1])
        first = rows[:, :1] if whole else rows[:1]
        walker.tie(rows, first.expand_as(rows), f"the groups of {node.module}")
        if whole and not isinstance(walker.modules.get(node.module), nn.GroupNorm):
            _written(walker, node, "group_norm", first.reshape(-1))
    _norm(walker, node, dim=1, parameters=range(1, 3))


def layer_norm(walker: Walker, node: Node) -> None:
    """Channels stay, and the layer has parameters for each."""
    if len(node.args[1]) != 1:
        raise UnknownUse("normalised over several dimensions")
    _norm(walker, node, dim=-1, parameters=range(2, 4))
    channels, module = along(walker.ids(node.args[0].value), -1), walker.modules.get(node.module)
    if channels is not None and not isinstance(module, nn.LayerNorm):
        _written(walker, node, "layer_norm", channels)


def _norm(walker: Walker, node: Node, *, dim: int, parameters: range) -> None:
    read = walker.ids(node.args[0].value)
    channels = along(read, dim)
    module = walker.modules.get(node.module)
    if isinstance(module, nn.modules.instancenorm._InstanceNorm) and channels is not None:
        channels = channels[: module.num_features]  # torch folds samples and channels together
    if channels is None:
        raise UnknownUse("channels are mixed with positions")
    if isinstance(module, _NORMS):
        walker.slot(Slot(node.module, "out", channels, node.id))
    else:
        for i in parameters:
            if len(node.args) > i and isinstance(node.args[i], Ref):
                walker.tie(channels, walker.ids(node.args[i].value), walker.place(node))
    walker.set(node, read)


def _written(walker: Walker, node: Node, function: str, counted: Tensor) -> None:
    """A number of norm groups, or a shape, follows in the call."""
    call = walker.function_of.get(node.id)
    if call is not None and call.function == function:
        walker.number(call, 0, counted, node)
    else:
        walker.freeze(counted, f"it is counted by {walker.place(node)}")
