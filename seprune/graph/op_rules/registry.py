"""How every operator carries channel ids: one small function per kind of operator."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from seprune.errors import first_line
from seprune.graph.channel_ids import NEUTRAL, ChannelIds, UnknownUse, Walker
from seprune.graph.op_rules import (
    elementwise,
    factories,
    layers,
    norms,
    reductions,
    replays,
    reshapes,
    selections,
    views,
)
from seprune.graph.op_rules.conv_groups import even_out
from seprune.graph.op_rules.whole import why_whole
from seprune.graph.trace import Node, Trace

Rule = Callable[[Walker, Node], None]


def assign_channel_ids(trace: Trace, model: nn.Module) -> ChannelIds:
    """Send ids through a recorded pass of `model`."""
    walker = Walker(trace, model)
    for node in trace.nodes:
        _step(walker, node)
    even_out(walker)
    for value in trace.outputs:
        walker.freeze(walker.ids(value), "it is an output of the model")
    return walker.result


def _step(walker: Walker, node: Node) -> None:
    live = walker.depends(node)
    module = walker.modules.get(node.module)
    if not live and isinstance(module, nn.modules.conv._ConvNd):
        for value in node.outputs:  # weight standardisation is the layer's own business
            walker.result.values[value] = walker.uniform(NEUTRAL, walker.trace.shape(value))
        return
    name = node.op.split(".")[1]
    rule = RULES.get(name) or RULES.get(name.rstrip("_"))
    if rule is None:
        known = why_whole(name)
        why = f"{walker.place(node)}: {known}" if known else f"no rule for {walker.place(node)}"
        walker.opaque(node, why)
        return
    ids, costs = walker.result.count, len(walker.result.costs)
    try:
        rule(walker, node)
        return
    except UnknownUse as refusal:
        why = f"{walker.place(node)}: {refusal}"
    except (RuntimeError, IndexError, TypeError, ValueError, AttributeError) as error:
        # shapes and arguments that nobody thought of: the same as an unknown operator
        first = first_line(error)
        why = f"{walker.place(node)} is used in an unknown way ({type(error).__name__}: {first})"
    # what the rule had done before it gave up: nothing of it may be cut or counted
    walker.freeze(torch.arange(ids + 1, walker.result.count + 1), why)
    del walker.result.costs[costs:]
    walker.opaque(node, why)


_ELEMENTWISE = (
    "add sub rsub mul div addcmul addcdiv maximum minimum where pow lerp atan2 remainder "
    "eq ne lt le gt ge logical_and logical_or masked_fill copy _prelu_kernel prelu bitwise_and "
    "logical_xor bitwise_or bitwise_xor bitwise_left_shift bitwise_right_shift __lshift__ "
    "__rshift__ __ilshift__ __irshift__ fmod fmax fmin floor_divide hypot copysign xlogy logaddexp "
    "logaddexp2 nextafter ldexp gcd lcm heaviside igamma igammac special_xlog1py special_zeta "
    "complex polar _add_relu"
)
_UNARY = (
    "relu relu6 sigmoid hardsigmoid tanh hardtanh hardswish silu mish gelu elu selu celu "
    "leaky_relu softplus softsign exp log log1p expm1 sqrt rsqrt reciprocal neg abs square sin cos "
    "erf sign clamp clamp_min clamp_max threshold softmax _softmax _log_softmax clone detach alias "
    "_to_copy contiguous dropout native_dropout bernoulli lift_fresh logsigmoid "
    "log_sigmoid_forward hardshrink softshrink cumsum round floor ceil trunc isnan isfinite "
    "nan_to_num fill rand_like randn_like zeros_like ones_like empty_like full_like "
    "acos acosh asin asinh atan atanh tan cosh sinh exp2 erfc erfinv frac log10 log2 digamma "
    "lgamma mvlgamma polygamma sgn signbit logical_not bitwise_not isinf isposinf isneginf deg2rad "
    "rad2deg logit i0 sinc angle _conj conj_physical _conj_physical _neg_view zero "
    "rrelu_with_noise _safe_softmax cumprod cummax cummin logcumsumexp "
    "uniform normal exponential random randint_like lift"
)
_SPECIAL = (
    "airy_ai bessel_j0 bessel_j1 bessel_y0 bessel_y1 entr erfcx i0e i1 i1e log_ndtr "
    "modified_bessel_i0 modified_bessel_i1 modified_bessel_k0 modified_bessel_k1 ndtri "
    "scaled_modified_bessel_k0 scaled_modified_bessel_k1 spherical_bessel_j0"
)
_VIEWS = "permute transpose t unsqueeze squeeze expand_as numpy_T"
_SPATIAL = (
    "max_pool2d_with_indices max_pool3d_with_indices avg_pool2d avg_pool1d avg_pool3d "
    "_adaptive_avg_pool2d _adaptive_avg_pool3d adaptive_avg_pool1d adaptive_max_pool2d "
    "adaptive_max_pool3d upsample_bilinear2d upsample_nearest2d upsample_bicubic2d "
    "_upsample_bilinear2d_aa _upsample_bicubic2d_aa upsample_nearest1d upsample_linear1d "
    "upsample_nearest3d upsample_trilinear3d reflection_pad2d replication_pad2d "
    "reflection_pad1d replication_pad1d grid_sampler_2d max_pool1d grid_sampler_3d "
    "reflection_pad3d replication_pad3d _upsample_nearest_exact1d _upsample_nearest_exact2d "
    "_upsample_nearest_exact3d _upsample_lanczos2d_aa fractional_max_pool2d fractional_max_pool3d"
)
_REDUCTIONS = (
    "mean sum amax amin max min prod var std logsumexp linalg_vector_norm norm any all median "
    "nansum nanmedian var_mean std_mean aminmax count_nonzero mode"
)
RULES: dict[str, Rule] = {
    **dict.fromkeys(_ELEMENTWISE.split(), elementwise.elementwise),
    **dict.fromkeys(_UNARY.split(), elementwise.unary),
    **dict.fromkeys((f"special_{name}" for name in _SPECIAL.split()), elementwise.unary),
    **dict.fromkeys(_VIEWS.split(), replays.replay),
    **dict.fromkeys(_SPATIAL.split(), reductions.spatial),
    **dict.fromkeys(_REDUCTIONS.split(), reductions.reduce),
    "convolution": layers.convolution,
    "addmm": layers.addmm,
    "mm": layers.mm,
    "linear": layers.linear,
    "bmm": layers.bmm,
    "baddbmm": layers.bmm,
    "mv": layers.mv,
    "embedding": layers.embedding,
    "native_batch_norm": norms.batch_norm,
    "_native_batch_norm_legit_no_training": norms.batch_norm,
    "cudnn_batch_norm": norms.batch_norm,
    "miopen_batch_norm": norms.batch_norm,
    "_native_batch_norm_legit": norms.batch_norm,
    "_batch_norm_with_update": norms.batch_norm,
    "_batch_norm_no_update": norms.batch_norm,
    "native_group_norm": norms.group_norm,
    "native_layer_norm": norms.layer_norm,
    "expand": factories.spread,
    "repeat": factories.spread,
    "cat": views.join,
    "stack": views.join,
    "view": reshapes.reshape,
    "_unsafe_view": reshapes.reshape,
    "reshape": reshapes.reshape,
    "_reshape_alias": reshapes.reshape,
    "constant_pad_nd": reductions.pad,
    "argmax": reductions.extreme,
    "argmin": reductions.extreme,
    "max_unpool2d": reductions.unpool,
    "max_unpool3d": reductions.unpool,
    "im2col": reductions.patches,
    "col2im": reductions.fold,
    "sort": selections.along_positions,
    "topk": selections.along_positions,
    "kthvalue": selections.along_positions,
    "renorm": selections.along_positions,
    "_fft_c2c": selections.transform,
    "_fft_r2c": selections.transform,
    "_fft_c2r": selections.transform,
    "unfold": selections.unfold,
    "index": selections.index,
    "_unsafe_index": selections.index,
    "index_put": selections.index_put,
    "_unsafe_index_put": selections.index_put,
    "index_select": selections.index_select,
    "gather": selections.gather,
    "scatter": selections.scatter,
    "scatter_add": selections.scatter,
    "scatter_reduce": selections.scatter,
    "roi_align": selections.regions,
    "roi_pool": selections.regions,
    "split": views.split,
    "split_with_sizes": views.split,
    "unsafe_split": views.split,
    "unsafe_split_with_sizes": views.split,
    "glu": views.halves,
    "view_as_real": views.complex_parts,
    "view_as_complex": views.complex_parts,
    "tril": views.triangle,
    "triu": views.triangle,
    "slice": views.slice_,
    "select": views.select,
    "unbind": views.unbind,
    "roll": views.still,
    "flip": views.still,
    "pixel_shuffle": views.pixel_shuffle,
    "pixel_unshuffle": views.pixel_unshuffle,
    "channel_shuffle": views.channel_shuffle,
    "native_channel_shuffle": views.channel_shuffle,
    "empty": factories.constant,
    "zeros": factories.constant,
    "ones": factories.constant,
    "full": factories.constant,
    "arange": factories.fill,
    "write_into_view": elementwise.unary,
    "scalar_tensor": factories.fill,
    "new_zeros": factories.constant_like,
    "new_empty": factories.constant_like,
    "new_ones": factories.constant_like,
    "new_full": factories.constant_like,
}
