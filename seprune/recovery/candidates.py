"""Which of several plans a network recovers from best: each is tried, and no labels are used.

No rule that chooses channels is right on every network and budget, and the error of a cut before
its recovery says little about it after. So every candidate is cut, recovered as it is going to be
on a part of the calibration images, and judged by how far its outputs are from the parent's on
held-out ones.
Measurements: docs/importance.md, "Which plan".
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from seprune.errors import InputError, UsageError
from seprune.pruning.plan import PruningPlan
from seprune.pruning.prune import prune
from seprune.recovery.recalibrate import recalibrate
from seprune.recovery.refit import RefitOptions
from seprune.recovery.refit.network import Refitter
from seprune.runtime.distributed import first, resolve_device
from seprune.runtime.inference import evaluating
from seprune.runtime.memory import memory_budget
from seprune.runtime.progress import Track, silent
from seprune.runtime.short_table import ShortTable, Tabular
from seprune.runtime.text import null_for_nan
from seprune.statistics.calibration_inputs import CalibrationInputs, take_inputs
from seprune.tasks import Task, unlabelled_task
from seprune.tasks.batches import leaves, to_device

TIE = 1.1
"""Errors within this factor do not tell which network is better (measured: docs/importance.md)."""
_MORE = 4  # times as many held-out images decide between such candidates
_BATCH = 128


@dataclass(frozen=True)
class TrialOptions:
    """How candidates are tried.

    Attributes:
        images: calibration images that each candidate is recovered on.
        held_out: further images that it is judged on; four times as many where two are close.
        recover: `refit`, `bn` for BatchNorm statistics alone, or `none`: what is judged.
        device: `auto`, `cpu`, `cuda`, ...
        memory: bytes that the refits may use, as `RefitOptions` has them.
        task: by default what the batches look like.
    """

    images: int = 512
    held_out: int = 512
    recover: Literal["none", "bn", "refit"] = "refit"
    device: str | torch.device = "auto"
    memory: int | Literal["auto"] = "auto"
    task: Task | None = None

    @classmethod
    def before(cls, recover: str, **options: Any) -> TrialOptions:
        """For networks that `recover` (also `reconstruct`, which starts from a refit) is for."""
        known: dict[str, Literal["none", "bn"]] = {"none": "none", "bn": "bn"}
        return cls(recover=known.get(recover, "refit"), **options)


@dataclass(frozen=True)
class Trial:
    """One candidate.

    Attributes:
        name: of the rule that made the plan.
        error: mean squared difference of the outputs from the parent's, over the variance of the
            parent's, on held-out images; infinite where outputs are not finite.
        images: how many.
        seconds: that the trial took; 0 where `same_as` names a candidate with the same plan.
    """

    name: str
    error: float
    images: int
    seconds: float
    same_as: str | None = None

    def plain(self) -> dict[str, Any]:
        """Plain JSON types; without `seconds`, so that the same images give the same plan file."""
        error = null_for_nan(self.error)
        return {"name": self.name, "error": error, "images": self.images, "same_as": self.same_as}


@dataclass(frozen=True, repr=False)
class PlanChoice(Tabular):
    """The plan whose network came closest to its parent.

    Attributes:
        name: of the rule that made it.
        trials: all candidates, the closest first; none where all plans are the same.
        close: others whose error is within 10 % of the chosen one's: they may be as good.
    """

    name: str
    plan: PruningPlan
    trials: tuple[Trial, ...]
    close: tuple[str, ...]

    def _short_table(self) -> ShortTable:
        seconds = sum(t.seconds for t in self.trials)
        title = f"plan of {self.name}, of {len(self.trials)} candidates in {seconds:.0f} s"
        rows = [(t.name, f"{t.error:.4f}", t.images, t.same_as or "") for t in self.trials]
        return ShortTable.of(title, ("rule", "error", "images", "same plan as"), rows)

    def facts(self) -> dict[str, Any]:
        """Plain JSON types, for a plan's facts."""
        trials = [trial.plain() for trial in self.trials]
        return {"chosen": self.name, "close": list(self.close), "trials": trials}


def choose_plan(
    parent: nn.Module,
    plans: Mapping[str, PruningPlan],
    loader: Iterable[Any],
    *,
    options: TrialOptions | None = None,
    track: Track = silent,
) -> PlanChoice:
    """Try every plan and keep the one whose network is nearest its parent once it is recovered.

    Under `torchrun` every process calls it. The same images give the same choice. Where errors are
    within 10 % of the smallest, all images behind the first `images` decide.

    Args:
        plans: candidates by name; of equals the first one is kept.
        loader: batches of images, or of (images, labels). The first `images` of them are recovered
            on, those behind them judge; of too few a quarter judges. Nothing needs images but
            the judge where nothing is recovered.

    Raises:
        UsageError: no plans.
        InputError: too few images, or outputs that cannot be compared.
    """
    if not plans:
        raise UsageError(
            "there are no plans to choose from", why="none were given", fix="give one plan at least"
        )
    name, plan = next(iter(plans.items()))
    if all(_keeps(other) == _keeps(plan) for other in plans.values()):
        return PlanChoice(name, plan, (), ())
    options = options or TrialOptions()
    options = replace(options, images=0) if options.recover == "none" else options
    wanted = options.images + _MORE * options.held_out
    memory = memory_budget(torch.device("cpu")) // 8
    images = take_inputs(loader, wanted, memory=memory, task=options.task)
    trials = _Trials(parent, plans, images, options)
    found: dict[str, Trial] = {}
    models: dict[str, nn.Module] = {}  # distinct ones only; a few networks at most
    work = track(list(plans.items()), label="trying plans", total=len(plans), unit="plans")
    for name, plan in work:
        twin = next((n for n in models if _keeps(plans[n]) == _keeps(plan)), None)
        if twin is not None:
            found[name] = Trial(name, found[twin].error, found[twin].images, 0.0, twin)
            continue
        found[name], models[name] = trials.of(name, plan)
    again = trials.closer(found, models)
    best = min((again or found).values(), key=lambda trial: trial.error)
    found |= again
    others = [t for t in found.values() if t.name != best.name and best.name != t.same_as]
    close = tuple(t.name for t in others if t.error <= TIE * best.error)
    ranked = tuple(sorted(found.values(), key=lambda trial: trial.error))
    return PlanChoice(best.name, plans[best.name], ranked, close)


@dataclass
class KnownOutputs:
    """The parent's outputs batch by batch, on the CPU, as far as they fit into memory.

    Attributes:
        memory: bytes that are left.
    """

    memory: int
    kept: dict[tuple[int, int], list[Tensor]] = field(default_factory=dict)

    def of(self, key: tuple[int, int], make: Callable[[], list[Tensor]]) -> list[Tensor]:
        """Those of one batch, made unless they are known."""
        if key in self.kept:
            return self.kept[key]
        made = make()
        size = sum(t.numel() * t.element_size() for t in made)
        if size <= self.memory:
            self.memory -= size
            self.kept[key] = [t.cpu() for t in made]
        return made


def output_error(
    parent: nn.Module,
    model: nn.Module,
    batches: Iterable[Any],
    *,
    task: Task | None = None,
    known: KnownOutputs | None = None,
) -> float:
    """Mean squared difference of two networks' outputs, over the variance of the parent's.

    All floating-point tensors of the outputs count alike, however large they are. Batches are on
    the device of both models, which are in eval mode.

    Args:
        known: what the parent gave for the same batches before; filled here.

    Raises:
        InputError: outputs without floating-point tensors, or of other shapes.
    """
    sums, known = list[Tensor](), known or KnownOutputs(0)
    with ExitStack() as stack, torch.no_grad():
        for number, batch in enumerate(batches):
            if not sums:
                task = task or unlabelled_task(batch)
                stack.enter_context(task.comparable(parent))
                stack.enter_context(task.comparable(model))
            assert task is not None
            own = partial(_outputs, task, parent, batch)
            wanted, given = known.of((number, task.size(batch)), own), _outputs(task, model, batch)
            _check(wanted, given)
            sums = sums or [torch.zeros(4, dtype=torch.float64) for _ in wanted]
            for total, a, b in zip(sums, wanted, given, strict=True):
                a, b = a.double().cpu(), b.double().cpu()  # MPS has no float64
                parts = ((a - b).square().sum(), a.square().sum(), a.sum())
                total += torch.stack([*parts, parts[0].new_tensor(float(a.numel()))])
    different, squares, plain, count = torch.stack(sums).T
    variance = squares / count - (plain / count).square()
    error = float((different / count / variance.clamp_min(1e-12)).mean())
    return error if math.isfinite(error) else math.inf


def _outputs(task: Task, model: nn.Module, batch: Any) -> list[Tensor]:
    return [t for t in leaves(task.forward(model, batch)) if t.is_floating_point()]


def _check(wanted: Sequence[Tensor], given: Sequence[Tensor]) -> None:
    shapes = [[tuple(t.shape) for t in side] for side in (wanted, given)]
    if not wanted or shapes[0] != shapes[1]:
        raise InputError(
            "the outputs of the two networks cannot be compared",
            why=f"the parent gives {shapes[0] or 'no numbers'}, the other one {shapes[1]}",
            fix="choose among plans without trials: plan.candidates=false",
        )


def _keeps(plan: PruningPlan) -> dict[str, tuple[int, ...]]:
    return {g.name: g.keep for g in plan.groups}


class _Trials:
    """Cuts, recovers and judges on one set of images."""

    def __init__(
        self,
        parent: nn.Module,
        plans: Mapping[str, PruningPlan],
        images: CalibrationInputs,
        options: TrialOptions,
    ) -> None:
        if len(images) < 2 and options.images:
            raise InputError(
                "one image cannot both recover a network and judge it",
                why="candidates are judged on images that they were not refitted on",
                fix="give more calibration images, or plan.candidates=false",
            )
        self.parent, self.images, self.options = parent, images, options
        self.device = resolve_device(options.device)
        spare = len(images) - options.images
        enough = spare >= min(options.held_out, len(images) // 4)
        self.fitted = options.images if enough else len(images) - max(1, len(images) // 4)
        self.held_out = min(options.held_out, len(images) - self.fitted)
        self.known = KnownOutputs(memory_budget(torch.device("cpu")) // 8)
        self.recover = self._recovery(list(plans.values()))

    def _recovery(
        self, plans: Sequence[PruningPlan]
    ) -> Callable[[nn.Module, PruningPlan], nn.Module]:
        """What is done with every cut; what refits have in common is computed once."""
        how, task = self.options.recover, self.images.task
        part = list(self.batches(0, self.fitted))
        if how == "none":
            return lambda cut, _: cut
        if how == "bn":
            return lambda cut, _: recalibrate(cut, part, task=task, device=self.device)
        memory = self.options.memory
        fit = RefitOptions(images=self.fitted, device=self.device, memory=memory, task=task)
        refit = Refitter(self.parent, plans, part, options=fit)
        return lambda cut, plan: refit(cut, plan).model

    def of(self, name: str, plan: PruningPlan) -> tuple[Trial, nn.Module]:
        """One candidate's trial, and its recovered network."""
        began = time.monotonic()
        model = self.recover(prune(self.parent, plan), plan)
        error = self.error(model, self.held_out)
        return Trial(name, error, self.held_out, time.monotonic() - began), model

    def closer(
        self, found: Mapping[str, Trial], models: Mapping[str, nn.Module]
    ) -> dict[str, Trial]:
        """The candidates within `TIE` of the best, judged on all held-out images."""
        least, every = min(t.error for t in found.values()), len(self.images) - self.fitted
        close = [t for t in found.values() if t.error <= TIE * least]
        distinct = [t for t in close if t.same_as is None]
        if len(distinct) < 2 or every == self.held_out:
            return {}
        again: dict[str, Trial] = {}
        for trial in distinct:
            began = time.monotonic()
            error = self.error(models[trial.name], every)
            seconds = trial.seconds + time.monotonic() - began
            again[trial.name] = Trial(trial.name, error, every, seconds)
        for trial in (t for t in close if t.same_as is not None):
            twin = again[str(trial.same_as)]
            again[trial.name] = Trial(trial.name, twin.error, every, 0.0, twin.name)
        return again

    def error(self, model: nn.Module, count: int) -> float:
        """The error on so many held-out images."""

        def judge() -> float:
            batches = self.batches(self.fitted, self.fitted + count)
            placed = (to_device(batch, self.device) for batch in batches)
            with evaluating(self.parent, self.device), evaluating(model, self.device):
                return output_error(
                    self.parent, model, placed, task=self.images.task, known=self.known
                )

        return first(judge)  # one process judges: all have to agree, to the last bit

    def batches(self, start: int, stop: int) -> Iterator[Any]:
        """Images of these numbers, on the CPU."""
        for begin in range(start, stop, _BATCH):
            yield self.images.part(begin, min(begin + _BATCH, stop))
