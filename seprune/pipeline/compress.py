"""`compress`: analyse, collect, score, plan, prune and recover in one call."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, TypedDict, TypeVar, Unpack, cast, get_args

import torch
from torch import nn

from seprune.errors import InputError, UsageError
from seprune.importance.criteria import Scoring, criterion, score
from seprune.measure.flops import Cost, count
from seprune.measure.metric_names import metric_title, metric_value
from seprune.measure.metrics import Evaluation, evaluate
from seprune.pruning.analyse import analyse
from seprune.pruning.constraints import Allocation
from seprune.pruning.plan import PruningPlan, with_facts
from seprune.pruning.prune import prune
from seprune.pruning.rules import rules_to_try
from seprune.pruning.search import make_plan
from seprune.recovery.candidates import TrialOptions, choose_plan
from seprune.recovery.recalibrate import recalibrate
from seprune.recovery.reconstruct import ReconstructOptions, reconstruct
from seprune.recovery.refit.network import refit
from seprune.recovery.refit.options import RefitOptions, Refitted
from seprune.runtime.distributed import resolve_device
from seprune.runtime.memory import memory_budget
from seprune.runtime.short_table import ShortTable, Tabular
from seprune.statistics.calibration_inputs import take_inputs
from seprune.statistics.collect import collect_statistics
from seprune.statistics.options import CollectOptions
from seprune.tasks import Task

Recover = Literal["none", "bn", "refit", "reconstruct"]
_T = TypeVar("_T")


@dataclass(frozen=True, repr=False)
class Compressed(Tabular):
    """A smaller network and how it came about.

    Attributes:
        model: the pruned and recovered network; the one that was given is unchanged.
        plan: which units of which dependency groups it keeps.
        before, after: MACs of one image, and parameters.
        refitted: errors by layer, where the network was refitted.
        scores: evaluations of the `baseline` and the `pruned` network, where a `test_loader` was
            given.
        seconds: how long each step took.
    """

    model: nn.Module
    plan: PruningPlan
    before: Cost
    after: Cost
    refitted: Refitted | None
    scores: Mapping[str, Evaluation]
    seconds: Mapping[str, float]

    def _short_table(self) -> ShortTable:
        rows: list[tuple[object, ...]] = [
            ("MACs", self.before.macs, self.after.macs),
            ("parameters", self.before.params, self.after.params),
        ]
        if self.scores:
            found = [self.scores[name] for name in ("baseline", "pruned")]
            name = found[0].metric
            rows.append((metric_title(name), *(metric_value(name, x.value) for x in found)))
        title = f"pruned in {sum(self.seconds.values()):.0f} s"
        return ShortTable.of(title, ("", "before", "after"), rows)


class CompressOptions(TypedDict, total=False):
    """What `compress` takes by name beside its budget's `macs` and `params`."""

    macs: float | str
    params: float | str
    scoring: Scoring | None
    task: Task | None
    device: str


def compress(
    model: nn.Module,
    loader: Iterable[Any],
    *,
    test_loader: Iterable[Any] | None = None,
    recover: Recover = "refit",
    **options: Unpack[CompressOptions],
) -> Compressed:
    """A smaller copy of `model` within a budget, recovered without labels.

    Args:
        loader: calibration batches from the training data, of whatever the task splits; targets
            are not looked at by the default criterion. It is iterated several times.
        test_loader: batches with targets that both networks are evaluated on at the end.
        recover: `refit` in closed form, `reconstruct` for label-free training after that, `bn` for
            BatchNorm statistics alone, or `none`.
        options: `macs=0.5` and `params=0.5` are fractions kept, `macs="20M"` an amount. Widths are
            multiples of 16 (8 in narrow groups and on a GPU), which are fast.
            `scoring`: the criterion and how its parts are combined. None: `gate_logit`, in several
            ways; the plan whose recovered network is nearest its parent is taken
            (docs/importance.md, "Which plan").
            `task`: by default what the batches look like.
            `device`: by default `auto`.

    Raises:
        UsageError: no budget, or an unknown one.
        InputError: no images, a network that cannot be analysed, or a budget out of reach.
    """
    if recover not in get_args(Recover):
        raise UsageError(
            f"recover='{recover}' is unknown",
            why=f"known: {', '.join(get_args(Recover))}",
            fix="recover='refit'",
        )
    asked, task = options.pop("scoring", None), options.pop("task", None)
    device, clock = options.pop("device", "auto"), _StepClock()
    example = _example(model, loader, task)
    tries = asked is None
    scoring = asked or Scoring()
    rule = criterion(scoring.criterion)
    structure = clock("analyse", lambda: analyse(model, example))
    statistics = None
    if rule.family != "weights":
        statistics = clock(
            "collect",
            lambda: collect_statistics(
                model,
                loader,
                structure=structure,
                gradients=rule.gradients,
                options=CollectOptions(device=device, seed=scoring.seed, task=task),
            ),
        )
    on_cuda = resolve_device(device).type == "cuda"
    allocation = Allocation(round_to=8 if on_cuda else None)
    refits = recover in ("refit", "reconstruct")
    rules = {"": (scoring, allocation)}
    if tries:
        rules = rules_to_try(scoring, statistics, allocation, refits=refits)

    def planned() -> PruningPlan:
        plans = {
            name: make_plan(
                structure,
                score(structure, statistics, model=model, scoring=way),
                allocation=own,
                **cast(Any, options),
            )
            for name, (way, own) in rules.items()
        }
        trial = TrialOptions.before(recover, device=device, task=task)
        choice = choose_plan(model, plans, loader, options=trial)
        return with_facts(choice.plan, candidates=choice.facts()) if tries else choice.plan

    plan = clock("plan", planned)
    small = clock("prune", lambda: prune(model, plan, example))
    refitted = None
    if refits:
        fit = RefitOptions(device=device, task=task)
        refitted = clock("recover", lambda: refit(model, small, plan, loader, options=fit))
        small = refitted.model
    if recover == "reconstruct":
        training = ReconstructOptions(device=device, seed=scoring.seed, task=task)
        trained = clock(
            "reconstruct", lambda: reconstruct(model, small, plan, loader, options=training)
        )
        small = trained.model
    elif recover == "bn":
        small = clock("recover", lambda: recalibrate(small, loader, task=task, device=device))
    scores = {}
    if test_loader is not None:
        for name, network in (("baseline", model), ("pruned", small)):
            scores[name] = evaluate(network, test_loader, task=task, device=device)
    before, after = (count(network, example) for network in (model, small))
    return Compressed(small, plan, before, after, refitted, scores, clock.seconds)


def _example(model: nn.Module, loader: Iterable[Any], task: Task | None) -> Any:
    """Two samples as the arguments of a forward.

    Raises:
        InputError: no images, or a loader that can be iterated once only.
    """
    if iter(loader) is loader:
        raise InputError(
            "the loader can be iterated only once",
            why="it is a generator, and the images are needed to collect and to recover",
            fix="give a DataLoader, or a list of batches",
        )
    memory = memory_budget(torch.device("cpu")) // 8
    return take_inputs(loader, 2, memory=memory, task=task).example(model)


class _StepClock:
    """Seconds of each step."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    def __call__(self, name: str, work: Callable[[], _T]) -> _T:
        start = time.monotonic()
        result = work()
        self.seconds[name] = time.monotonic() - start
        return result
