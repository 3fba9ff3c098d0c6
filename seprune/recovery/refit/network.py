"""Closed-form recovery: the consumers of cut channels learn to do without them, without labels.

In the order of the forward pass every layer that lost inputs is fitted by ridge regression, so
that it gives what the dense parent gives at the channels that are left. Inputs come from the cut
network as far as it is refitted, so that each layer also makes up for the errors before it.
`paused_forwards` lets every batch wait in front of a layer, `targets` says what to reproduce,
`least_squares` solves. Formulas, costs and failure modes: docs/refit.md.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from dataclasses import replace
from datetime import timedelta
from typing import Any

import torch
from torch import nn

from seprune.errors import EnvironmentFault, InputError, UsageError, first_line
from seprune.measure.activations import peak_bytes
from seprune.pruning.plan import PruningPlan
from seprune.recovery.refit.forwards import BLOCK, Forwards, ParentForwards, RefitBatches
from seprune.recovery.refit.layer import LayerFit, Limits
from seprune.recovery.refit.options import RefitOptions, Refitted
from seprune.recovery.refit.products import WeightLayout
from seprune.recovery.refit.targets import Target, TargetFinder
from seprune.runtime.distributed import out_of_memory, resolve_device, same_as_first, united
from seprune.runtime.inference import device_of
from seprune.runtime.memory import Ceiling, give_back, memory_budget
from seprune.runtime.module_copy import copy_module
from seprune.runtime.progress import Track, silent
from seprune.statistics.calibration_inputs import CalibrationInputs, take_inputs

_CPU = torch.device("cpu")
_CACHED = 96 << 20  # bytes of a forward; beyond, page faults cost as much as the layers
_THREADS = 128  # batches that wait, each in a thread


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
        loader: batches of images, of (images, labels), or as the task splits them; targets are
            not used.

    Raises:
        InputError: no images, or a `pruned` that the plan does not lead to.
        EnvironmentFault: no such device.
    """
    return Refitter(parent, [plan], loader, options=options)(pruned, plan, track=track)


class Refitter:
    """Fits several networks cut from one parent on the same images.

    What the parent shows is computed once, as far as there is memory for it.

    Args:
        plans: all that networks will be cut by.
        loader: as `refit` takes it.
    """

    def __init__(
        self,
        parent: nn.Module,
        plans: Sequence[PruningPlan],
        loader: Iterable[Any],
        *,
        options: RefitOptions | None = None,
    ) -> None:
        self.options = options = options or RefitOptions()
        self.device = resolve_device(options.device)
        memory = memory_budget(_CPU) // 8
        self.images = images = take_inputs(loader, options.images, memory=memory, task=options.task)
        teacher = copy_module(parent).to(self.device).eval()
        with images.task.comparable(teacher):
            self.finder = TargetFinder(teacher, images.example(teacher))
            targets = {t.layer: t for plan in plans for t in self.targets(plan)[0]}
        self.memory = memory_budget(self.device, options.memory)
        if options.memory != "auto":
            give_back()  # else what was done before counts as well
        self.ceiling = Ceiling(self.memory)
        batches, layers = RefitBatches(images, self.device, self.batch()), list(targets.values())
        few, every = (_bytes_kept(layers, teacher, every) for every in (False, True))
        several = len(plans) > 1 and every <= self.memory // 4
        self.parent = ParentForwards(
            teacher, batches, layers, at_once=few <= self.memory // 4, several=several
        )

    def __call__(self, pruned: nn.Module, plan: PruningPlan, *, track: Track = silent) -> Refitted:
        """`refit` with one of the plans.

        Raises:
            InputError: the plan does not lead to `pruned`.
        """
        model, images, teacher = copy_module(pruned), self.images, self.parent.model
        home, modes = device_of(model), {m: m.training for m in model.modules()}
        model.to(self.device).eval()
        with images.task.comparable(teacher), images.task.comparable(model):
            targets, skipped = self.targets(plan)
            _check(model, targets, teacher)
            forwards = Forwards(self.parent, model, targets, self.ceiling)
            work = _Work(forwards, self.options, Limits.of(self.memory))
            _fit(work, track)
        for module, mode in modes.items():
            module.training = mode
        skipped |= work.skipped
        warnings = (*work.warnings, *_few(images, self.options.images))
        return Refitted(model.to(home), tuple(work.errors), skipped, work.errors, warnings)

    def targets(self, plan: PruningPlan) -> tuple[list[Target], dict[str, str]]:
        """The layers to fit, with the rows of each, and the others with the reason.

        The rows follow the parent's layers: those of one position serve all networks.
        """
        targets, skipped = self.finder.find(plan)
        return [replace(t, rows=self.rows(t)) for t in targets], skipped

    def rows(self, target: Target) -> int:
        """Rows by the inputs of an output (kernel x channels), as far as there are so many."""
        layout = WeightLayout.of(self.finder.modules[target.layer])
        images = len(self.images)
        wanted = self.options.rows_of(layout.kernel * layout.inputs, images)
        return min(wanted, images * target.positions)

    def batch(self) -> int:
        """Images per forward: as many as are fastest, as far as memory allows.

        Raises:
            UsageError: not even one image fits.
        """
        need = peak_bytes(self.finder.trace)
        fastest = _fastest(need, len(self.images)) if self.device.type == "cpu" else BLOCK
        return min(fastest, _fitting(self.memory, need))


def _fit(work: _Work, track: Track) -> None:
    forwards = work.forwards
    targets = forwards.targets
    with united(), torch.no_grad(), forwards:
        for target in track(
            targets, label="refitting", total=len(targets), unit="layers", live=work.live
        ):
            work.refit(target)
            forwards.forget(target)
        same_as_first(forwards.model)


class _Work:
    """Fits one layer after the other, with smaller batches where memory is short."""

    def __init__(self, forwards: Forwards, options: RefitOptions, limits: Limits) -> None:
        self.forwards, self.options, self.limits = forwards, options, limits
        self.errors: dict[str, tuple[float, float]] = {}
        self.skipped: dict[str, str] = {}
        self.warnings: list[str] = []
        self.layer, self.began = "", time.perf_counter()

    def refit(self, target: Target) -> None:
        """Fit one layer, or note why it keeps its weights.

        Raises:
            EnvironmentFault: a single image does not fit into memory.
        """
        self.layer = target.layer
        while True:
            fit = LayerFit(self.forwards, target, options=self.options, limits=self.limits)
            try:
                self.errors[target.layer] = fit.fit()
            except ArithmeticError as error:
                self.skipped[target.layer] = str(error)
            except RuntimeError as error:  # torch.OutOfMemoryError is one
                if not out_of_memory(error):
                    raise
                self.shrink(error)
                continue
            return

    def shrink(self, error: RuntimeError) -> None:
        """Go on with batches of half the size."""
        if not self.forwards.halve():
            raise EnvironmentFault(
                "out of memory with a single image",
                why=first_line(error),
                fix="use a larger device, smaller images, or device=cpu",
            ) from error
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        self.warnings[:] = [
            f"batches of more than {self.forwards.batches.size} images did not fit into memory; "
            "the refit went on with smaller ones"
        ]

    def live(self) -> str:
        """The layer, how many images a second have had all layers so far, and the time left."""
        done = len(self.errors) + len(self.skipped)
        share = done / max(1, len(self.forwards.targets))
        spent = time.perf_counter() - self.began
        rate = self.forwards.batches.own * share / max(1e-9, spent)
        left = timedelta(seconds=round(spent * (1 - share) / share)) if share else "?"
        return f"{self.layer}, {rate:.1f} images/s, {left} left"


def _fitting(budget: int, need: int) -> int:
    """Images per forward that take a quarter of the budget.

    Raises:
        UsageError: not even one image fits.
    """
    if need > budget:
        raise UsageError(
            f"memory={budget:,} bytes is too little for one image",
            why=f"one image needs {need:,} bytes in one forward of this network",
            fix=f"give memory={2 * need} or more, or memory=auto",
        )
    return max(1, budget // 4 // max(1, need))


def _fastest(need: int, images: int) -> int:
    """Images per forward on a CPU: a power of 2, so that blocks divide evenly."""
    wanted = max(1, _CACHED // max(1, need), images // _THREADS)
    return min(BLOCK, 1 << wanted.bit_length() - 1)


def _few(images: CalibrationInputs, wanted: int) -> list[str]:
    given = len(images)
    return [] if given >= wanted else [f"the loader gave {given:,} of {wanted:,} images"]


def _check(model: nn.Module, targets: Sequence[Target], teacher: nn.Module) -> None:
    networks = [dict(m.named_modules()) for m in (model, teacher)]
    for target in targets:
        layer, dense = (modules.get(target.layer) for modules in networks)
        have = _outputs(layer)
        want = _outputs(dense) if target.keep is None else len(target.keep)
        if have != want:
            raise InputError(
                f"the pruned network does not fit the plan: layer '{target.layer}'",
                why=f"the plan keeps {want} of its outputs, the network has {have}",
                fix="refit what prune(parent, plan) returned",
                code="plan",
            )


def _bytes_kept(targets: Sequence[Target], teacher: nn.Module, every: bool) -> int:
    """Bytes of what the parent shows for all layers, in all channels if `every`."""
    total = 0
    for t in targets:
        dense = _outputs(teacher.get_submodule(t.layer))
        total += t.rows * 4 * len(t.shown) * (dense if every or t.keep is None else len(t.keep))
    return total


def _outputs(layer: nn.Module | None) -> int:
    """How many channels a layer gives; 0 where it has no weight."""
    weight = getattr(layer, "weight", None)
    if not isinstance(weight, torch.Tensor):
        return 0
    if isinstance(layer, nn.modules.conv._ConvTransposeNd):
        return weight.shape[1] * layer.groups
    return len(weight)
