"""What each layer of a cut network shall reproduce, and where to see it, read off one pass."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from seprune.plan import PruningPlan
from seprune.taps import Tap, Taps
from seprune.trace import Call, Node, Trace, record

# operators that change every channel by a factor and an offset of its own
_AFFINE = {"native_batch_norm", "_native_batch_norm_legit_no_training", "cudnn_batch_norm", "mul",
           "clone", "alias", "detach", "div", "_to_copy"}  # fmt: skip


@dataclass(frozen=True)
class Target:
    """One layer to refit, and its place in the forward.

    Attributes:
        keep: positions of the dense output that the cut layer still has, along `dim`; None: all.
        norm: the BatchNorm that alone reads the output: it takes the intercept of a layer
            without bias.
        branch, other: operands of the residual sum that the output goes into, if the other one is
            known before the layer runs: then the layer makes up for the error of that one.
        held: bytes per sample that a forward holds when it reaches the layer.
    """

    layer: str
    keep: Tensor | None
    dim: int = 1
    norm: str | None = None
    branch: Tap | None = None
    other: Tap | None = None
    rectified: bool = False
    held: int = 0

def find_targets(
    parent: nn.Module, plan: PruningPlan, images: Tensor
) -> tuple[list[Target], dict[str, str]]:
    """The consumers of cut channels in the order of the forward, and those left out, with why.

    Consumers are convolutions and linear layers with fewer inputs, and depthwise convolutions with
    fewer channels.
    """
    trace = record(parent, images)
    reader = _Reader(trace, parent)
    targets, skipped = [], {}
    cut=plan.layers()
    import os
    names = [c.module for c in sorted(trace.calls,key=lambda c:c.first_node) if isinstance(reader.modules[c.module],(nn.Conv1d, nn.Conv2d, nn.Linear))]
    if os.environ.get("SCOPE")=="all":
        first=min(i for i,n in enumerate(names) if _consumes(reader.modules.get(n), cut.get(n,{})))
        names=names[first:]
    else: names=cut
    for layer in names:
        sides=cut.get(layer,{})
        if not os.environ.get("SCOPE")=="all" and not _consumes(reader.modules.get(layer), sides):
            continue
        reason = reader.obstacle(layer)
        if reason:
            skipped[layer] = reason
            continue
        keep = torch.from_numpy(sides["out"]) if "out" in sides else None
        targets.append(reader.target(layer, keep))
    order = {call.module: call.first_node for call in trace.calls}
    return sorted(targets, key=lambda t: order[t.layer]), skipped


def _consumes(module: Any, sides: Mapping[str, Any]) -> bool:
    if "in" in sides or "dim1" in sides:
        return True
    depthwise = isinstance(module, nn.modules.conv._ConvNd) and module.groups == module.in_channels
    return depthwise and "out" in sides


class _Reader:
    def __init__(self, trace: Trace, model: nn.Module) -> None:
        self.trace, self.modules = trace, dict(model.named_modules())
        self.taps, self.readers = Taps(trace), trace.consumers()
        self.calls: dict[str, list[Call]] = {}
        for call in trace.calls:
            self.calls.setdefault(call.module, []).append(call)

    def obstacle(self, layer: str) -> str | None:
        module, calls = self.modules.get(layer), len(self.calls.get(layer, ()))
        if not isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Linear)):
            kind = type(module).__name__ if module is not None else "a bare parameter"
            return f"{kind} is no layer that can be refitted"
        return None if calls == 1 else f"it runs {calls} times in one forward"

    def target(self, layer: str, keep: Tensor | None) -> Target:
        call = self.calls[layer][0]
        branch, other, rectified = self.sum(call) or (None, None, False)
        dim = -1 if isinstance(self.modules[layer], nn.Linear) else 1
        norm = self.norm(call.outputs[0])
        return Target(layer, keep, dim, norm, branch, other, rectified, self.held(call))

    def norm(self, made: int) -> str | None:
        """The BatchNorm with statistics of its own that alone reads a value."""
        readers = self.readers.get(made, [])
        node = self.trace.nodes[readers[0]] if len(readers) == 1 else None
        module = self.modules.get(node.module) if node else None
        known = isinstance(module, nn.modules.batchnorm._BatchNorm) and module.track_running_stats
        once = node is not None and len(self.calls.get(node.module, ())) == 1
        return node.module if node and known and once and node.inputs()[0] == made else None

    def sum(self, call: Call) -> tuple[Tap, Tap] | None:
        """The operands of the residual sum after a layer, its own first."""
        made = call.outputs[0]
        shape, own, queue = self.trace.shape(made), self.descendants(made), [made]
        for value in queue:
            if self.rectified(value) and (tap:=self.taps.first([value])):
                return tap[1], None, True
            for number in self.readers.get(value, ()):
                node = self.trace.nodes[number]
                name = node.op.split(".")[1].rstrip("_")
                if name == "add" and (found := self.operands(node, value, own, call)):
                    return *found, self.rectified(node.outputs[0])
                scales = name == "mul" or (name in _AFFINE and node.inputs()[0] == value)
                if scales and self.trace.shape(node.outputs[0]) == shape:
                    queue.append(node.outputs[0])
        return None

    def rectified(self, value):
        rs=self.readers.get(value,[])
        return bool(rs) and value not in self.trace.outputs and all(self.trace.nodes[n].op.split(".")[1].rstrip("_")=="relu" for n in rs)

    def operands(
        self, node: Node, value: int, own: set[int], call: Call
    ) -> tuple[Tap, Tap] | None:
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
        if tap.kind == "output":
            return all(c.end_node <= call.first_node for c in found)
        if tap.kind == "input":
            return all(c.first_node <= call.first_node for c in found)
        return False

    def descendants(self, value: int) -> set[int]:
        found = {value}
        for node in self.trace.nodes:
            if not found.isdisjoint(node.inputs()):
                found.update(node.outputs)
        return found

    def held(self, call: Call) -> int:
        """Bytes per sample of the values made before `call` and read in it or later."""
        total = 0
        for value, readers in self.readers.items():
            info = self.trace.values[value]
            if info.kind in ("result", "input") and info.node < call.first_node <= max(readers):
                total += 4 * int(torch.Size(info.shape).numel()) // self.trace.batch
        return total
