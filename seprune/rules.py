"""How every operator carries channel labels: one small function per kind of operator."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from seprune.labels import (
    FIXED,
    NEUTRAL,
    Labelling,
    Slot,
    Walker,
    along,
    compact,
    varying,
)
from seprune.trace import Node, Ref, Trace

Rule = Callable[[Walker, Node], None]


def label(trace: Trace, model: nn.Module) -> Labelling:
    """Send labels through a recorded pass of `model`."""
    walker = Walker(trace, model)
    for node in trace.nodes:
        _step(walker, node)
    for value in trace.outputs:
        walker.freeze(walker.labels(value), "it is an output of the model")
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
        walker.opaque(node)
        return
    try:
        rule(walker, node)
    except (RuntimeError, IndexError, TypeError, ValueError, AttributeError) as error:
        # an operator used in a way that its rule does not foresee counts as unknown
        walker.opaque(node, f"{walker.place(node)} ({type(error).__name__}: {error})")


# -- layers ---------------------------------------------------------------------------------


def _convolution(walker: Walker, node: Node) -> None:
    x, weight = node.args[0].value, node.args[1].value
    transposed, groups = walker.arg(node, 6), int(walker.arg(node, 8))
    shape, kernel = walker.trace.shape(x), walker.trace.shape(weight)
    outs = kernel[1] * groups if transposed else kernel[0]
    read = walker.labels(x)
    channels = along(read, 1)
    if channels is None:
        _positional(walker, node, outs)
        return
    layer = _layer(walker, node, weight)
    into, out = ("in", "out") if layer in walker.modules else ("dim1", "dim0")
    depthwise = groups == shape[1]
    if out == "dim0" and groups > 1:
        if not depthwise:
            raise ValueError("conv groups of a bare parameter")
        _attribute(walker, node, [groups], [channels])
    if depthwise:
        made = channels.repeat_interleave(outs // groups)
    else:
        made = walker.fresh(outs)
        walker.slot(Slot(layer, into, channels, node.id))
        _conv_groups(walker, layer, groups, channels, made)
    walker.slot(Slot(layer, out, made, node.id, produces=not depthwise))
    _cost_of_layer(walker, node, channels, made, groups)
    walker.set(node, made.view(1, -1, *[1] * (len(shape) - 2)))


def _cost_of_layer(walker: Walker, node: Node, channels: Tensor, made: Tensor, groups: int) -> None:
    whole = groups > 1 and (groups == len(channels) or _whole_blocks(groups, channels, made))
    walker.cost(node, (made,) if whole else (channels, made))


def _whole_blocks(groups: int, channels: Tensor, made: Tensor) -> bool:
    """Whether a grouped convolution gives up whole conv groups or channels within each."""
    return groups >= min(len(channels), len(made)) // groups


def _conv_groups(walker: Walker, layer: str, groups: int, channels: Tensor, made: Tensor) -> None:
    """Keep a grouped convolution valid: tie what must go together."""
    if groups == 1:
        return
    ins, outs = channels.reshape(groups, -1), made.reshape(groups, -1)
    where = f"the conv groups of {layer}"
    if _whole_blocks(groups, channels, made):
        walker.result.blocks.append((layer, "whole"))
        walker.tie(ins, ins[:, :1].expand_as(ins), where)
        walker.tie(outs, ins[:, :1].expand_as(outs), where)
    else:
        walker.result.blocks.append((layer, "within"))
        walker.tie(ins, ins[:1].expand_as(ins), where)
        walker.tie(outs, outs[:1].expand_as(outs), where)


def _positional(walker: Walker, node: Node, outs: int) -> None:
    """A convolution over channel positions (ECA): the order of channels stays, none is mixed."""
    x, out = node.args[0].value, node.outputs[0]
    read = walker.labels(x)
    if outs == walker.trace.shape(x)[1] == 1 and walker.trace.shape(x) == walker.trace.shape(out):
        walker.set(node, read)
        walker.cost(node, tuple(v for d in varying(read) if (v := along(read, d)) is not None))
    else:
        walker.opaque(node, f"{walker.place(node)} mixes channels and positions")


def _matmul_parameter(walker: Walker, node: Node, x: int, weight: int) -> bool:
    """`x @ weight`: a linear layer, if the weight is a parameter or comes from one."""
    name, turned = walker.parameter_name(weight)
    if weight in walker.result.depends or not name or len(walker.trace.shape(weight)) != 2:
        return False
    read = walker.labels(x)
    outs = walker.trace.shape(node.outputs[0])[-1]
    channels = along(read, -1)
    if channels is None:
        rows = along(read, 0)
        if rows is None:
            return False
        walker.cost(node, (rows,))
        walker.set(node, rows.view(-1, *[1] * (read.dim() - 1)))  # a layer over positions
        return True
    layer = _layer(walker, node, weight, turned)
    made = walker.fresh(outs)
    sides = (
        ("in", "out")
        if layer in walker.modules
        else (("dim1", "dim0") if turned else ("dim0", "dim1"))
    )
    walker.slot(Slot(layer, sides[0], channels, node.id))
    walker.slot(Slot(layer, sides[1], made, node.id, produces=True))
    walker.cost(node, (channels, made))
    walker.set(node, made)
    return True


def _addmm(walker: Walker, node: Node) -> None:
    bias, x, weight = (a.value for a in node.args[:3])
    if not _matmul_parameter(walker, node, x, weight):
        _bmm(walker, node, (x, weight))
        _tie_all(walker, node, [walker.labels(bias), walker.result.values[node.outputs[0]]])
        return
    name, _ = walker.parameter_name(bias)
    if name and walker.modules.get(node.module) is None:
        made = walker.result.values[node.outputs[0]]
        walker.tie(walker.labels(bias), along(made, -1), walker.place(node))  # type: ignore[arg-type]


def _mm(walker: Walker, node: Node) -> None:
    x, weight = node.args[0].value, node.args[1].value
    if not _matmul_parameter(walker, node, x, weight):
        _bmm(walker, node, (x, weight))


def _linear(walker: Walker, node: Node) -> None:
    x, weight = node.args[0].value, node.args[1].value
    name, _ = walker.parameter_name(weight)
    channels = along(walker.labels(x), -1)
    if not name or channels is None:
        walker.opaque(node)
        return
    layer = _layer(walker, node, weight)
    made = walker.fresh(walker.trace.shape(weight)[0])
    walker.slot(Slot(layer, "in", channels, node.id))
    walker.slot(Slot(layer, "out", made, node.id, produces=True))
    walker.cost(node, (channels, made))
    walker.set(node, made)


def _layer(walker: Walker, node: Node, weight: int, turned: bool = False) -> str:
    """The name to cut: the module that owns the weight, else the bare parameter's."""
    module = walker.modules.get(node.module)
    if isinstance(module, (nn.modules.conv._ConvNd, nn.Linear)):
        return node.module
    name, _ = walker.parameter_name(weight)
    owner, _, leaf = name.rpartition(".")
    if leaf == "weight" and isinstance(
        walker.modules.get(owner), (nn.modules.conv._ConvNd, nn.Linear)
    ):
        return owner
    if not name:
        raise ValueError("the weight is computed")
    return name


def _batch_norm(walker: Walker, node: Node) -> None:
    _norm(walker, node, dim=1, parameters=range(1, 5))


def _group_norm(walker: Walker, node: Node) -> None:
    groups = int(node.args[6])
    channels = along(walker.labels(node.args[0].value), 1)
    if channels is not None and groups > 1:
        rows = channels.reshape(groups, -1)
        walker.tie(rows, rows[:1].expand_as(rows), f"the groups of {node.module}")
    _norm(walker, node, dim=1, parameters=range(1, 3))


def _layer_norm(walker: Walker, node: Node) -> None:
    if len(node.args[1]) != 1:
        raise ValueError("normalised over several dimensions")
    _norm(walker, node, dim=-1, parameters=range(2, 4))


def _norm(walker: Walker, node: Node, *, dim: int, parameters: range) -> None:
    read = walker.labels(node.args[0].value)
    channels = along(read, dim)
    if channels is None:
        raise ValueError("channels are mixed with positions")
    module = walker.modules.get(node.module)
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
                walker.tie(channels, walker.labels(node.args[i].value), walker.place(node))
    elif hasattr(module, "num_features") or hasattr(module, "num_channels"):
        walker.slot(Slot(node.module, "out", channels, node.id))
    walker.set(node, read)


# -- elementwise, views, reductions ------------------------------------------------------------


def _elementwise(walker: Walker, node: Node) -> None:
    operands = walker.tensors(node)
    live = [v for v in node.inputs() if v in walker.result.depends]
    out = _tie_all(walker, node, operands)
    if node.op.startswith(("aten.add", "aten.sub")) and len(set(live)) > 1:
        walker.result.sums.append((node.id, torch.unique(compact(out))))
    for index in range(len(node.outputs)):
        walker.set(node, out, index)


def _tie_all(walker: Walker, node: Node, operands: list[Tensor]) -> Tensor:
    shape = torch.broadcast_shapes(*[o.shape for o in operands])
    out: Tensor | None = None
    for operand in operands:
        wide = operand.expand(shape)
        if out is None:
            out = wide
            continue
        walker.tie(out, wide, walker.place(node))
        a, b = _narrow_together(out, wide)
        merged = torch.where(a > 0, a, torch.where(b > 0, b, torch.minimum(a, b)))
        out = merged.expand(shape)
    if out is None:
        raise ValueError("no tensor to read")
    return out


def _narrow_together(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    for d in range(a.dim()):
        if a.shape[d] > 1 and a.stride(d) == 0 and b.stride(d) == 0:
            a, b = a.narrow(d, 0, 1), b.narrow(d, 0, 1)
    return a, b


def _replay(walker: Walker, node: Node) -> None:
    """A view: do to the labels what was done to the tensor."""
    overload = _overload(node.op)
    arguments = tree_map(lambda a: walker.labels(a.value) if isinstance(a, Ref) else a, node.args)
    keywords = {k: v for k, v in node.kwargs.items() if k in ("dim", "dims", "start", "end")}
    made = overload(*arguments, **keywords)
    for index, part in enumerate(made if isinstance(made, (tuple, list)) else [made]):
        walker.set(node, part, index)


def _reshape(walker: Walker, node: Node) -> None:
    read = walker.labels(node.args[0].value)
    made = read.reshape(walker.trace.shape(node.outputs[0]))
    for old, new in _regrouped(tuple(read.shape), tuple(made.shape)):
        wide = [d for d in new if made.shape[d] > 1]
        if len(wide) < 2 or not set(varying(read)) & set(old):
            continue
        if len([d for d in old if read.shape[d] > 1]) > 1:
            raise ValueError("a reshape takes channels and positions apart")
        last = wide[-1]
        first = made
        for d in wide:
            if d != last:
                first = first.narrow(d, 0, 1)
        walker.tie(made, first.expand_as(made), walker.place(node))
    walker.set(node, made)


def _regrouped(old: tuple[int, ...], new: tuple[int, ...]) -> list[tuple[list[int], list[int]]]:
    """Pairs of dimension lists with equal products: how a reshape regroups dimensions."""
    pairs, i, j = [], 0, 0
    while i < len(old) or j < len(new):
        left, right = [], []
        a = b = 1
        while True:
            if a <= b and i < len(old):
                a *= old[i]
                left.append(i)
                i += 1
            elif j < len(new):
                b *= new[j]
                right.append(j)
                j += 1
            else:
                a *= old[i] if i < len(old) else 1
                i += 1
            if a == b and left and right:
                break
            if i >= len(old) and j >= len(new):
                break
        pairs.append((left, right))
    return pairs


def _spatial(walker: Walker, node: Node) -> None:
    """Pooling, padding, resizing: channels stay, positions change."""
    read = walker.labels(node.args[0].value)
    for index, value in enumerate(node.outputs):
        shape = walker.trace.shape(value)
        kept = [d for d in varying(read) if shape[d] != read.shape[d]]
        if len(shape) != read.dim() or kept:
            raise ValueError("channels are resized")
        narrow = read
        for d in range(read.dim()):
            if shape[d] != read.shape[d]:
                narrow = narrow.narrow(d, 0, 1)
        walker.set(node, narrow, index)


def _pad(walker: Walker, node: Node) -> None:
    read = walker.labels(node.args[0].value)
    widths = list(node.args[1])
    moved = {read.dim() - 1 - i // 2 for i, w in enumerate(widths) if w}
    if moved & set(varying(read)):
        walker.set(node, torch.constant_pad_nd(read, widths, NEUTRAL))
    else:
        _spatial(walker, node)


def _reduce(walker: Walker, node: Node) -> None:
    """Sums and means: a reduced dimension of one channel disappears, several are mixed."""
    read = walker.labels(node.args[0].value)
    dims = walker.arg(node, 1, "dim")
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


def _unary(walker: Walker, node: Node) -> None:
    for index in range(len(node.outputs)):
        walker.set(node, walker.labels(node.args[0].value), index)


def _bmm(walker: Walker, node: Node, pair: tuple[int, int] | None = None) -> None:
    """A product of two activations: contracted channels are tied, rows and columns go on."""
    first, second = pair or (node.args[-2].value, node.args[-1].value)
    a, b = walker.labels(first), walker.labels(second)
    rows, columns = -2 in _from_end(a), -1 in _from_end(b)
    inner_a, inner_b = -1 in _from_end(a), -2 in _from_end(b)
    if (rows and inner_a) or (columns and inner_b) or (rows and columns):
        raise ValueError("a matrix product of channels with channels")
    left, right = a.narrow(-2, 0, 1).squeeze(-2), b.narrow(-1, 0, 1).squeeze(-1)
    if inner_a or inner_b:
        fixed = walker.uniform(FIXED, tuple(left.shape))
        walker.tie(left if inner_a else fixed, right if inner_b else fixed, walker.place(node))
    made = walker.uniform(NEUTRAL, walker.trace.shape(node.outputs[0]))
    if rows:
        made = a.narrow(-1, 0, 1)
    elif columns:
        made = b.narrow(-2, 0, 1)
    factors = [along(a, -2) if rows else None, along(a, -1) if inner_a else None]
    factors.append(along(b, -1) if columns else None)
    walker.cost(node, tuple(f for f in factors if f is not None))
    walker.set(node, made)


def _from_end(labels: Tensor) -> list[int]:
    return [d - labels.dim() for d in varying(labels)]


# -- pieces of a dimension ---------------------------------------------------------------------


def _split(walker: Walker, node: Node) -> None:
    read = walker.labels(node.args[0].value)
    dim = walker.arg(node, 2, "dim", 0) % read.dim()
    _replay(walker, node)
    if varying(read) != [dim]:
        return
    parts = [walker.result.values[v] for v in node.outputs]
    sizes = [p.shape[dim] for p in parts]
    vectors = [v for p in parts if (v := along(p, dim)) is not None]
    whole = along(read, dim)
    named = _attribute(walker, node, sizes, vectors)
    if not named and whole is not None and len(set(sizes)) == 1:  # a part of an attribute
        _attribute(walker, node, [read.shape[dim]], [whole])
    if len(set(sizes)) == 1:
        for part in parts[1:]:
            walker.tie(parts[0], part, walker.place(node))
    elif not named:
        walker.freeze(read, f"it is split at fixed positions by {walker.place(node)}")


def _slice(walker: Walker, node: Node) -> None:
    read = walker.labels(node.args[0].value)
    dim = walker.arg(node, 1, "dim", 0) % read.dim()
    _replay(walker, node)
    made = walker.result.values[node.outputs[0]]
    if made.shape[dim] == read.shape[dim] or dim not in varying(read):
        return
    vector = along(read, dim)
    start, end = walker.arg(node, 2, "start") or 0, walker.arg(node, 3, "end")
    end = read.shape[dim] if end is None else end
    step = walker.arg(node, 4, "step", 1)
    cuts = [c for c in (start, end) if 0 < c < read.shape[dim]]
    named = (
        vector is not None
        and step == 1
        and all(_attribute(walker, node, [c], [vector[:c]]) for c in cuts)
    )
    if not named:
        walker.freeze(read, f"it is sliced at fixed positions by {walker.place(node)}")


def _select(walker: Walker, node: Node) -> None:
    read = walker.labels(node.args[0].value)
    dim = walker.arg(node, 1, "dim", 0) % read.dim()
    if varying(read) == [dim]:
        walker.freeze(read, f"one channel is picked by {walker.place(node)}")
    _replay(walker, node)


def _attribute(walker: Walker, node: Node, sizes: list[int], parts: list[Tensor]) -> bool:
    """Find the module attribute that told forward where to split, so that the cut can set it."""
    module = walker.modules.get(node.module)
    for name, held in sorted(vars(module).items()) if module is not None else []:
        if name.startswith("_") or isinstance(held, bool):
            continue
        same_list = isinstance(held, (list, tuple)) and list(held) == sizes and len(sizes) > 1
        same_number = isinstance(held, int) and held == sizes[0] and len(set(sizes)) == 1
        if same_list or same_number:
            sides = [f".{name}[{i}]" for i in range(len(parts))] if same_list else [f".{name}"]
            for side, part in zip(sides, parts):
                walker.slot(Slot(node.module, side, part, node.id))
            return True
    return False


def _still(walker: Walker, node: Node) -> None:
    """Order of positions changes (roll, flip): fine unless channels are what moves."""
    read = walker.labels(node.args[0].value)
    dims = walker.arg(node, len(node.args) - 1, "dims", [])
    if {d % read.dim() for d in dims} & set(varying(read)):
        raise ValueError("channels change their order")
    walker.set(node, read)


def _fill(walker: Walker, node: Node) -> None:
    """New tensors: nothing in them follows a channel."""
    for index, value in enumerate(node.outputs):
        shape = walker.trace.shape(value)
        number = FIXED if torch.Size(shape).numel() > 1 else NEUTRAL
        walker.set(node, walker.uniform(number, shape), index)


def _overload(op: str) -> Any:
    space, name, overload = op.split(".")
    return getattr(getattr(getattr(torch.ops, space), name), overload)


_ELEMENTWISE = (
    "add sub rsub mul div addcmul addcdiv maximum minimum where pow lerp atan2 remainder "
    "eq ne lt le gt ge logical_and logical_or masked_fill copy _prelu_kernel prelu bitwise_and"
)
_UNARY = (
    "relu relu6 sigmoid hardsigmoid tanh hardtanh hardswish silu mish gelu elu selu celu "
    "leaky_relu softplus softsign exp log log1p expm1 sqrt rsqrt reciprocal neg abs square sin cos erf sign "
    "clamp clamp_min clamp_max threshold softmax _softmax _log_softmax clone detach alias _to_copy "
    "contiguous dropout native_dropout bernoulli lift_fresh logsigmoid log_sigmoid_forward "
    "hardshrink softshrink cumsum round floor ceil trunc isnan isfinite nan_to_num fill "
    "rand_like randn_like zeros_like ones_like empty_like full_like"
)
_VIEWS = "permute transpose t unsqueeze squeeze expand unbind cat stack repeat expand_as numpy_T"
_SPATIAL = (
    "max_pool2d_with_indices max_pool3d_with_indices avg_pool2d avg_pool1d avg_pool3d "
    "_adaptive_avg_pool2d _adaptive_avg_pool3d adaptive_avg_pool1d adaptive_max_pool2d "
    "adaptive_max_pool3d upsample_bilinear2d upsample_nearest2d upsample_bicubic2d "
    "_upsample_bilinear2d_aa _upsample_bicubic2d_aa upsample_nearest1d upsample_linear1d "
    "upsample_nearest3d upsample_trilinear3d reflection_pad2d replication_pad2d "
    "reflection_pad1d replication_pad1d grid_sampler_2d im2col max_pool1d"
)
_REDUCTIONS = (
    "mean sum amax amin max min prod var std logsumexp linalg_vector_norm norm any all median"
)
RULES: dict[str, Rule] = {
    **dict.fromkeys(_ELEMENTWISE.split(), _elementwise),
    **dict.fromkeys(_UNARY.split(), _unary),
    **dict.fromkeys(_VIEWS.split(), _replay),
    **dict.fromkeys(_SPATIAL.split(), _spatial),
    **dict.fromkeys(_REDUCTIONS.split(), _reduce),
    "convolution": _convolution,
    "addmm": _addmm,
    "mm": _mm,
    "linear": _linear,
    "bmm": _bmm,
    "baddbmm": _bmm,
    "native_batch_norm": _batch_norm,
    "_native_batch_norm_legit_no_training": _batch_norm,
    "cudnn_batch_norm": _batch_norm,
    "native_group_norm": _group_norm,
    "native_layer_norm": _layer_norm,
    "view": _reshape,
    "_unsafe_view": _reshape,
    "reshape": _reshape,
    "_reshape_alias": _reshape,
    "constant_pad_nd": _pad,
    "split": _split,
    "split_with_sizes": _split,
    "slice": _slice,
    "select": _select,
    "roll": _still,
    "flip": _still,
    "empty": _fill,
    "zeros": _fill,
    "ones": _fill,
    "full": _fill,
    "arange": _fill,
    "write_into_view": _unary,
    "scalar_tensor": _fill,
    "new_zeros": _fill,
    "new_empty": _fill,
    "new_ones": _fill,
}
