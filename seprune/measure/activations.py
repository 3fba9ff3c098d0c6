"""What one forward pass, or one with derivatives, keeps in memory: read off a recorded pass."""

from __future__ import annotations

import torch

from seprune.graph.trace import Trace

_VIEWS = {"view", "_unsafe_view", "permute", "transpose", "t", "expand", "slice", "select",
          "split", "unsqueeze", "squeeze", "alias", "detach", "chunk", "narrow"}  # fmt: skip


def peak_bytes(trace: Trace) -> int:
    """The most that the values alive at one time take, bytes per sample, of float32."""
    changes = [0] * (len(trace.nodes) + 2)
    for value, (start, end) in _lives(trace).items():
        size = _size(trace, value)
        changes[start + 1] += size
        changes[end + 2] -= size
    alive = peak = 0
    for change in changes:
        alive += change
        peak = max(peak, alive)
    return peak


def saved_bytes(trace: Trace) -> int:
    """What a backward pass finds again, at most: all results, bytes per sample, of float32."""
    return sum(_size(trace, value) for value in _lives(trace))


def _lives(trace: Trace) -> dict[int, tuple[int, int]]:
    """Value -> the nodes that make it (-1: it comes in) and that read it last; views are not kept.

    A value lives as long as its views.
    """
    owner: dict[int, int] = {}
    lives: dict[int, tuple[int, int]] = {}
    lives |= {value.id: (-1, -1) for value in trace.values if value.kind == "input"}
    for node in trace.nodes:
        read = [owner.get(v, v) for v in node.inputs()]
        for value in read:
            if value in lives:
                lives[value] = (lives[value][0], node.id)
        view = node.op.split(".")[1].rstrip("_") in _VIEWS or node.op.split(".")[1].endswith("_")
        for made in node.outputs:
            if view and read and read[0] in lives:
                owner[made] = read[0]
            else:
                lives[made] = (node.id, node.id)
    return lives


def _size(trace: Trace, value: int) -> int:
    return 4 * torch.Size(trace.shape(value)).numel() // trace.batch
