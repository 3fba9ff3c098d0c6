"""Closed-form recovery: the consumers of cut channels learn to do without them, without labels.

In the order of the forward pass every layer that lost inputs is fitted by ridge regression, so
that it gives what the dense parent gives at the channels that are left. Inputs come from the cut
network as far as it is refitted, so that each layer also makes up for the errors before it.
`forwards` lets every batch wait in front of a layer, `targets` says what to reproduce, `squares`
solves. Formulas, costs and failure modes: docs/refit.md.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from seprune.errors import InputError
from seprune.graph.trace import record
from seprune.pruning.plan import PruningPlan
from seprune.recovery.refit.least_squares import Normal, Product, observe
from seprune.recovery.refit.paused_forwards import Forwards
from seprune.recovery.refit.targets import Target, aim, find_targets
from seprune.runtime.distributed import first, resolve_device, same_as_first, united
from seprune.runtime.inference import device_of
from seprune.runtime.progress import Track, silent
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
    rows: int = 1 << 16
    held: int = 4 << 30
    gram: int = 512 << 20
    device: str = "auto"


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


_CHUNK = 64 << 20  # bytes of unfolded inputs at a time
_TURNS = 5  # for a layer before a ReLU, or one whose normal equations do not fit at once
_ENOUGH = 0.98  # a turn that leaves more than this part of the error is the last one


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

    Under `torchrun` every process calls it; batches are shared, the normal equations summed.

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
    home, modes = device_of(model), {m: m.training for m in model.modules()}
    teacher = copy.deepcopy(parent).to(device).eval()
    model.to(device).eval()
    targets, skipped = find_targets(teacher, plan, images[:2].to(device))
    record(model, images[:2].to(device))
    _check(model, targets, teacher)
    errors: dict[str, tuple[float, float]] = {}
    with united(), torch.no_grad(), Forwards(teacher, model, images, targets) as forwards:
        work = _Work(model, forwards, options)
        for target in track(targets, label="refitting", total=len(targets), unit="layers"):
            try:
                errors[target.layer] = work.refit(target)
            except ArithmeticError as error:
                skipped[target.layer] = str(error)
            forwards.forget(target)
        same_as_first(model)
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


def _check(model: nn.Module, targets: Sequence[Target], teacher: nn.Module) -> None:
    for target in targets:
        layer, dense = (dict(m.named_modules()).get(target.layer) for m in (model, teacher))
        have = len(layer.weight) if hasattr(layer, "weight") else 0  # type: ignore[union-attr]
        want = len(dense.weight if target.keep is None else target.keep)  # type: ignore[union-attr]
        if have != want:
            raise InputError(
                f"the pruned network does not fit the plan: layer '{target.layer}'",
                why=f"the plan keeps {want} of its outputs, the network has {have}",
                fix="refit what prune(parent, plan) returned",
                code="plan",
            )


class _Work:
    """Solves one layer after the other."""

    def __init__(self, model: nn.Module, forwards: Forwards, options: RefitOptions) -> None:
        self.model, self.forwards, self.options = model, forwards, options

    def refit(self, target: Target) -> tuple[float, float]:
        """Give one layer its new weights; returns its errors before and after."""
        layer: Any = self.model.get_submodule(target.layer)
        owners = [layer, self.model.get_submodule(target.norm)] if target.norm else [layer]
        state = [copy.deepcopy(owner.state_dict()) for owner in owners]
        try:
            return self.solve(target, layer)
        except ArithmeticError:
            for owner, held in zip(owners, state):
                owner.load_state_dict(held)
            raise

    def solve(self, target: Target, layer: Any) -> tuple[float, float]:
        """`refit`, without a way back."""
        old, blocks = layer.weight.detach().clone(), self.blocks(layer)
        errors: list[float] = []
        known: Normal | None = None
        for turn in range(_TURNS if len(blocks) > 1 or target.rectified else 1):
            if turn and errors[-1] > _ENOUGH * errors[-2 * len(blocks)]:
                break
            for block in blocks:
                known = self.collect(target, layer, block, None if len(blocks) > 1 else known)
                pull = _by_group(layer.weight[:, block] - old[:, block], len(known.gram))
                intercept = layer.bias is not None or target.norm is not None
                found = known.solve(self.options.ridge, pull, intercept=intercept)
                errors += [found.before, found.after]
                layer.weight[:, block] += found.change.mT.reshape_as(layer.weight[:, block])
                self.shift(target, layer, found.shift.reshape(-1))
        return errors[0], errors[-1]

    def shift(self, target: Target, layer: Any, by: Tensor) -> None:
        """Raise the output of a layer, or of the norm after it, by an intercept."""
        if layer.bias is not None:
            layer.bias += by
        elif target.norm is not None:
            norm: Any = self.model.get_submodule(target.norm)
            norm.running_mean -= by

    def shifted(self, target: Target, layer: Any) -> Tensor | None:
        """What `shift` has added outside of the layer."""
        if layer.bias is not None or target.norm is None:
            return None
        dense, cut = (m.get_submodule(target.norm) for m in (self.forwards.teacher, self.model))
        mean: Any = dense.running_mean
        kept = mean if target.keep is None else mean[target.keep.to(mean.device)]
        return kept - cut.running_mean  # type: ignore[no-any-return]

    def blocks(self, layer: Any) -> list[slice]:
        """Slices of the input channels whose normal equations fit into `options.gram`."""
        inputs, kernel = layer.weight.shape[1], layer.weight[0, 0].numel()
        groups = getattr(layer, "groups", 1)
        size = max(1, int((self.options.gram / 8 / groups) ** 0.5) // kernel)
        return [slice(i, min(i + size, inputs)) for i in range(0, inputs, size)]

    def collect(self, target: Target, layer: Any, block: slice, known: Normal | None) -> Normal:
        """The normal equations of one block of inputs; `known`: those of earlier weights."""
        groups, kernel = getattr(layer, "groups", 1), layer.weight[0, 0].numel()
        width = len(range(*block.indices(layer.weight.shape[1]))) * kernel
        sums = known.again() if known else Normal.empty(
            groups, width, len(layer.weight) // groups, layer.weight.device)  # fmt: skip
        slope, offset = None, self.shifted(target, layer)
        wait = 2 * target.held * self.forwards.own <= self.options.held
        for number, seen, x in self.forwards.at(target, wait=wait):
            call = observe(layer, x)
            if call is None:
                raise ArithmeticError("its output is not its weight times its input")
            slope = self.slope(seen, target.dim) if slope is None else slope
            made = call.output.reshape_as(seen["y"])
            if offset is not None:
                made = made + offset.reshape(slope.shape)
            wanted = aim(target, made, seen, slope)
            rows = (call.rows(v.reshape_as(call.output)) for v in (wanted - made, wanted))
            self.add(sums, call, block, rows, number)
        return sums.over_processes() if self.forwards.shared else sums

    def slope(self, seen: Mapping[str, Tensor], dim: int) -> Tensor:
        """`_slope` of the very first batch, which is the first process's."""
        if not self.forwards.shared:
            return _slope(seen, dim)
        return first(lambda: _slope(seen, dim).cpu()).to(seen["y"].device)

    def add(
        self, sums: Normal, call: Product, block: slice, rows: Iterable[Tensor], number: int
    ) -> None:
        """Add one batch, in chunks, at some positions of every image; `number`: of the first."""
        residual, target = rows
        positions, images = target.shape[-1], self.forwards.images
        some = min(positions, -(-self.options.rows // images))
        chunk = max(1, _CHUNK // (4 * positions * sums.sums.numel()))
        for start in range(0, len(target), chunk):
            part = slice(start, start + chunk)
            parts = (call.columns(part, block), residual[part], target[part])
            if some < positions:
                numbers = range(number + start, number + start + len(parts[0]))
                index = _positions(positions, some, numbers).to(target.device)[:, None, None]
                parts = tuple(p.gather(3, index.expand(*p.shape[:3], -1)) for p in parts)  # type: ignore[assignment]
            sums.add(*parts)


def _by_group(weight: Tensor, groups: int) -> Tensor:
    """(groups, K, outputs per group), float64."""
    return weight.reshape(groups, len(weight) // groups, -1).mT.double()


def _positions(total: int, some: int, images: range) -> Tensor:
    """(images, some): every image shows the next positions of one random order."""
    order = torch.randperm(total, generator=torch.Generator().manual_seed(0))
    turns = torch.tensor(list(images))[:, None] * some + torch.arange(some)
    return order[turns % total]


def _slope(seen: Mapping[str, Tensor], dim: int) -> Tensor:
    """The factor (1, C, 1, ...) with which each channel of y enters the branch; 0: it does not."""
    y, branch = seen["y"], seen.get("branch")
    dims = [d for d in range(y.dim()) if d != dim % y.dim()]
    a = y - y.mean(dims, keepdim=True)
    if branch is None:
        return torch.zeros_like(y.mean(dims, keepdim=True))
    b = branch - branch.mean(dims, keepdim=True)
    both, own, other = ((p * q).sum(dims, keepdim=True) for p, q in ((a, b), (a, a), (b, b)))
    alike = (both.square() > 0.25 * own * other) & (other > 1e-6 * other.mean())
    return torch.where(alike, both / own, torch.zeros_like(own))
