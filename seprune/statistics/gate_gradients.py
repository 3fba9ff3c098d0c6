"""What each channel does to the network's answer: u = gate * dz/dgate, one number per sample.

z is summed over samples, so that one backward pass gives every sample's own derivative. A channel
without a gate gets a unit gate, one that multiplies by 1: there u is the sum over positions of
y * dz/dy. No derivative of a parameter is ever computed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.graph import Node

from seprune.errors import InputError

Gradients = Literal["none", "labels", "smoothed", "sampled", "logits", "weights"]
Couplings = Mapping[str, Sequence[tuple[str, Tensor | None]]]

_PIXELS = 1024  # how many values of an image name it
_VIEWS = ("View", "UnsafeView", "ReshapeAlias", "Clone", "Alias", "Slice", "Index", "Expand")


def objective(
    kind: Gradients, logits_BK: Tensor, labels_B: Tensor | None, keys_B: Tensor
) -> Tensor:
    """z, summed over the batch.

    `labels` cross-entropy; `smoothed` the same with labels smoothed by 0.1; `sampled` with labels
    drawn from the model's own answer; `logits` the projection on a random direction v ~ N(0, I).
    The draws depend on `keys_B` alone.
    """
    logits = logits_BK.float() if logits_BK.dtype != torch.float64 else logits_BK
    if kind == "logits":
        return (logits * normal(keys_B, logits.shape[1]).to(logits.dtype)).sum()
    if kind == "sampled":
        below = logits.detach().double().softmax(1).cumsum(1)
        labels_B = (below < uniform(keys_B, 1)).sum(1).clamp(max=logits.shape[1] - 1)
    assert labels_B is not None
    smoothing = 0.1 if kind == "smoothed" else 0.0
    return F.cross_entropy(logits, labels_B, reduction="sum", label_smoothing=smoothing)


def image_keys(images: Tensor, seed: int = 0) -> Tensor:
    """An int64 for each image, made from its own values.

    Random draws that are keyed by it do not change with batch size, order, device or number of
    processes.
    """
    flat = images.flatten(1)
    picked = flat[:, :: max(1, flat.shape[1] // _PIXELS)].float().contiguous()
    bits = picked.view(torch.int32).long()
    place = torch.arange(bits.shape[1], device=bits.device)
    return _mix(_mix(bits + _mix(place + 1)).sum(1) + seed)


def uniform(keys_B: Tensor, count: int) -> Tensor:
    """(B, count) numbers, uniform on (0, 1), that depend on the keys alone."""
    counter = torch.arange(1, count + 1, device=keys_B.device)
    bits = _mix(keys_B[:, None] + _mix(counter))
    return (((bits >> 11) & (2**53 - 1)).double() + 0.5) / 2**53


def normal(keys_B: Tensor, count: int) -> Tensor:
    """(B, count) standard normal numbers that depend on the keys alone (Box and Muller 1958)."""
    drawn = uniform(keys_B, 2 * count)
    return (-2 * drawn[:, :count].log()).sqrt() * (2 * torch.pi * drawn[:, count:]).cos()


def _mix(x: Tensor) -> Tensor:
    """The finalizer of splitmix64 (Steele et al. 2014), on int64 that wrap around."""
    x = x + (0x9E3779B97F4A7C15 - 2**64)
    x = (x ^ ((x >> 30) & (2**34 - 1))) * (0xBF58476D1CE4E5B9 - 2**64)
    x = (x ^ ((x >> 27) & (2**37 - 1))) * (0x94D049BB133111EB - 2**64)
    return x ^ ((x >> 31) & (2**33 - 1))


class Sensor:
    """Collects u of every gate and unit during one backward pass after another.

    Args:
        copied: units whose output the model changes in place, see `inspect_units`.
    """

    def __init__(self, copied: frozenset[str] = frozenset()) -> None:
        self.found: dict[str, list[Tensor]] = {}
        self._copied = copied

    def gate(self, name: str, gate_BC: Tensor, flat: Callable[[Tensor], Tensor]) -> None:
        """Catch the derivative of a gate; `flat` made it (B, C) out of the tensor that flows."""
        kept, done = gate_BC.detach(), False

        def catch(gradients: Sequence[Tensor | None], output: int) -> None:
            nonlocal done
            gradient = gradients[output]
            if not done and gradient is not None:
                done = True
                self._add(name, kept * _per_gate(gradient, kept, flat))

        for node, output in _edges(gate_BC):
            # `gate_BC` may be a view beside the path; the first node that fires is on the path
            node.register_prehook(lambda gradients, output=output: catch(gradients, output))

    def unit(self, name: str, output: Tensor) -> None:
        """Catch y * dz/dy of a module's output (B, C, *)."""
        if not output.requires_grad:
            raise InputError(
                f"unit {name!r}: its output does not depend on the image",
                why="autograd does not reach it",
                fix="leave this module out of the units",
            )
        kept = output.detach()
        if name in self._copied:
            kept = kept.clone()
        positions = tuple(range(2, output.dim()))

        def catch(gradient: Tensor) -> None:
            wide = torch.float64 if gradient.dtype == torch.float64 else torch.float32
            product = kept * gradient
            self._add(name, product.sum(positions, dtype=wide) if positions else product)

        output.register_hook(catch)  # type: ignore[no-untyped-call]

    def backward(self, z: Tensor, images: Tensor) -> dict[str, list[Tensor]]:
        """u (B, C) of each call of each gate and unit; `images` is where the graph begins."""
        self.found = {}
        torch.autograd.grad(z, images)
        return self.found

    def _add(self, name: str, u_BC: Tensor) -> None:
        self.found.setdefault(name, []).append(u_BC)


@contextmanager
def units_of(
    model: nn.Module, units: Sequence[str], see: Callable[[str, Tensor], None]
) -> Iterator[None]:
    """Call `see(name, output)` for each module in `units` in every forward.

    Raises:
        InputError: no such module, or an output that is no (B, C, *) tensor.
    """
    modules, handles = dict(model.named_modules()), []
    unknown = [name for name in units if name not in modules]
    if unknown:
        raise InputError(
            f"unit {unknown[0]!r}: the model has no such module",
            why=f"it has {len(modules)} modules, for example {list(modules)[-1]!r}",
            fix="name modules as model.named_modules() does",
        )

    def check(name: str, output: Any) -> None:
        if not isinstance(output, Tensor) or output.dim() < 2:
            kind = tuple(output.shape) if isinstance(output, Tensor) else type(output).__name__
            raise InputError(
                f"unit {name!r}: its output is no (B, C, ...) tensor",
                why=f"it is {kind}",
                fix="leave this module out of the units",
            )
        see(name, output)

    try:
        for name in units:
            hook = partial(_forward_hook, name, check)
            handles.append(modules[name].register_forward_hook(hook))
        yield
    finally:
        for handle in handles:
            handle.remove()


def _forward_hook(
    name: str, check: Callable[[str, Any], None], _module: nn.Module, _inputs: Any, output: Any
) -> None:
    check(name, output)


def inspect_units(
    model: nn.Module, units: Sequence[str], images: Tensor
) -> tuple[dict[str, int], frozenset[str]]:
    """Channels of each unit, and the units whose output has to be copied.

    That is where the model changes it in place by anything but a ReLU: what a ReLU sets to zero has
    a derivative of zero, so y * dz/dy is the same before and after.
    """
    seen: dict[str, tuple[Tensor, Tensor]] = {}

    def see(name: str, output: Tensor) -> None:
        seen[name] = (output, output.clone())

    with torch.no_grad(), units_of(model, units, see):
        model(images)
    silent = [name for name in units if name not in seen]
    if silent:
        raise InputError(
            f"unit {silent[0]!r}: the forward never calls this module",
            why="a unit gate needs an output to scale",
            fix="leave this module out of the units",
        )
    copied = {
        name
        for name, (now, before) in seen.items()
        if not torch.equal(now, before) and not torch.equal(now, before.relu())
    }
    return {name: out.shape[1] for name, (out, _) in seen.items()}, frozenset(copied)


@dataclass(frozen=True)
class Coupling:
    """The members of one dependency group: name, channels that take part, unit of each of them."""

    width: int
    members: tuple[tuple[str, Tensor, Tensor], ...]

    def combine(self, found: Mapping[str, Tensor]) -> Tensor:
        """u (B, width) of the group: the sum over its members, before anything is squared."""
        first = found[self.members[0][0]]
        total = first.new_zeros(len(first), self.width)
        for name, channels, units in self.members:
            total.index_add_(1, units, found[name][:, channels])
        return total


def resolve_couplings(
    couplings: Couplings, sizes: Mapping[str, int], device: torch.device
) -> dict[str, Coupling]:
    """Couplings with every index written out; `sizes` are the channels of the gates and units.

    Raises:
        InputError: a member that is not collected, or an index that does not fit it.
    """
    resolved = {}
    for group, members in couplings.items():
        rows = []
        for name, index in members:
            if name not in sizes or (index is not None and len(index) != sizes[name]):
                raise InputError(
                    f"coupling {group!r}: member {name!r} does not fit",
                    why=f"{name!r} has {sizes.get(name, 'no')} channels that are collected"
                    + ("" if index is None else f", the index {len(index)}"),
                    fix="name gates that run and modules in units, one index entry per channel",
                )
            unit = torch.arange(sizes[name]) if index is None else index.cpu()
            channels = (unit >= 0).nonzero()[:, 0]
            rows.append((name, channels.to(device), unit[channels].to(device)))
        width = max(int(units.max()) + 1 for _, _, units in rows)
        resolved[group] = Coupling(width, tuple(rows))
    return resolved


def _edges(gate_BC: Tensor) -> list[tuple[Node, int]]:
    """The nodes through which the derivative of a gate can come, nearest first."""
    edges: list[tuple[Node, int]] = []
    node, output = gate_BC.grad_fn, gate_BC.output_nr
    while node is not None:
        edges.append((node, output))
        if not node.name().startswith(_VIEWS):
            break
        node, output = node.next_functions[0]
    return edges


def _per_gate(gradient: Tensor, gate_BC: Tensor, flat: Callable[[Tensor], Tensor]) -> Tensor:
    """The derivative of the tensor that the gate was taken from, as (B, C)."""
    expanded = gradient.numel() > gate_BC.numel() and gradient.shape[:2] == gate_BC.shape
    return gradient.flatten(2).sum(2) if expanded else flat(gradient)
