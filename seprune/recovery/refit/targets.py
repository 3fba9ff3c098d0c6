"""What each layer of a cut network shall reproduce, and where to see it, read off one pass."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from seprune.graph.tap_points import Tap, Taps
from seprune.graph.trace import Call, Node, record
from seprune.pruning.plan import PruningPlan

_NORMS = {"native_batch_norm", "_native_batch_norm_legit_no_training", "cudnn_batch_norm"}
_SAME = {"clone", "alias", "detach", "_to_copy", "div"}  # read channel by channel, like a norm


@dataclass(frozen=True, eq=False)
class Target:
    """One layer to refit, and its place in the forward.

    Attributes:
        keep: positions of the dense output that the cut layer still has, along `dim`; None: all.
        norm: the BatchNorm that alone reads the output: it takes the intercept of a layer
            without bias.
        branch: where the output has arrived at a residual sum or at a ReLU, each channel scaled
            by norms and gates.
        other: the other operand of that sum, if it is known before the layer runs: then the layer
            makes up for the error of that one.
        rectified: nothing but a ReLU reads the sum, or the branch where there is no sum.
        alive: bytes per sample that a forward keeps when it reaches the layer.
        positions: of the output, per sample.
        rows: output positions that enter its regression, over all images.
    """

    layer: str
    keep: Tensor | None
    dim: int
    norm: str | None
    branch: Tap | None
    other: Tap | None
    rectified: bool
    alive: int
    positions: int = 1
    rows: int = 0

    @property
    def shown(self) -> dict[str, Tap]:
        """What the parent shows for the layer, by name, and where."""
        taps = {"y": Tap(self.layer, 0, "output", 0), "branch": self.branch, "other": self.other}
        return {name: tap for name, tap in taps.items() if tap is not None}


@dataclass(frozen=True)
class Wanted:
    """What the output of a cut layer should be instead, at some rows: (channels, rows).

    y + (other of the parent - other of the cut network) / slope; where a ReLU follows and the
    parent is not above 0 there, any value that is not above 0 will do (Zhang et al.,
    arXiv:1505.06798), so the output itself, as far as it is not above 0, stays the target.

    Attributes:
        values: the target where the parent is above 0, or no ReLU follows.
        free: where it is not above 0; None without a ReLU.
        start: what arrives at the ReLU, less slope times the output of the layer.
        slope: (channels, 1) how much the branch grows with the output; 0: it does not follow.
    """

    values: Tensor
    free: Tensor | None
    start: Tensor
    slope: Tensor

    @classmethod
    def of(cls, target: Target, seen: Mapping[str, Tensor], slope: Tensor) -> Wanted:
        """From `y`, `branch`, `other` of the parent and `gap`, the error of the other operand."""
        known, y = slope != 0, seen["y"]
        inverse = torch.where(known, 1 / slope, torch.zeros_like(slope))
        values = y + seen["gap"] * inverse if "gap" in seen else y
        if not target.rectified:
            return cls(values, None, values, slope)
        dense = seen["branch"] + seen["other"] if "other" in seen else seen["branch"]
        return cls(values, known & (dense <= 0), dense - values * slope, slope)

    def given(self, made: Tensor) -> Tensor:
        """The target for a layer whose output is `made` at present."""
        if self.free is None:
            return self.values
        inverse = torch.where(self.slope != 0, 1 / self.slope, torch.zeros_like(self.slope))
        above = torch.addcmul(self.start, made, self.slope).clamp_min_(0)
        return torch.where(self.free, torch.addcmul(made, above, inverse, value=-1), self.values)


def slope_of(seen: Mapping[str, Tensor]) -> Tensor:
    """The factor (channels, 1) with which a channel of y enters the branch; 0: it does not."""
    y, branch = seen["y"], seen.get("branch")
    if branch is None:
        return torch.zeros_like(y[:, :1])
    a, b = (v - v.mean(1, keepdim=True) for v in (y, branch))
    both, own, other = ((p * q).sum(1, keepdim=True) for p, q in ((a, b), (a, a), (b, b)))
    alike = (both.square() > 0.25 * own * other) & (other > 1e-6 * other.mean())
    return torch.where(alike, both / own, torch.zeros_like(own))


class TargetFinder:
    """Finds the layers to refit for any plan in one recorded pass of the parent."""

    def __init__(self, model: nn.Module, images: Any) -> None:
        self.trace, self.modules = record(model, images), dict(model.named_modules())
        self.taps, self.readers = Taps(self.trace), self.trace.consumers()
        self.bare = {**dict(model.named_parameters()), **dict(model.named_buffers())}
        self.calls: dict[str, list[Call]] = {}
        for call in sorted(self.trace.calls, key=lambda c: c.first_node):
            self.calls.setdefault(call.module, []).append(call)

    def find(self, plan: PruningPlan) -> tuple[list[Target], dict[str, str]]:
        """The layers from the first consumer of cut channels on, in the order of the forward.

        Returns:
            Those that can be refitted, and the others with the reason.
        """
        cut = plan.layers()
        consumers = {layer for layer, sides in cut.items() if self.consumes(layer, sides)}
        targets: list[Target] = []
        skipped = {n: self.absent(n) for n in consumers if n not in self.calls}
        for call in self.layers(consumers):
            if plan.removed.covers(call.module):
                continue
            reason = self.obstacle(call.module)
            if reason is None:
                sides = cut.get(call.module, {})
                keep = torch.from_numpy(sides["out"]) if "out" in sides else None
                targets.append(self.target(call, keep))
            else:
                skipped[call.module] = reason
        return targets, skipped

    def consumes(self, layer: str, sides: Mapping[str, Any]) -> bool:
        """Fewer inputs, or a depthwise convolution with fewer channels."""
        if layer not in self.modules:  # a matrix by itself; a shift (1, C, 1, 1) mixes nothing
            return "dim1" in sides and sum(n > 1 for n in self.bare[layer].shape) > 1
        module: Any = self.modules[layer]
        depthwise = _is_layer(module) and getattr(module, "groups", 1) > 1 and "out" in sides
        return "in" in sides or "dim1" in sides or depthwise

    def absent(self, name: str) -> str:
        """Why nothing of this name was seen to run."""
        return "it never runs" if name in self.modules else "it is no layer, but a bare weight"

    def layers(self, consumers: set[str]) -> Iterator[Call]:
        """Convolutions and linear layers, and what else is a consumer, from the first one on."""
        begun = False
        for name, calls in self.calls.items():
            begun = begun or name in consumers
            if begun and (name in consumers or _is_layer(self.modules[name])):
                yield calls[0]

    def obstacle(self, layer: str) -> str | None:
        module, count = self.modules[layer], len(self.calls[layer])
        if not isinstance(module, (nn.modules.conv._ConvNd, nn.Linear)):
            return f"a {type(module).__name__} cannot be refitted"
        return None if count == 1 else f"it runs {count} times in one forward"

    def target(self, call: Call, keep: Tensor | None) -> Target:
        dim = -1 if isinstance(self.modules[call.module], nn.Linear) else 1
        norm, (branch, other, rectified) = self.norm(call.outputs[0]), self.landing(call)
        shape = self.trace.shape(call.outputs[0])
        positions = torch.Size(shape).numel() // (self.trace.batch * shape[dim])
        return Target(
            call.module, keep, dim, norm, branch, other, rectified, self.alive(call), positions
        )

    def norm(self, made: int) -> str | None:
        """The BatchNorm with statistics of its own that alone reads a value."""
        readers = self.readers.get(made, [])
        node = self.trace.nodes[readers[0]] if len(readers) == 1 else None
        if node is None or node.inputs()[0] != made:
            return None
        module, once = self.modules.get(node.module), len(self.calls.get(node.module, ())) == 1
        known = isinstance(module, nn.modules.batchnorm._BatchNorm) and module.track_running_stats
        return node.module if known and once else None

    def landing(self, call: Call) -> tuple[Tap | None, Tap | None, bool]:
        """Follow an output through norms and gates to a residual sum or a ReLU."""
        made = call.outputs[0]
        shape, own, queue = self.trace.shape(made), self.descendants(made), [made]
        for value in queue:
            if self.rectified(value) and (tap := self.taps.first([value])):
                return tap[1], None, True
            for number in self.readers.get(value, ()):
                node = self.trace.nodes[number]
                name = node.op.split(".")[1].rstrip("_")
                if name == "add" and (found := self.operands(node, value, own, call)):
                    return *found, self.rectified(node.outputs[0])
                scales = name == "mul" or (name in _NORMS | _SAME and node.inputs()[0] == value)
                if scales and self.trace.shape(node.outputs[0]) == shape:
                    queue.append(node.outputs[0])
        return None, None, False

    def operands(self, node: Node, value: int, own: set[int], call: Call) -> tuple[Tap, Tap] | None:
        """Taps on both operands of a sum whose other one is complete before `call`."""
        others = [v for v in node.inputs() if v not in own]
        if len(others) != 1 or self.trace.values[others[0]].kind not in ("result", "input"):
            return None
        if self.trace.shape(others[0]) != self.trace.shape(value):
            return None
        branch, other = self.taps.first([value]), self.taps.first([others[0]])
        if branch is None or other is None or not self.before(other[1], call):
            return None
        return branch[1], other[1]

    def before(self, tap: Tap, call: Call) -> bool:
        """Whether a tap shows its tensor before `call` begins."""
        found = [c for c in self.calls.get(tap.module, ()) if c.call == tap.call]
        ends = {"output": lambda c: c.end_node, "input": lambda c: c.first_node}.get(tap.kind)
        return ends is not None and all(ends(c) <= call.first_node for c in found)

    def rectified(self, value: int) -> bool:
        """Whether nothing but ReLUs reads a value."""
        readers = [self.trace.nodes[n] for n in self.readers.get(value, ())]
        relus = all(n.op.split(".")[1].rstrip("_") == "relu" for n in readers)
        return bool(readers) and relus and value not in self.trace.outputs

    def descendants(self, value: int) -> set[int]:
        found = {value}
        for node in self.trace.nodes:
            if not found.isdisjoint(node.inputs()):
                found.update(node.outputs)
        return found

    def alive(self, call: Call) -> int:
        """Bytes per sample of the inputs and of what is made before `call` and read in it or later.

        Whoever has called the model holds its inputs until the forward ends.
        """
        total = 0
        for value, readers in self.readers.items():
            info = self.trace.values[value]
            read = info.kind == "result" and info.node < call.first_node <= max(readers)
            if read or info.kind == "input":
                total += 4 * torch.Size(info.shape).numel() // self.trace.batch
        return total


def _is_layer(module: nn.Module | None) -> bool:
    return isinstance(module, (nn.modules.conv._ConvNd, nn.Linear))
