"""What each channel does to the network's answer: u = gate * dz/dgate, one number per sample.

z is summed over samples, so that one backward pass gives every sample's own derivative. Channels
that no gate can speak for get a unit gate, one that multiplies by 1: there u is the sum over
positions of y * dz/dy. No derivative of a parameter is ever computed.
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

from seprune.errors import InputError
from seprune.graph.hooks import tapped
from seprune.graph.tap_points import Tap

Gradients = Literal["none", "labels", "smoothed", "sampled", "logits", "weights"]
Couplings = Mapping[str, Sequence[tuple[str, Tensor | None]]]

_PIXELS = 1024  # how many values of an image name it


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


@dataclass(frozen=True)
class UnitGate:
    """A factor of 1 at a tap, for the channels along one dimension."""

    tap: Tap
    channel_dim: int
    channels: int


class Sensor:
    """Collects u of every gate and unit during one backward pass after another.

    Attributes:
        images: how many there are in this pass; the frames of an image are added up.

    Args:
        copied: units whose output the model changes in place, see `inspect_units`.
    """

    def __init__(self, copied: frozenset[str] = frozenset()) -> None:
        self.found: dict[str, list[Tensor]] = {}
        self.images = 1
        self._copied = copied
        self._gates: list[tuple[str, Tensor]] = []
        self._starts: list[Tensor] = []  # where a graph begins anew

    def gate(self, name: str, gate_BC: Tensor) -> None:
        """Ask for the derivative of a gate that lies on the path; zero where none can come."""
        if gate_BC.requires_grad:
            self._gates.append((name, gate_BC))

    def unit(self, name: str, output: Tensor) -> None:
        """Catch y * dz/dy of a module's output (B, C, *).

        Raises:
            InputError: no derivative reaches it.
        """
        if not output.requires_grad:
            raise InputError(
                f"unit {name!r}: its output does not depend on the image",
                why="autograd does not reach it",
                fix="leave this module out of the units",
            )
        self._catch(name, output, 0, 1)

    def tapped(self, name: str, unit: UnitGate, tensor: Tensor) -> Tensor | None:
        """Catch y * dz/dy of a tensor; of one reader alone where the tap shows it to one."""
        if not tensor.is_floating_point():
            return None
        given = tensor
        if not tensor.requires_grad:  # what comes before it was detached
            self._starts.append(tensor.detach().requires_grad_())
            with torch.enable_grad():
                tensor = self._starts[-1].clone()
        elif unit.tap.kind in ("input", "argument"):
            tensor = tensor.view_as(tensor)
        self._catch(name, tensor, unit.tap.batch_dim, unit.channel_dim)
        return None if tensor is given else tensor

    def _catch(self, name: str, tensor: Tensor, batch_dim: int, channel_dim: int) -> None:
        kept = tensor.detach()
        if name in self._copied:
            kept = kept.clone()
        positions = [d for d in range(tensor.dim()) if d not in (batch_dim, channel_dim)]

        def catch(gradient: Tensor | None) -> None:
            if gradient is None:  # z does not depend on it
                return
            wide = torch.float64 if gradient.dtype == torch.float64 else torch.float32
            product = kept * gradient
            u = product.sum(positions, dtype=wide) if positions else product
            self._add(name, u if batch_dim < channel_dim else u.t())

        tensor.register_hook(catch)  # type: ignore[no-untyped-call]

    def backward(self, z: Tensor, inputs: Sequence[Tensor]) -> dict[str, list[Tensor]]:
        """u (B, C) of each call of each gate and unit; `inputs` are where the graph begins."""
        self.found = {}
        gates, starts = self._gates, self._starts
        self.forget()
        ends = [*inputs, *(gate_BC for _, gate_BC in gates), *starts]
        found = torch.autograd.grad(z, ends, allow_unused=True)
        for (name, gate_BC), gradient in zip(gates, found[len(inputs) :]):
            if gradient is not None:
                self._add(name, gate_BC.detach() * gradient)
        return self.found

    def forget(self) -> None:
        """Let go of what a forward pass has left, for one that did not come to its backward."""
        self._gates, self._starts = [], []

    def _add(self, name: str, u_BC: Tensor) -> None:
        if len(u_BC) != self.images:
            u_BC = self._of_images(name, u_BC)
        self.found.setdefault(name, []).append(u_BC)

    def _of_images(self, name: str, rows: Tensor) -> Tensor:
        """The sums of each image's rows: its frames, or its boxes, of which there may be none."""
        if not len(rows) or self.images == 1:
            return rows.sum(0).expand(self.images, -1)
        if len(rows) % self.images:
            raise InputError(
                f"{name!r} has {len(rows)} rows for {self.images} images",
                why="rows of a batch can be told apart only where every image has as many",
                fix="give batches of one image, or the task detection",
            )
        return rows.reshape(self.images, -1, rows.shape[-1]).sum(1)


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
    model: nn.Module,
    units: Sequence[str],
    inputs: Any,
    *,
    taps: Mapping[str, UnitGate] | None = None,
) -> tuple[dict[str, int], frozenset[str]]:
    """Channels of each unit, and the units whose tensor has to be copied.

    That is where the model changes it in place by anything but a ReLU: what a ReLU sets to zero has
    a derivative of zero, so y * dz/dy is the same before and after. Where one reader alone counts,
    a ReLU behind it changes what that reader saw.
    """
    seen: dict[str, tuple[Tensor, Tensor]] = {}
    taps = taps or {}

    def see(name: str, output: Tensor) -> None:
        seen[name] = (output, output.clone())

    at_taps = [(unit.tap, partial(see, name)) for name, unit in taps.items()]
    with torch.no_grad(), units_of(model, units, see), tapped(model, at_taps):
        model(*inputs) if isinstance(inputs, tuple) else model(inputs)
    silent = [name for name in units if name not in seen]
    if silent:
        raise InputError(
            f"unit {silent[0]!r}: the forward never calls this module",
            why="a unit gate needs an output to scale",
            fix="leave this module out of the units",
        )
    alone = {name for name, unit in taps.items() if unit.tap.kind in ("input", "argument")}
    copied = {
        name
        for name, (now, before) in seen.items()
        if not torch.equal(now, before) and (name in alone or not torch.equal(now, before.relu()))
    }
    sizes = {name: seen[name][0].shape[1] for name in units}
    return sizes | {name: unit.channels for name, unit in taps.items()}, frozenset(copied)


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
