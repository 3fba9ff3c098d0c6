"""One layer fitted to its target: rows collected, normal equations solved, turn by turn."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from seprune.recovery.refit.forwards import BLOCK, Forwards
from seprune.recovery.refit.least_squares import NormalEquations, Solution, product
from seprune.recovery.refit.options import RefitOptions
from seprune.recovery.refit.products import MatrixProduct, WeightLayout, capture, observe
from seprune.recovery.refit.targets import Target, Wanted, slope_of
from seprune.runtime.distributed import first

_CHUNK_ROWS = 4096  # at least, where there are so many
_TURNS = 5  # for a layer before a ReLU, or one whose normal equations do not fit at once
_ENOUGH = 0.98  # a turn that leaves more than this part of the error is the last one


Sample = tuple[int, Tensor, Mapping[str, Tensor]]


@dataclass(frozen=True)
class Limits:
    """Bytes for forwards that wait, for patches kept between turns, for new patches at a time."""

    wait: int
    kept: int
    chunk: int

    @classmethod
    def of(cls, memory: int) -> Limits:
        """Shares of a memory budget."""
        return cls(memory // 2, memory // 8, min(64 << 20, memory // 16))


@dataclass(frozen=True)
class SampledRows:
    """The sampled rows of some images.

    Attributes:
        image: number of the first one.
        patches: (conv groups, rows, columns) of the cut network.
    """

    image: int
    patches: Tensor
    wanted: Wanted


class LayerFit:
    """Gives one layer of the cut network new weights."""

    def __init__(
        self,
        forwards: Forwards,
        target: Target,
        *,
        options: RefitOptions,
        limits: Limits,
    ) -> None:
        self.forwards, self.target, self.options = forwards, target, options
        model = forwards.model
        self.layer: Any = model.get_submodule(target.layer)
        self.layout, self.checked = WeightLayout.of(self.layer), False
        self.norm: Any = model.get_submodule(target.norm) if target.norm else None
        self.limits = limits
        self.batches = forwards.batches
        networks = 1 if forwards.parent.at_once else 2
        self.wait = networks * target.alive * self.batches.own <= limits.wait
        self.offset = self.slope = self.centre = None  # type: Any
        self.cache: list[SampledRows] | None = None
        self.strange: int | None = None  # the first image with a value that is not finite

    def fit(self) -> tuple[float, float]:
        """New weights, or the old ones and an error; returns the errors before and after.

        Raises:
            ArithmeticError: the layer cannot be refitted; says why.
        """
        owners = [self.layer, self.norm] if self.norm is not None else [self.layer]
        state = [copy.deepcopy(owner.state_dict()) for owner in owners]
        try:
            errors = self.solve()
            if not all(bool(t.isfinite().all()) for o in owners for t in o.state_dict().values()):
                raise ArithmeticError(f"its new weights are beyond {self.layer.weight.dtype}")
            return errors
        except ArithmeticError as error:
            for owner, before in zip(owners, state):
                owner.load_state_dict(before)
            image = self.batches.smallest(self.strange)
            if image is None:
                raise
            raise ArithmeticError(f"its values are not finite for image {image}") from error

    def solve(self) -> tuple[float, float]:
        """`fit`, without a way back."""
        self.offset = self.shifted()
        old, errors = self.layer.weight.detach().clone(), list[float]()
        blocks = self.blocks()
        several = len(blocks) > 1
        known: NormalEquations | None = None
        scale: float | None = None  # one for all turns: the target of a layer before a ReLU moves
        for turn in range(_TURNS if several or self.target.rectified else 1):
            if turn and errors[-1] > _ENOUGH * errors[-2 * len(blocks)]:
                break
            for block in blocks:
                known = self.collect(block, None if several else known)
                pull = self.layout.matrix(self.layer.weight - old)[:, :, block]
                found = known.solve(
                    self.options.ridge, pull.flatten(1, 2).double(), intercept=self.intercept
                )
                scale = scale or found.spread
                errors += [found.before / scale, found.after / scale]
                self.change(block, found.change)
                self.shift(self.moved(found, block).reshape(-1).to(old.dtype))
        return errors[0], errors[-1]

    def moved(self, found: Solution, block: slice) -> Tensor:
        """The change of the intercept for inputs that are not centred."""
        if self.centre is None:
            return found.shift
        centre = self.columns(self.centre, block).double()
        return found.shift - (centre @ found.change)[:, 0]

    def columns(self, patches: Tensor, block: slice) -> Tensor:
        """Those columns that belong to a block of inputs."""
        groups, count, _ = patches.shape
        part = patches.reshape(groups, count, self.layout.kernel, -1)[..., block]
        return patches if part.numel() == patches.numel() else part.flatten(2)

    @property
    def intercept(self) -> bool:
        """Whether there is a place for one."""
        return self.layer.bias is not None or self.norm is not None

    def change(self, block: slice, by: Tensor) -> None:
        """Add to the weights of a block of inputs."""
        matrix = self.layout.matrix(self.layer.weight).clone()
        part = matrix[:, :, block]
        part += by.reshape_as(part)
        self.layer.weight.copy_(self.layout.weight(matrix, self.layer.weight))

    def shift(self, by: Tensor) -> None:
        """Raise the output of the layer, or of the norm after it, by an intercept."""
        if self.layer.bias is not None:
            self.layer.bias += by
        elif self.norm is not None:
            self.norm.running_mean -= by
            self.offset = self.offset + by

    def shifted(self) -> Tensor | None:
        """What `shift` adds outside of the layer: the parent's mean less the present one."""
        if self.layer.bias is not None or self.norm is None:
            return None
        mean: Any = self.forwards.parent.model.get_submodule(self.target.norm or "").running_mean
        keep = self.target.keep
        kept = mean if keep is None else mean[keep.to(mean.device)]
        return kept - self.norm.running_mean  # type: ignore[no-any-return]

    def blocks(self) -> list[slice]:
        """Slices of the input channels whose normal equations fit into `options.gram`."""
        groups, kernel, inputs = self.layout.groups, self.layout.kernel, self.layout.inputs
        size = max(1, int((self.options.gram / 8 / groups) ** 0.5) // kernel)
        return [slice(i, min(i + size, inputs)) for i in range(0, inputs, size)]

    def collect(self, block: slice, known: NormalEquations | None) -> NormalEquations:
        """The normal equations of one block of inputs; `known`: those of earlier weights."""
        matrix = self.layout.matrix(self.layer.weight)
        groups, kernel, _, outputs = matrix.shape
        width = kernel * len(range(*block.indices(matrix.shape[2])))
        sums = known.again() if known else NormalEquations.empty(
            groups, width, outputs, matrix.device)  # fmt: skip
        matrix = matrix.flatten(1, 2)
        for rows in self.rows():
            self.add(sums, rows, matrix, block)
        return sums.over_processes() if self.batches.shared else sums

    def add(self, sums: NormalEquations, rows: SampledRows, matrix: Tensor, block: slice) -> None:
        """Add some rows to the normal equations."""
        x = rows.patches
        weight = matrix.to(x.dtype).mT.contiguous()  # (groups, outputs, K): twice as fast this way
        made = product(weight, x.mT)
        if self.centre is not None:
            made += weight @ self.centre.mT
        bias = self.offset if self.layer.bias is None else self.layer.bias
        if bias is not None:
            made += bias.reshape(len(made), -1, 1)
        target = rows.wanted.given(made.flatten(0, 1)).reshape_as(made)
        sums.add(self.columns(x, block), target - made, target)

    def rows(self) -> Iterator[SampledRows]:
        """All rows of this process; kept for the next turn where they fit into memory."""
        if self.cache is not None:
            yield from self.cache
            return
        kept: list[SampledRows] | None = []
        size = 0
        for image, patches, seen in self.sloped(joined(self.samples())):
            rows = SampledRows(
                image, patches, Wanted.of(self.target, seen, self.slope.to(patches.dtype))
            )
            size += patches.numel() * patches.element_size()
            kept = kept if kept is not None and size <= self.limits.kept else None
            if kept is not None:
                kept.append(rows)
            yield rows
        self.cache = kept

    def sloped(self, samples: Iterator[Sample]) -> Iterator[Sample]:
        """`samples`, after the slope was measured on those of the first images."""
        early: list[Sample] = []
        for sample in samples if self.slope is None else ():
            early.append(sample)
            if sample[0] // BLOCK != early[0][0] // BLOCK:
                break
        if early:
            block = early[0][0] // BLOCK
            of_block = [seen for image, _, seen in early if image // BLOCK == block]
            names = ("y", "branch") if self.target.branch else ("y",)
            both = {n: torch.cat([seen[n] for seen in of_block], 1) for n in names}
            self.slope = self.common(slope_of(both))
        yield from early
        del early
        yield from samples

    def samples(self) -> Iterator[Sample]:
        """The first image's number, patches and what the parent shows, chunk by chunk."""
        for numbers, seen, x in self.forwards.at(self.target, wait=self.wait):
            if not self.checked:
                call = observe(self.layer, x[:2])
                if call is None or not self.layout.fits(call):
                    raise ArithmeticError("its output is not its weight times its input")
                self.checked = True
            yield from self.cut_out(numbers, capture(self.layer, x), seen)

    def cut_out(
        self, numbers: tuple[int, int], call: MatrixProduct, seen: Mapping[str, Tensor]
    ) -> Iterator[Sample]:
        """The sampled rows of one batch, in chunks of bounded size."""
        (start, stop), samples = numbers, len(call.input)
        index = (
            self.batches.sampling(self.target)
            .index(call.positions, samples, first=start, images=stop - start)
            .to(call.input.device)
        )
        some = index.shape[1]
        if seen["y"].shape[1] != samples * some:
            raise ArithmeticError("its output has another shape than that of the parent")
        width = self.layout.groups * self.layout.kernel * self.layout.inputs
        step = max(1, self.limits.chunk // (4 * some * width))
        for first_one in range(0, samples, step):
            part = slice(first_one, min(first_one + step, samples))
            patches = self.widened(call.images(part).patches(index[part]))
            own = slice(part.start * some, part.stop * some)
            parts = {name: v[:, own].to(patches.dtype) for name, v in seen.items()}
            number = start + part.start * (stop - start) // samples
            self.look(number, patches, parts, each=some * samples // (stop - start))
            yield number, self.centred(patches), parts

    def look(self, number: int, patches: Tensor, seen: Mapping[str, Tensor], *, each: int) -> None:
        """Note the first image whose inputs, or what its target is made of, are not finite.

        Args:
            number: of the first image.
            each: rows of one image.
        """
        if self.strange is None:
            sums = patches.sum((0, 2)) + sum(values.sum(0) for values in seen.values())
            if not bool(sums.isfinite().all()):
                self.strange = number + int((~sums.isfinite()).nonzero()[0]) // each

    def widened(self, patches: Tensor) -> Tensor:
        """Patches in the precision of the products: of networks in half precision not their own."""
        if self.options.precision == "float64":
            return patches.double()
        return patches.float() if patches.dtype in (torch.float16, torch.bfloat16) else patches

    def centred(self, patches: Tensor) -> Tensor:
        """Patches less one fixed row where an intercept makes up for it.

        Sums of squares of numbers with a large mean would drown their variance in float32.
        """
        if not self.intercept:
            return patches
        if self.centre is None:
            self.centre = self.common(patches.mean(1, keepdim=True))
        centred: Tensor = patches - self.centre
        return centred

    def common(self, made: Tensor) -> Tensor:
        """What the first process has made of the very first batch, in every process."""
        return first(lambda: made.cpu()).to(made.device) if self.batches.shared else made


def joined(samples: Iterator[Sample]) -> Iterator[Sample]:
    """Chunks of at least `_CHUNK_ROWS` rows, for small products are slow, or one block of images.

    No chunk crosses a block, so that products and slopes do not depend on the number of processes.
    """
    waiting: list[Sample] = []
    for sample in samples:
        if waiting and sample[0] // BLOCK != waiting[0][0] // BLOCK:
            yield _join(waiting)
            waiting = []
        waiting.append(sample)
        if sum(patches.shape[1] for _, patches, _ in waiting) >= _CHUNK_ROWS:
            yield _join(waiting)
            waiting = []
    if waiting:
        yield _join(waiting)


def _join(samples: list[Sample]) -> Sample:
    image, _, seen = samples[0]
    if len(samples) == 1:
        return samples[0]
    together = {name: torch.cat([s[2][name] for s in samples], 1) for name in seen}
    return image, torch.cat([s[1] for s in samples], 1), together
