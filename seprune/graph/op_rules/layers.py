"""Convolutions, linear layers and matrix products: what reads channels and makes new ones."""

from __future__ import annotations

from torch import Tensor, nn

from seprune.graph.channel_ids import FIXED, NEUTRAL, Slot, UnknownUse, Walker, along, varying
from seprune.graph.op_rules.elementwise import tie_all
from seprune.graph.trace import Node
from seprune.graph.written import is_known


def convolution(walker: Walker, node: Node) -> None:
    """It reads channels and makes new ones; conv groups keep as many channels each, or go whole."""
    x, weight = node.args[0].value, node.args[1].value
    transposed, groups = bool(walker.arg(node, 6)), int(walker.arg(node, 8))
    shape, kernel = walker.trace.shape(x), walker.trace.shape(weight)
    outs = kernel[1] * groups if transposed else kernel[0]
    read = walker.ids(x)
    channels = along(read, 1)
    if channels is None:
        _positional(walker, node, outs)
        return
    layer = _layer(walker, node, weight)
    owned = layer in walker.modules
    into, out = ("in", "out") if owned else ("dim0", "dim1") if transposed else ("dim1", "dim0")
    depthwise = groups == shape[1] > 1
    if not owned and groups > 1:
        call = walker.function_of.get(node.id)
        if not depthwise or transposed or call is None or not is_known(call.function):
            raise UnknownUse("conv groups of a bare parameter")
        walker.number(call, 0, channels, node)
    if depthwise:
        made = channels.repeat_interleave(outs // groups)
    else:
        made = walker.fresh(outs)
        walker.slot(Slot(layer, into, channels, node.id))
        _conv_groups(walker, layer, groups, channels, made)
    if transposed and groups > 1:
        walker.result.transposed_groups.add(layer)
    walker.slot(Slot(layer, out, made, node.id, produces=not depthwise))
    if node.args[2] is not None:
        _bias(walker, node, (layer, node.args[2].value), made)
    _cost_of_layer(walker, node, channels, made, groups)
    walker.set(node, made.view(1, -1, *[1] * (len(shape) - 2)))


def _cost_of_layer(walker: Walker, node: Node, channels: Tensor, made: Tensor, groups: int) -> None:
    apart = groups > 1 and (groups == len(channels) or _whole_blocks(groups, channels, made))
    walker.cost(node, (made,) if apart else (channels, made))


def _whole_blocks(groups: int, channels: Tensor, made: Tensor) -> bool:
    """Whether a grouped convolution gives up whole conv groups or channels within each."""
    return groups >= min(len(channels), len(made)) // groups


def _conv_groups(walker: Walker, layer: str, groups: int, channels: Tensor, made: Tensor) -> None:
    """Keep a grouped convolution valid: whole conv groups go, or as many channels of each."""
    if groups == 1:
        return
    ins, outs = channels.reshape(groups, -1), made.reshape(groups, -1)
    where = f"the conv groups of {layer}"
    if _whole_blocks(groups, channels, made):
        walker.result.by_conv_group.add(layer)
        walker.tie(ins, ins[:, :1].expand_as(ins), where)
        walker.tie(outs, ins[:, :1].expand_as(outs), where)
    else:
        walker.result.even += [(ins, where), (outs, where)]


def _positional(walker: Walker, node: Node, outs: int) -> None:
    """A convolution over channel positions (ECA): the order of channels stays, none is mixed."""
    x, out = node.args[0].value, node.outputs[0]
    read = walker.ids(x)
    if outs == walker.trace.shape(x)[1] == 1 and walker.trace.shape(x) == walker.trace.shape(out):
        walker.set(node, read)
        walker.cost(node, tuple(v for d in varying(read) if (v := along(read, d)) is not None))
    else:
        walker.opaque(node, f"{walker.place(node)} mixes channels and positions")


def addmm(walker: Walker, node: Node) -> None:
    """A linear layer with bias, or a product of activations."""
    bias, x, weight = (a.value for a in node.args[:3])
    if not _matmul_parameter(walker, node, x, weight):
        bmm(walker, node, (x, weight))
        tie_all(walker, node, [walker.ids(bias), walker.result.values[node.outputs[0]]])
        return
    made = walker.result.values[node.outputs[0]]
    if along(made, -1) is not None:  # else a layer over positions
        _bias(walker, node, (_layer(walker, node, weight), bias), made)


def mm(walker: Walker, node: Node) -> None:
    """A linear layer, or a product of activations."""
    x, weight = node.args[0].value, node.args[1].value
    if not _matmul_parameter(walker, node, x, weight):
        bmm(walker, node, (x, weight))


def linear(walker: Walker, node: Node) -> None:
    """A linear layer."""
    x, weight, bias = node.args[0].value, node.args[1].value, walker.arg(node, 2)
    name, _ = walker.parameter_name(weight)
    channels = along(walker.ids(x), -1)
    if not name or channels is None:
        walker.opaque(node, f"no rule for {walker.place(node)}")
        return
    layer = _layer(walker, node, weight)
    made = walker.fresh(walker.trace.shape(weight)[0])
    walker.slot(Slot(layer, "in", channels, node.id))
    walker.slot(Slot(layer, "out", made, node.id, produces=True))
    if bias is not None:
        _bias(walker, node, (layer, bias.value), made)
    walker.cost(node, (channels, made))
    walker.set(node, made)


def _matmul_parameter(walker: Walker, node: Node, x: int, weight: int) -> bool:
    """`x @ weight`: a linear layer, if the weight is a parameter or comes from one."""
    name, turned = walker.parameter_name(weight)
    if weight in walker.result.depends or not name or len(walker.trace.shape(weight)) != 2:
        return False
    read = walker.ids(x)
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


def _bias(walker: Walker, node: Node, pair: tuple[str, int], made: Tensor) -> None:
    """The bias (value) that a layer is given lies along its outputs; its own is cut with it."""
    layer, bias = pair
    owner, _, leaf = walker.parameter_name(bias)[0].rpartition(".")
    own = getattr(walker.modules.get(layer), "bias", None)
    if own is None or getattr(walker.modules.get(owner), leaf, None) is not own:
        tie_all(walker, node, [walker.ids(bias), made])


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
        raise UnknownUse("the weight is computed")
    return name


def bmm(walker: Walker, node: Node, pair: tuple[int, int] | None = None) -> None:
    """A product of two activations: contracted channels are tied, rows and columns go on."""
    first, second = pair or (node.args[-2].value, node.args[-1].value)
    a, b = walker.ids(first), walker.ids(second)
    rows, columns = -2 in _from_end(a), -1 in _from_end(b)
    inner_a, inner_b = -1 in _from_end(a), -2 in _from_end(b)
    if (rows and inner_a) or (columns and inner_b) or (rows and columns):
        raise UnknownUse("a matrix product of channels with channels")
    if min(_from_end(a) + _from_end(b), default=0) < -2:
        if rows or columns:
            raise UnknownUse("a matrix product of channels with channels")
        _products_of_batches(walker, node, a, b)
        return
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


def _products_of_batches(walker: Walker, node: Node, a: Tensor, b: Tensor) -> None:
    """Each channel has a product of its own (einsum over branches): what it sums is one unit."""
    left, right = a.narrow(-2, 0, 1).squeeze(-2), b.narrow(-1, 0, 1).squeeze(-1)
    terms = tie_all(walker, node, [left, right])
    first = terms.narrow(-1, 0, 1)
    walker.tie(terms, first.expand_as(terms), walker.place(node))
    walker.cost(node, tuple(v for d in varying(first) if (v := along(first, d)) is not None))
    walker.set(node, first.unsqueeze(-1))


def mv(walker: Walker, node: Node) -> None:
    """`x @ w` with a vector: one weighted sum of channels."""
    read, weights = (walker.ids(a.value) for a in node.args)
    channels = along(read, 1)
    if channels is None or 0 in varying(read):
        raise UnknownUse("a matrix product of channels with channels")
    walker.tie(channels, weights, walker.place(node))
    walker.cost(node, (channels,))
    walker.set(node, walker.uniform(NEUTRAL, walker.trace.shape(node.outputs[0])))


def embedding(walker: Walker, node: Node) -> None:
    """Rows of a table: every column is a channel."""
    name, _ = walker.parameter_name(node.args[0].value)
    if not name:
        raise UnknownUse("the table is computed")
    made = walker.fresh(walker.trace.shape(node.outputs[0])[-1])
    walker.slot(Slot(name, "dim1", made, node.id, produces=True))
    walker.set(node, made)


def _from_end(ids: Tensor) -> list[int]:
    return [d - ids.dim() for d in varying(ids)]
