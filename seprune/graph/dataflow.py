"""Questions about a recorded pass: what is squeezed, what feeds a tensor, what shaped it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from seprune.graph.channel_ids import ChannelIds, compact, varying
from seprune.graph.trace import Node, Ref, Trace

VIEWS = {
    "view", "_unsafe_view", "reshape", "_reshape_alias", "permute", "transpose", "t", "unsqueeze",
    "squeeze", "expand", "clone", "detach", "alias", "_to_copy", "contiguous", "select", "slice",
    "repeat", "unbind", "split", "split_with_sizes", "lift_fresh", "flip", "roll",
}  # fmt: skip
MEANS = {
    "mean", "sum", "_adaptive_avg_pool2d", "_adaptive_avg_pool3d", "adaptive_avg_pool1d",
    "avg_pool1d", "avg_pool2d", "avg_pool3d",
}  # fmt: skip
MAXES = {
    "max", "amax", "adaptive_max_pool2d", "adaptive_max_pool3d", "adaptive_max_pool1d",
    "max_pool2d_with_indices", "max_pool1d", "max_pool3d_with_indices",
}  # fmt: skip
OTHERS = {
    "var", "std", "linalg_vector_norm", "norm", "logsumexp", "amin", "min", "median", "bmm",
    "topk", "sort", "prod", "var_mean",
}  # fmt: skip
CLAMPS = {"hardtanh", "relu6", "clamp", "clamp_min", "clamp_max", "relu"}
MIXING = {"convolution", "addmm", "mm", "linear", "bmm", "baddbmm"}
LEARNED = MIXING | {
    "native_batch_norm", "_native_batch_norm_legit_no_training", "cudnn_batch_norm",
    "native_group_norm", "native_layer_norm",
}  # fmt: skip
ACTIVATIONS = {
    "sigmoid": "sigmoid", "hardsigmoid": "hardsigmoid", "tanh": "tanh", "relu": "relu",
    "_softmax": "softmax", "hardtanh": "hardtanh", "relu6": "hardtanh", "clamp": "clamp",
    "clamp_min": "relu", "clamp_max": "clamp", "silu": "silu", "gelu": "gelu", "elu": "elu",
    "softplus": "softplus", "hardswish": "hardswish", "mish": "mish", "softsign": "softsign",
    "leaky_relu": "leaky_relu", "_log_softmax": "softmax", "exp": "exp", "sin": "sin",
    "_prelu_kernel": "prelu", "threshold": "relu", "log_sigmoid_forward": "logsigmoid",
}  # fmt: skip
PRODUCTS = {"mul", "multiply", "addcmul", "bmm"}
SUMS = {"add", "sum"}
COPIES = {"clone", "detach", "alias", "_to_copy", "contiguous", "lift_fresh"}


def base(node: Node) -> str:
    """The operator's name without its space, overload and in-place mark: `mul`."""
    return node.op.split(".")[1].rstrip("_") or node.op


@dataclass(frozen=True)
class Excitation:
    """What lies between a squeeze and a gate."""

    nodes: frozenset[int]
    squeezes: tuple[int, ...]
    kind: str  # of the squeeze
    learned: bool


class Flow:
    """A recorded pass with its squeezed values worked out."""

    def __init__(self, trace: Trace, channel_ids: ChannelIds) -> None:
        self.trace, self.channel_ids = trace, channel_ids
        self.depends = channel_ids.depends
        self.layers = {s.node: s.layer for s in channel_ids.slots if s.side != "in"}
        self.mapped: set[int] = set()  # what depends on a map, not only on a vector, of the input
        self.squeezed: set[int] = set()
        self.squeezing: dict[int, str] = {}  # node -> kind
        for node in trace.nodes:
            self._judge(node)

    def producer(self, value: int) -> Node | None:
        """The operator that made a value; None for inputs and parameters."""
        number = self.trace.values[value].node
        return self.trace.nodes[number] if number >= 0 else None

    def live(self, node: Node) -> list[int]:
        """The node's inputs that depend on the model's input."""
        return [v for v in node.inputs() if v in self.depends]

    def layer(self, node: Node) -> str:
        """The layer or bare parameter whose weight an operator uses."""
        return self.layers.get(node.id) or node.module

    def _judge(self, node: Node) -> None:
        self.mapped.update(v for v in self.live(node) if self._is_map(v))
        live = [v for v in self.live(node) if v in self.mapped]
        if not live:
            return
        self.mapped.update(node.outputs)
        open_ = [v for v in live if v not in self.squeezed]
        if not open_:
            if not self._unfolds(node):
                self.squeezed.update(node.outputs)
            return
        kind = self._squeeze_kind(node, open_)
        if kind:
            self.squeezing[node.id] = kind
            self.squeezed.update(node.outputs)

    def _is_map(self, value: int) -> bool:
        node = self.producer(value)
        if node is None:
            return len(self.trace.shape(value)) > 2
        return base(node) in ("embedding", "convolution") and self.wide(value) > 1

    def _unfolds(self, node: Node) -> bool:
        """Whether a convolution makes a map of a vector again, as a decoder's first one does."""
        if base(node) != "convolution" or self.wide(node.outputs[0]) < 2:
            return False
        read = node.args[0].value
        chain = self.strip(read)
        sizes = {torch.Size(self.trace.shape(v)).numel() for v in chain}  # nothing is repeated
        return min(map(self.wide, chain)) < 2 and len(sizes) == 1

    def _squeeze_kind(self, node: Node, open_: list[int]) -> str:
        before = max(self.wide(v) for v in open_)
        after = max((self.wide(v) for v in node.outputs), default=9)
        op = base(node)
        if after > 1 or op in VIEWS:
            return ""
        named = "mean" if op in MEANS else "max" if op in MAXES else "other" if op in OTHERS else ""
        if named and before == 1:  # maps of one position: only a reduction over positions counts
            return named if _over_positions(node) else ""
        if op == "convolution" and not _covers(node, self.trace):
            return ""
        if before > 1:
            return named or "other"
        # positions that become columns are mixed by a layer, those that become rows are not
        origin = self.strip(open_[0])[0]
        rows = self.trace.shape(origin)[:1] == self.trace.shape(open_[0])[:1]
        flattened = rows and self.wide(origin) > 1
        return "other" if op in ("addmm", "mm") and flattened else ""

    def wide(self, value: int) -> int:
        """How many dimensions of a sample are longer than 1."""
        shape = self.trace.shape(value)
        inner = sum(n > 1 for n in shape[1:])
        return inner + (bool(shape) and shape[0] not in (1, self.rows(value)))

    def rows(self, value: int) -> int:
        """Samples along dimension 0: the batch, or the frames of all images folded into it.

        Channels that are folded into the batch are no samples: their ids differ.
        """
        shape, batch = self.trace.shape(value), self.trace.batch
        if len(shape) < 2 or shape[0] <= batch or shape[0] % batch:
            return batch
        ids = self.channel_ids.values.get(value)
        if ids is None or 0 in varying(ids) or not self._numbered(ids):
            return batch
        return shape[0]

    def _numbered(self, ids: Tensor) -> bool:
        """Whether some of the ids are ids of channels."""
        return bool((compact(ids) > 0).any())

    def excitation(self, value: int) -> Excitation:
        """Walk back from a squeezed value to its squeezes."""
        seen: set[int] = set()
        squeezes: list[int] = []
        todo = [value]
        while todo:
            node = self.producer(todo.pop())
            if node is None or node.id in seen or node.id in squeezes:
                continue
            if node.id in self.squeezing:
                squeezes.append(node.id)
                continue
            seen.add(node.id)
            todo.extend(self.live(node))
        kinds = sorted({self.squeezing[s] for s in squeezes})
        kind = "mean+max" if kinds == ["max", "mean"] else kinds[0] if len(kinds) == 1 else "other"
        learned = any(base(self.trace.nodes[n]) in MIXING for n in seen)
        return Excitation(frozenset(seen), tuple(sorted(squeezes)), kind, learned)

    def activation(self, value: int) -> tuple[str, int]:
        """The last nonlinearity before a value and its node (-1 without one)."""
        todo, scaled, ceiling = {self.trace.values[value].node}, False, -1
        while todo and (number := max(todo)) >= 0:
            todo.remove(number)
            node, op = self.trace.nodes[number], base(self.trace.nodes[number])
            if number in self.squeezing or op in MIXING:
                continue
            if self._logistic(node):
                return "sigmoid", number
            scaled = scaled or op in ("mul", "div")
            if op in CLAMPS:
                low, high = _bounds(node)
                if low is None:
                    ceiling = number
                    todo.update(self.trace.values[v].node for v in self.live(node))
                    continue
                high = _bounds(self.trace.nodes[ceiling])[1] if ceiling >= 0 else high
                return _clamp(op, low, high, scaled), number
            if op in ACTIVATIONS:
                return ACTIVATIONS[op], number
            todo.update(self.trace.values[v].node for v in self.live(node))
        return ("clamp", ceiling) if ceiling >= 0 else ("identity", -1)

    def _logistic(self, node: Node) -> bool:
        """Whether a node is the last step of 1 / (1 + exp(-x))."""
        live = self.live(node)
        divides = base(node) == "div" and node.inputs()[0] not in live
        turned = base(node) == "reciprocal" or (base(node) == "pow" and node.args[1] == -1)
        return (divides or turned) and len(live) == 1 and self.logistic(live[0])

    def logistic(self, value: int) -> bool:
        """Whether a value is 1 + exp(-x), by which a sigmoid divides."""
        total = self.producer(self.strip(value)[0])
        if total is None or base(total) != "add":
            return False
        terms = [self.producer(self.strip(v)[0]) for v in self.live(total)]
        return len(terms) == 1 and terms[0] is not None and _exponential(terms[0])

    def strip(self, value: int) -> list[int]:
        """The values that are `value` up to its shape, oldest first."""
        chain = [value]
        while (node := self.producer(value)) is not None and base(node) in VIEWS:
            live = self.live(node)
            if len(live) != 1 or node.op == "aten.view.dtype":
                break
            value = live[0]
            chain.append(value)
        return chain[::-1]

    def positions(self, chain: list[int], ids: Tensor) -> Tensor:
        """Numbers of the elements of `chain[0]`, as those stand in `chain[-1]`."""
        for value in chain[1:]:
            node = self.producer(value)
            if node is None:
                raise ValueError("a value without a producer inside a chain of views")
            ids = replayed(node, ids, value)
        return ids

    def ancestors(self, value: int, *, first: int) -> set[int]:
        """Nodes from number `first` on that feed `value`."""
        seen: set[int] = set()
        todo = [value]
        while todo:
            node = self.producer(todo.pop())
            if node is not None and node.id >= first and node.id not in seen:
                seen.add(node.id)
                todo.extend(self.live(node))
        return seen

    def makers(self, value: int) -> list[str]:
        """The layers whose output a value is, up to norms, activations, views and sums."""
        node = self.producer(value)
        if node is None:
            return []
        if base(node) in ("convolution", "addmm", "mm", "linear"):
            return [self.layer(node)]
        live = [v for v in self.live(node) if v not in self.squeezed]
        if base(node) == "cat" or base(node) == "stack":
            return list(dict.fromkeys(m for v in live for m in self.makers(v)))
        latest = max(live, key=lambda v: self.trace.values[v].node, default=None)
        return self.makers(latest) if latest is not None else []


def replayed(node: Node, ids: Tensor, value: int) -> Tensor:
    """Numbers of the elements that a view reads, as they stand in its result `value`."""
    space, name, overload = node.op.split(".")
    if name in ("view", "_unsafe_view"):  # the numbers may not lie in memory as the tensor did
        return ids.reshape(node.args[1])
    call = getattr(getattr(getattr(torch.ops, space), name), overload)
    arguments = tree_map(lambda a: ids if isinstance(a, Ref) else a, node.args)
    keywords = {k: v for k, v in node.kwargs.items() if k in ("dim", "dims", "start", "end")}
    made: Any = call(*arguments, **keywords)
    if isinstance(made, Tensor):
        return made
    part: Tensor = made[node.outputs.index(value)]
    return part


def _bounds(node: Node) -> tuple[float | None, float | None]:
    """The limits of a clamp, None where it has none; trailing defaults are not recorded."""
    defaults = {"hardtanh": (-1.0, 1.0), "relu": (0.0, None), "relu6": (0.0, 6.0)}
    low, high = defaults.get(base(node), (None, None))
    given = list(node.args[1:3])
    if base(node) == "clamp_max":
        return None, given[0]
    return (given[0] if given else low), (given[1] if len(given) > 1 else high)


def _clamp(op: str, low: float | None, high: float | None, scaled: bool) -> str:
    """`relu6(x + 3) / 6` and `clamp(x / 6 + 0.5, 0, 1)` are hard sigmoids."""
    if low == 0 and (high == 1 or (high == 6 and scaled)):
        return "hardsigmoid"
    if low == 0 and high is None:
        return "relu"
    return ACTIVATIONS[op]


def _exponential(node: Node) -> bool:
    """Whether a node is exp(x), 2 ** x or math.e ** x."""
    return base(node) in ("exp", "exp2") or node.op == "aten.pow.Scalar"


def _over_positions(node: Node) -> bool:
    if len(node.args) < 2 or "pool" in node.op:
        return True
    dims = node.args[1] if isinstance(node.args[1], (list, tuple)) else [node.args[1]]
    return list(dims) != [1]


def _covers(node: Node, trace: Trace) -> bool:
    """Whether a convolution's kernel sees its whole input at once."""
    image, kernel = trace.shape(node.args[0].value)[2:], trace.shape(node.args[1].value)[2:]
    return image == kernel and max(image) > 1 and not any(node.args[4])
