"""Closed-form recovery: the consumers of cut channels learn to do without them, without labels.

In the order of the forward pass every layer that lost inputs is fitted by ridge regression, so
that it gives what the dense parent gives at the channels that are left. Inputs come from the cut
network as far as it is refitted, so that each layer also makes up for the errors before it.
`forwards` lets every batch wait in front of a layer, `targets` says what to reproduce, `squares`
solves. Formulas, costs and failure modes: docs/refit.md.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from seprune.errors import EnvironmentFault, InputError, UsageError, first_line
from seprune.graph.trace import record
from seprune.measure.activations import peak_bytes
from seprune.pruning.plan import PruningPlan
from seprune.recovery.refit.layer import LayerFit, Limits
from seprune.recovery.refit.options import RefitOptions, Refitted
from seprune.recovery.refit.paused_forwards import BLOCK, Forwards
from seprune.recovery.refit.products import WeightLayout
from seprune.recovery.refit.targets import Target, find_targets
from seprune.runtime.distributed import out_of_memory, resolve_device, same_as_first, united
from seprune.runtime.inference import device_of
from seprune.runtime.memory import memory_budget
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
    options = options or RefitOptions()
    device = resolve_device(options.device)
    memory = memory_budget(_CPU) // 8
    images = take_inputs(loader, options.images, memory=memory, task=options.task)
    model = copy.deepcopy(pruned)
    home, modes = device_of(model), {m: m.training for m in model.modules()}
    teacher = copy.deepcopy(parent).to(device).eval()
    model.to(device).eval()
    with images.task.comparable(teacher), images.task.comparable(model):
        targets, skipped = find_targets(teacher, plan, images.example(teacher))
        _check(model, targets, teacher)
        work = _work(teacher, model, images, targets, options=options)
        _fit(work, track)
    for module, mode in modes.items():
        module.training = mode
    skipped |= work.skipped
    warnings = (*work.warnings, *_few(images, options.images))
    return Refitted(model.to(home), tuple(work.errors), skipped, work.errors, warnings)


def _work(
    teacher: nn.Module,
    model: nn.Module,
    images: CalibrationInputs,
    targets: Sequence[Target],
    *,
    options: RefitOptions,
) -> _Work:
    """The forwards through both networks, within the memory that there is."""
    device = device_of(model)
    budget = memory_budget(device, options.memory)
    need = peak_bytes(record(model, images.example(model)))
    targets = [
        replace(t, rows=_rows(t, model.get_submodule(t.layer), len(images), options))
        for t in targets
    ]
    kept = sum(t.rows * _bytes_of_row(t, teacher) for t in targets)
    most = _fastest(need, len(images)) if device.type == "cpu" else BLOCK
    batch, at_once = min(most, _fitting(budget, need)), kept <= budget // 4
    forwards = Forwards(teacher, model, images, targets, batch=batch, at_once=at_once)
    return _Work(forwards, options, Limits.of(budget))


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
            f"batches of more than {self.forwards.batch} images did not fit into memory; the refit "
            "went on with smaller ones"
        ]

    def live(self) -> str:
        """Which layer is fitted, and how many images a second have had all layers so far."""
        done = len(self.errors) + len(self.skipped)
        share = done / max(1, len(self.forwards.targets))
        rate = self.forwards.own * share / max(1e-9, time.perf_counter() - self.began)
        return f"{self.layer}, {rate:.1f} images/s"


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
    for target in targets:
        layer, dense = (dict(m.named_modules()).get(target.layer) for m in (model, teacher))
        have = _outputs(layer)
        want = _outputs(dense) if target.keep is None else len(target.keep)
        if have != want:
            raise InputError(
                f"the pruned network does not fit the plan: layer '{target.layer}'",
                why=f"the plan keeps {want} of its outputs, the network has {have}",
                fix="refit what prune(parent, plan) returned",
                code="plan",
            )


def _bytes_of_row(target: Target, teacher: nn.Module) -> int:
    """Bytes of what one row takes from the parent for one layer."""
    dense = _outputs(teacher.get_submodule(target.layer))
    tensors = 1 + (target.branch is not None) + (target.other is not None)
    return 4 * tensors * (dense if target.keep is None else len(target.keep))


def _rows(target: Target, layer: nn.Module, images: int, options: RefitOptions) -> int:
    """Rows by the inputs of an output (kernel x channels), as far as there are so many."""
    layout = WeightLayout.of(layer)
    return min(options.rows_of(layout.kernel * layout.inputs), images * target.positions)


def _outputs(layer: nn.Module | None) -> int:
    """How many channels a layer gives; 0 where it has no weight."""
    weight = getattr(layer, "weight", None)
    if not isinstance(weight, torch.Tensor):
        return 0
    if isinstance(layer, nn.modules.conv._ConvTransposeNd):
        return weight.shape[1] * layer.groups
    return len(weight)
