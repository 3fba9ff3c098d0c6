"""Closed-form recovery: the consumers of cut channels learn to do without them, without labels.

In the order of the forward pass every layer that lost inputs is fitted by ridge regression, so
that it gives what the dense parent gives at the channels that are left. Inputs come from the cut
network as far as it is refitted, so that each layer also makes up for the errors before it.
`forwards` lets every batch wait in front of a layer, `targets` says what to reproduce, `squares`
solves. Formulas, costs and failure modes: docs/refit.md.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from seprune.errors import InputError
from seprune.plan import PruningPlan
from seprune.processes import resolve_device
from seprune.progress import Track, silent
from seprune.refit.forwards import Forward
from seprune.refit.squares import Normal, Product, observe
from seprune.refit.targets import Target, find_targets
from seprune.taps import Tap
from seprune.statistics.batches import open_batches


@dataclass(frozen=True)
class RefitOptions:
    """How to refit.

    Attributes:
        images: how many images of the loader are used.
        ridge: weight of the distance to the sliced weights, relative to the mean square of an
            input.
        rows: output positions per layer that enter its regression, spread over all images.
        held: bytes that waiting forwards may hold; early layers of large images, where this is
            too little, cost a pass each.
        gram: bytes of one matrix of normal equations; wider layers are solved in blocks of inputs.
        device: `auto`, `cpu`, `cuda`, ...
    """

    images: int = 2048
    ridge: float = 1e-3
    rows: int = 1 << 17
    held: int = 4 << 30
    gram: int = 512 << 20
    device: str = "auto"
    compensate: bool = True


@dataclass(frozen=True)
class Refitted:
    """The refitted network.

    Attributes:
        layers: those that have new weights, in the order of the forward pass.
        skipped: those that kept their sliced weights: layer -> reason.
        errors: layer -> (before, after): mean squared error of its output on the calibration
            images, relative to the variance of the target.
    """

    model: nn.Module
    layers: tuple[str, ...]
    skipped: Mapping[str, str]
    errors: Mapping[str, tuple[float, float]]


_BATCH = 128  # images per forward
_CHUNK = 64 << 20  # bytes of unfolded inputs at a time
_SWEEPS = 4  # over the blocks of a layer whose normal equations do not fit at once


def refit(
    parent: nn.Module,
    pruned: nn.Module,
    plan: PruningPlan,
    loader: Iterable[Any],
    *,
    options: RefitOptions | None = None,
    track: Track = silent,
) -> Refitted:
    """Fit what `prune(parent, plan)` returned to its parent on calibration images.

    Args:
        loader: batches of images, or of (images, labels); labels are not used.

    Raises:
        InputError: no images, or a `pruned` that the plan does not lead to.
        EnvironmentFault: no such device.
    """
    options = options or RefitOptions()
    device = resolve_device(options.device)
    images = _take(loader, options.images)
    model = copy.deepcopy(pruned)
    home, modes = _place(model), {m: m.training for m in model.modules()}
    teacher = copy.deepcopy(parent).to(device).eval()
    model.to(device).eval()
    targets, skipped = find_targets(teacher, plan, images[:2].to(device))
    errors: dict[str, tuple[float, float]] = {}
    with torch.no_grad(), _Forwards(teacher, model, images, targets) as forwards:
        work = _Work(model, forwards, options, len(images))
        for target in track(targets, label="refitting", total=len(targets), unit="layers"):
            try:
                errors[target.layer] = work.refit(target)
            except ArithmeticError as error:
                skipped[target.layer] = str(error)
            forwards.forget(target)
    for module, mode in modes.items():
        module.training = mode
    return Refitted(model.to(home), tuple(errors), skipped, errors)


def _take(loader: Iterable[Any], count: int) -> Tensor:
    """The first `count` images, on the CPU."""
    parts: list[Tensor] = []
    _, pairs = open_batches(loader, torch.device("cpu"), 0, 1)
    for images, _ in pairs:
        parts.append(images[: count - sum(map(len, parts))])
        if sum(map(len, parts)) >= count:
            break
    if not parts:
        raise InputError(
            "no images to refit on",
            why="the loader gives empty batches, or images=0 was asked for",
            fix="give a loader with calibration images",
        )
    return torch.cat(parts)


def _place(model: nn.Module) -> torch.device:
    return next((p.device for p in model.parameters()), torch.device("cpu"))


class _Forwards:
    """The forwards of both networks, batch by batch, as far as they have come."""

    def __init__(
        self, teacher: nn.Module, model: nn.Module, images: Tensor, targets: Sequence[Target]
    ) -> None:
        self.teacher, self.model, self.images, self.targets = teacher, model, images, targets
        self.waiting: list[tuple[Forward, Forward]] = []

    def __enter__(self) -> _Forwards:
        return self

    def __exit__(self, *_: Any) -> None:
        self.stop()

    def at(self, target: Target, *, wait: bool) -> Iterator[tuple[Forward, Forward]]:
        """(teacher, model) of every batch; without `wait` they start anew and end afterwards."""
        batches = self.images.split(_BATCH)
        if wait:
            for number, batch in enumerate(batches):
                if number == len(self.waiting):
                    self.waiting.append(self.start(batch, self.targets))
                yield self.waiting[number]
            return
        self.stop()
        for batch in batches:
            pair = self.start(batch, [target])
            try:
                yield pair
            finally:
                for forward in pair:
                    forward.stop()

    def start(self, batch: Tensor, targets: Sequence[Target]) -> tuple[Forward, Forward]:
        dense, cut, keep = {}, {}, {}
        for t in targets:
            dense[f"{t.layer}:y"] = Tap(t.layer, 0, "output", 0)
            cut[f"{t.layer}:x"] = Tap(t.layer, 0, "input", 0)
            if t.branch is not None:
                dense[f"{t.layer}:branch"] = t.branch
            if t.other is not None:
                dense[f"{t.layer}:other"] = t.other
                cut[f"{t.layer}:other"] = t.other
            for name in ("y", "branch", "other"):
                keep[f"{t.layer}:{name}"] = t.dim, t.keep
        whole = {name: (0, None) for name in cut if name.endswith(":other")}
        batch = batch.to(_place(self.model))
        return Forward(self.teacher, batch, dense, keep), Forward(self.model, batch, cut, whole)

    def forget(self, target: Target) -> None:
        names = [f"{target.layer}:{name}" for name in ("x", "y", "branch", "other")]
        for pair in self.waiting:
            for forward in pair:
                forward.forget(names)

    def stop(self) -> None:
        while self.waiting:
            for forward in self.waiting.pop():
                forward.stop()


class _Work:
    def __init__(
        self, model: nn.Module, forwards: _Forwards, options: RefitOptions, images: int
    ) -> None:
        self.model, self.forwards, self.options, self.images = model, forwards, options, images

    def refit(self, target: Target) -> tuple[float, float]:
        """Give one layer its new weights; returns its errors before and after."""
        layer: Any = self.model.get_submodule(target.layer)
        norm: Any = self.model.get_submodule(target.norm) if target.norm else None
        old = layer.weight.detach().clone()
        blocks = self.blocks(layer)
        errors = []
        import os; R=int(os.environ.get("RECT","0"))
        for it,block in enumerate(blocks * ((_SWEEPS if len(blocks) > 1 else 1)+(R if target.rectified and target.other is None else 0))):
            self.masked= it>0
            equations = self.collect(target, layer, block)
            groups = equations.gram.shape[0]
            pull = _by_group(layer.weight[:, block] - old[:, block], groups)
            intercept = layer.bias is not None or norm is not None
            found = equations.solve(self.options.ridge, pull, intercept=intercept)
            errors += [found.before, found.after]
            change = found.change.mT.reshape_as(layer.weight[:, block])
            if not bool(change.isfinite().all()):
                raise ArithmeticError("its new weights are not finite")
            layer.weight[:, block] += change
            shift = found.shift.reshape(-1).to(old.dtype)
            if layer.bias is not None:
                layer.bias += shift
            elif norm is not None:
                norm.running_mean -= shift
        return errors[0], errors[-1]

    def blocks(self, layer: Any) -> list[slice]:
        """Slices of the input channels whose normal equations fit into `options.gram`."""
        inputs, kernel = layer.weight.shape[1], layer.weight[0, 0].numel()
        groups = getattr(layer, "groups", 1)
        size = max(1, int((self.options.gram / 8 / groups) ** 0.5) // kernel)
        return [slice(i, min(i + size, inputs)) for i in range(0, inputs, size)]

    def collect(self, target: Target, layer: Any, block: slice) -> Normal:
        """The normal equations of one block of inputs over all images."""
        groups, kernel = getattr(layer, "groups", 1), layer.weight[0, 0].numel()
        width = len(range(*block.indices(layer.weight.shape[1]))) * kernel
        sums = Normal.empty(groups, width, len(layer.weight) // groups, layer.weight.device)
        wait = 2 * target.held * self.images <= self.options.held
        slopes, first = None, 0
        for dense, cut in self.forwards.at(target, wait=wait):
            x, y = cut.take(f"{target.layer}:x"), dense.take(f"{target.layer}:y")
            if target.branch is not None:
                names = [f"{target.layer}:{n}" for n in ("branch", "other")]
                branch = dense.take(names[0])
                slopes = _slopes(y, branch, target.dim) if slopes is None else slopes
                V = branch
                if target.other is not None:
                    other=dense.take(names[1])
                    V = V+other
                    if self.options.compensate: y = y + (other - cut.take(names[1])) * slopes
            product = observe(layer, x)
            if product is None:
                raise ArithmeticError("its output is not its weight times its input")
            if self.masked:
                from seprune.refit.squares import observe as _o
                zq = layer(x)
                Vq = V + (zq - y) / slopes.where(slopes != 0, slopes.new_tensor(1e9))
                y = torch.where((V > 0) | (slopes == 0), y, torch.where(Vq > 0, zq - Vq * slopes, zq))
            y = y if y.dim() == product.output.dim() else y.unsqueeze(2)
            self.add(sums, product, y, block, first)
            first += len(x)
        return sums

    def add(self, sums: Normal, call: Product, y: Tensor, block: slice, first: int) -> None:
        """Add one batch, in chunks, at some positions of every image."""
        target, residual = call.rows(y), call.rows(y - call.output)
        positions = target.shape[-1]
        some = min(positions, -(-self.options.rows // self.images))
        chunk = max(1, _CHUNK // (4 * positions * sums.gram.shape[0] * sums.gram.shape[1]))
        for start in range(0, len(y), chunk):
            part = slice(start, start + chunk)
            x = replace(call, input=call.input[part]).columns(block)
            rows = (x, residual[part], target[part])
            if some < positions:
                index = _positions(positions, some, range(first + start, first + start + len(x)))
                index = index.to(x.device)[:, None, None]
                rows = tuple(r.gather(3, index.expand(*r.shape[:3], -1)) for r in rows)
            sums.add(*rows)


def _by_group(weight: Tensor, groups: int) -> Tensor:
    """(groups, K, outputs per group), float64."""
    return weight.flatten(1).unflatten(0, (groups, -1)).mT.double()


def _positions(total: int, some: int, images: range) -> Tensor:
    """(images, some): every image shows the next positions of one random order."""
    order = torch.randperm(total, generator=torch.Generator().manual_seed(0))
    turns = torch.tensor(list(images))[:, None] * some + torch.arange(some)
    return order[turns % total]


def _slopes(y: Tensor, branch: Tensor, dim: int) -> Tensor:
    """One over the factor with which each channel of `y` enters `branch`; 0 where it is not one."""
    dims = [d for d in range(y.dim()) if d != dim % y.dim()]
    a, b = y - y.mean(dims, keepdim=True), branch - branch.mean(dims, keepdim=True)
    both, own, other = ((p * q).sum(dims, keepdim=True) for p, q in ((a, b), (a, a), (b, b)))
    alike = both.square() > 0.25 * own * other
    return torch.where(alike, own / both, torch.zeros_like(own))
