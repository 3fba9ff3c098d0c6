"""Views, splits and joins: ids are rearranged as the tensor was."""

from __future__ import annotations

from torch import Tensor

from seprune.graph.channel_ids import NEUTRAL, UnknownUse, Walker, along, compact, varying
from seprune.graph.op_rules.elementwise import tie_all
from seprune.graph.op_rules.factories import stretch, stretch_operands
from seprune.graph.op_rules.replays import replay
from seprune.graph.trace import Node
from seprune.graph.written import SPLITS, slice_entries


def join(walker: Walker, node: Node) -> None:
    """Tensors side by side; constants among them are as wide as the call says.

    Where they are joined along positions, as a class token and the tokens of an image, the
    channels that lie behind each other are one channel.
    """
    stretch_operands(walker, node)
    joined = _along_positions(walker, node)
    if joined is None:
        replay(walker, node)
    else:
        walker.set(node, joined)


def _along_positions(walker: Walker, node: Node) -> Tensor | None:
    """The ids of maps that are joined along another dimension than their channels'."""
    if not node.op.startswith("aten.cat"):
        return None
    dim = walker.arg(node, 1, "dim", 0) % len(walker.trace.shape(node.outputs[0]))
    operands = [walker.ids(ref.value) for ref in node.args[0]]
    if any(ids.dim() <= dim or dim in varying(ids) for ids in operands):
        return None
    rows = [ids.narrow(dim, 0, 1) for ids in operands if ids.shape[dim]]
    if len(rows) < 2 or not all(bool((compact(row) != NEUTRAL).all()) for row in rows):
        return None
    return tie_all(walker, node, rows)


def halves(walker: Walker, node: Node) -> None:
    """GLU: one half of the channels gates the other."""
    read = walker.ids(node.args[0].value)
    one, two = read.chunk(2, walker.arg(node, 1, "dim", -1))
    walker.tie(one, two, walker.place(node))
    walker.set(node, one)


def complex_parts(walker: Walker, node: Node) -> None:
    """Complex numbers as pairs of real ones, and back."""
    read = walker.ids(node.args[0].value)
    if "view_as_real" in node.op:
        walker.set(node, read.unsqueeze(-1))
        return
    walker.tie(read[..., 0], read[..., 1], walker.place(node))
    walker.set(node, read[..., 0])


def triangle(walker: Walker, node: Node) -> None:
    """A triangle of the last two dimensions, which are positions."""
    read = walker.ids(node.args[0].value)
    if {read.dim() - 2, read.dim() - 1} & set(varying(read)):
        raise UnknownUse("rows or columns are channels")
    walker.set(node, read)


def still(walker: Walker, node: Node) -> None:
    """Order of positions changes (roll, flip): fine unless channels are what moves."""
    read = walker.ids(node.args[0].value)
    dims = walker.arg(node, len(node.args) - 1, "dims", [])
    if {d % read.dim() for d in dims} & set(varying(read)):
        raise UnknownUse("channels change their order")
    walker.set(node, read)


def pixel_shuffle(walker: Walker, node: Node) -> None:
    """r x r channels become the positions of one: they are one unit."""
    read, factor = walker.ids(node.args[0].value), walker.arg(node, 1)
    dim = read.dim() - 3
    size = factor**2
    blocks = read.reshape(*read.shape[:dim], -1, size, *read.shape[dim + 1 :])
    first = blocks.narrow(dim + 1, 0, 1)
    walker.tie(blocks, first.expand_as(blocks), walker.place(node))
    ids = along(first.squeeze(dim + 1), dim)
    _spread(walker, node, ids, dim)


def pixel_unshuffle(walker: Walker, node: Node) -> None:
    """Positions of one channel become r x r channels."""
    read, factor = walker.ids(node.args[0].value), walker.arg(node, 1)
    dim = read.dim() - 3
    ids = along(read, dim)
    _spread(walker, node, None if ids is None else ids.repeat_interleave(factor**2), dim)


def _spread(walker: Walker, node: Node, ids: Tensor | None, dim: int) -> None:
    """The result has these ids along `dim`."""
    if ids is None:
        raise UnknownUse("channels lie along positions")
    shape = walker.trace.shape(node.outputs[0])
    one = [len(ids) if d == dim else 1 for d in range(len(shape))]
    walker.set(node, ids.reshape(one).expand(shape))


def channel_shuffle(walker: Walker, node: Node) -> None:
    """Channels of `groups` parts take turns: every part keeps the same ones."""
    read, groups = walker.ids(node.args[0].value), walker.arg(node, 1)
    parts = read.reshape(read.shape[0], groups, -1, *read.shape[2:])
    first = parts.narrow(1, 0, 1)
    walker.tie(parts, first.expand_as(parts), walker.place(node))
    walker.set(node, first.expand_as(parts).transpose(1, 2).flatten(1, 2))


def split(walker: Walker, node: Node) -> None:
    """Parts of channels are groups of their own, where the code says their sizes."""
    read = walker.ids(node.args[0].value)
    dim = walker.arg(node, 2, "dim", 0) % read.dim()
    replay(walker, node)
    if varying(read) != [dim]:
        return
    parts = [walker.result.values[v] for v in node.outputs]
    sizes = [p.shape[dim] for p in parts]
    vectors = [v for p in parts if (v := along(p, dim)) is not None]
    if _written_sizes(walker, node, vectors):
        return
    if len(set(sizes)) > 1:
        walker.freeze(read, f"it is split at fixed positions by {walker.place(node)}")
    for part in parts[1:] if len(set(sizes)) == 1 else ():
        walker.tie(parts[0], part, walker.place(node))


def _written_sizes(walker: Walker, node: Node, parts: list[Tensor]) -> bool:
    """Whether each part has a size of its own in the call; a size of all of them is noted."""
    call = walker.function_of.get(node.id)
    if call is None or call.function not in SPLITS or len(parts) != len(node.outputs):
        return False
    listed = isinstance(node.args[1], (list, tuple))
    for entry, part in enumerate(parts if listed else parts[:1]):
        walker.number(call, entry, part, node)
    return listed


def slice_(walker: Walker, node: Node) -> None:
    """A range of channels is a group of its own, where the code says its ends."""
    dim = walker.arg(node, 1, "dim", 0) % len(walker.trace.shape(node.args[0].value))
    if walker.trace.shape(node.outputs[0])[dim] != walker.trace.shape(node.args[0].value)[dim]:
        stretch(walker, node.args[0].value, dim)
    read = walker.ids(node.args[0].value)
    replay(walker, node)
    made = walker.result.values[node.outputs[0]]
    if made.shape[dim] == read.shape[dim] or dim not in varying(read):
        return
    vector = along(read, dim)
    named = (
        vector is not None
        and walker.arg(node, 4, "step", 1) == 1
        and _written_ends(walker, node, vector)
    )
    if not named and not _in_equal_parts(walker, node, vector):
        walker.freeze(read, f"it is sliced at fixed positions by {walker.place(node)}")


def _in_equal_parts(walker: Walker, node: Node, channels: Tensor | None) -> bool:
    """Whether `tensor_split(x, 2)` made the slice: its parts lose the same channels."""
    call = walker.function_of.get(node.id)
    if call is None or call.function != "tensor_split" or channels is None:
        return False
    number = call.arguments[1] if len(call.arguments) > 1 else None
    if not isinstance(number, int) or len(channels) % number:
        return False
    parts = channels.reshape(number, -1)
    walker.tie(parts, parts[:1].expand_as(parts), walker.place(node))
    return True


def _written_ends(walker: Walker, node: Node, channels: Tensor) -> bool:
    """Whether the call has the numbers that say where it slices."""
    call = walker.function_of.get(node.id)
    entries = None if call is None else slice_entries(call, node, len(channels))
    for entry, first, end in entries or ():
        walker.number(call, entry, channels[first:end], node)  # type: ignore[arg-type]
    return entries is not None


def select(walker: Walker, node: Node) -> None:
    """Fine among positions; a channel that is picked stays, and its group with it."""
    read = walker.ids(node.args[0].value)
    dim = walker.arg(node, 1, "dim", 0) % read.dim()
    if varying(read) == [dim] and walker.readers.get(node.outputs[0]):
        walker.freeze(read, f"one channel is picked by {walker.place(node)}")
    replay(walker, node)


def unbind(walker: Walker, node: Node) -> None:
    """Branches may be taken apart; channels one by one may not."""
    read = walker.ids(node.args[0].value)
    if varying(read) == [walker.arg(node, 1, "dim", 0) % read.dim()]:
        walker.freeze(read, f"channels are taken apart one by one by {walker.place(node)}")
    replay(walker, node)
