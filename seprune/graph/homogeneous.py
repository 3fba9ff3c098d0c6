"""Operators that scale with what they read: f(m x) = m f(x) for every factor m > 0.

A mask in front of such operators and one behind them have the same derivative at 1 (Euler), so a
channel can be scored at either place.
"""

from __future__ import annotations

from collections.abc import Set as AbstractSet

from seprune.graph.dataflow import VIEWS, base
from seprune.graph.trace import Node, Ref

_POOLS = {
    "_adaptive_avg_pool2d", "_adaptive_avg_pool3d", "adaptive_avg_pool1d", "avg_pool1d",
    "avg_pool2d", "avg_pool3d", "adaptive_max_pool2d", "adaptive_max_pool3d",
    "adaptive_max_pool1d", "max_pool2d_with_indices", "max_pool1d", "max_pool3d_with_indices",
}  # fmt: skip
_RESIZES = {
    "upsample_bilinear2d", "upsample_nearest2d", "upsample_bicubic2d", "upsample_nearest1d",
    "upsample_linear1d", "upsample_nearest3d", "upsample_trilinear3d", "_upsample_bilinear2d_aa",
    "_upsample_bicubic2d_aa", "grid_sampler_2d", "im2col", "pixel_shuffle", "pixel_unshuffle",
    "reflection_pad1d", "reflection_pad2d", "reflection_pad3d", "replication_pad1d",
    "replication_pad2d", "replication_pad3d", "_upsample_nearest_exact1d",
    "_upsample_nearest_exact2d", "_upsample_nearest_exact3d",
}  # fmt: skip
_ALWAYS = VIEWS | _POOLS | _RESIZES | {
    "relu", "leaky_relu", "_prelu_kernel", "prelu", "rrelu_with_noise", "cat", "mean", "sum",
    "stack", "amax", "amin", "neg", "abs", "dropout", "native_dropout", "roll", "flip",
    "linalg_vector_norm", "cumsum", "channel_shuffle", "native_channel_shuffle", "unfold",
    "index", "index_select", "gather",
}  # fmt: skip
_JOINT = {"add", "sub", "rsub", "maximum", "minimum", "write_into_view"}  # of all their operands


def homogeneous(node: Node, scaled: AbstractSet[int], other: AbstractSet[int]) -> bool:
    """Whether a node's results are scaled just as its operands in `scaled` are.

    Args:
        other: operands that hold the same channels and that the mask would not scale.
    """
    op, reads = base(node), node.inputs()
    hit = [v in scaled for v in reads]
    if set(reads) & other or not any(hit):
        return False
    if op in _JOINT:
        return all(hit) and len(reads) > 1
    if op in ("mul", "multiply", "bmm"):
        return sum(hit) == 1
    if op == "div":
        return hit[0] and not any(hit[1:])
    if op == "addcmul":
        return hit[0] and sum(hit[1:]) == 1
    if op in ("max", "min"):  # of one tensor over positions, or of two
        return all(hit)
    if op == "constant_pad_nd":
        return len(node.args) < 3 or not node.args[2]
    if op == "convolution":  # depthwise: the caller has looked at its conv groups
        return hit[0] and not isinstance(node.args[2], Ref)
    return op in _ALWAYS
