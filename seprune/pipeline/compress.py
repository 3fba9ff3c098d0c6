"""`compress`: analyse, collect, score, plan, prune and recover in one call."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, TypeVar, cast, get_args

import torch
from torch import Tensor, nn

from seprune.errors import InputError, UsageError
from seprune.importance.alternatives import alternatives
from seprune.importance.criteria import Scoring, criterion, score
from seprune.measure.flops import Cost, count
from seprune.measure.metric_names import metric_title, metric_value
from seprune.measure.metrics import Evaluation, evaluate
from seprune.pruning.analyse import analyse
from seprune.pruning.constraints import Allocation
from seprune.pruning.plan import PruningPlan, with_facts
from seprune.pruning.prune import prune
from seprune.pruning.search import make_plan
from seprune.recovery.candidates import TrialOptions, choose_plan
from seprune.recovery.recalibrate import recalibrate
from seprune.recovery.reconstruct import ReconstructOptions, reconstruct
from seprune.recovery.refit.network import refit
from seprune.recovery.refit.options import RefitOptions, Refitted
from seprune.runtime.distributed import resolve_device
from seprune.runtime.short_table import ShortTable, Tabular
from seprune.statistics.collect import collect_statistics
from seprune.statistics.options import CollectOptions

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


def compress(
    model: nn.Module,
    loader: Iterable[Any],
    *,
    test_loader: Iterable[Any] | None = None,
    recover: Recover = "refit",
    scoring: Scoring | None = None,
    device: str = "auto",
    **budget: float | str,
) -> Compressed:
    """A smaller copy of `model` within a budget, recovered without labels.

    Args:
        loader: calibration batches of images, or of (images, labels), from the training data; it
            is iterated several times.
        test_loader: batches of (images, labels) that both networks are evaluated on at the end.
        recover: `refit` in closed form, `reconstruct` for label-free training after that, `bn` for
            BatchNorm statistics alone, or `none`.
        scoring: the criterion and how its parts are combined. None: `gate_logit`, combined in
            several ways where the network is refitted; the plan whose network is nearest its
            parent is taken (docs/importance.md, "Which plan").
        budget: `macs=0.5` and `params=0.5` are fractions kept, `macs="20M"` an amount. Widths are
            multiples of 16 (8 in narrow groups and on a GPU), which are fast.

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
    example, clock = _example(loader), _StepClock()
    tries = scoring is None and recover in ("refit", "reconstruct")
    scoring = scoring or Scoring()
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
                options=CollectOptions(device=device, seed=scoring.seed),
            ),
        )
    on_cuda = resolve_device(device).type == "cuda"
    rules = alternatives(scoring, statistics) if tries else {"": scoring}

    def planned() -> PruningPlan:
        plans = {
            name: make_plan(
                structure,
                score(structure, statistics, model=model, scoring=way),
                allocation=Allocation(round_to=8 if on_cuda else None),
                **cast(Any, budget),
            )
            for name, way in rules.items()
        }
        choice = choose_plan(model, plans, loader, options=TrialOptions(device=device))
        return with_facts(choice.plan, candidates=choice.facts()) if tries else choice.plan

    plan = clock("plan", planned)
    small = clock("prune", lambda: prune(model, plan, example))
    refitted = None
    if recover in ("refit", "reconstruct"):
        options = RefitOptions(device=device)
        refitted = clock("recover", lambda: refit(model, small, plan, loader, options=options))
        small = refitted.model
    if recover == "reconstruct":
        training = ReconstructOptions(device=device, seed=scoring.seed)
        trained = clock(
            "reconstruct", lambda: reconstruct(model, small, plan, loader, options=training)
        )
        small = trained.model
    elif recover == "bn":
        small = clock("recover", lambda: recalibrate(small, loader, device=device))
    scores = {}
    if test_loader is not None:
        for name, network in (("baseline", model), ("pruned", small)):
            scores[name] = evaluate(network, test_loader, device=device)
    before, after = (count(network, example[:1]) for network in (model, small))
    return Compressed(small, plan, before, after, refitted, scores, clock.seconds)


def _example(loader: Iterable[Any]) -> Tensor:
    """Two images of the first batch, on the CPU.

    Raises:
        InputError: no images, or a loader that can be iterated once only.
    """
    if iter(loader) is loader:
        raise InputError(
            "the loader can be iterated only once",
            why="it is a generator, and the images are needed to collect and to recover",
            fix="give a DataLoader, or a list of batches",
        )
    batch = next(iter(loader), None)
    images = batch[0] if isinstance(batch, (tuple, list)) and len(batch) else batch
    if not isinstance(images, Tensor) or not len(images):
        raise InputError(
            f"the loader gives no images but {type(images).__name__}",
            why="a batch is a tensor (B, C, H, W), or such a tensor and labels",
            fix="give a loader of (images, labels)",
        )
    return torch.cat([images, images])[:2].cpu()


class _StepClock:
    """Seconds of each step."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    def __call__(self, name: str, work: Callable[[], _T]) -> _T:
        start = time.monotonic()
        result = work()
        self.seconds[name] = time.monotonic() - start
        return result
