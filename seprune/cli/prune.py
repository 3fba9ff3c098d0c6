"""`seprune prune`: a network cut to a budget, recovered and saved."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from seprune.cli import console, options
from seprune.errors import UsageError
from seprune.runtime.text import shell_word

if TYPE_CHECKING:
    from seprune.models import ModelLoader
    from seprune.pipeline.context import Context
    from seprune.pipeline.settings import CutSettings
    from seprune.pipeline.stages import Cut
    from seprune.pipeline.step_report import Step
    from seprune.pruning.plan import PruningPlan
    from seprune.recipe.budget import Budget
    from seprune.statistics import GateStatistics


def prune(
    network: options.NetworkOptions,
    out: options.Out,
    data: options.Calibration = None,
    macs: Annotated[str | None, typer.Option(help="Kept: 0.5, or an amount like 20M.")] = None,
    params: Annotated[str | None, typer.Option(help="Kept: 0.4, or an amount like 1.5M.")] = None,
    latency: Annotated[str | None, typer.Option(help="Kept: 0.6, or 4ms; measured here.")] = None,
    runtime: Annotated[
        str, typer.Option(help="Of --latency: eager, compiled, onnx, openvino.")
    ] = "eager",
    batch: Annotated[int, typer.Option(min=1, help="Images at once, of --latency.")] = 1,
    importance: options.Criterion = "gate_logit",
    probe: options.Probe = None,
    recover: Annotated[
        str | None,
        typer.Option(help="none, bn, refit, reconstruct or scratch. Refit if there are images."),
    ] = None,
    round_to: Annotated[
        int | None, typer.Option(help="Widths are multiples of this; else 8 or 16, which is fast.")
    ] = None,
    statistics: options.Statistics = None,
    plan: Annotated[
        Path | None, typer.Option(metavar="F", help="Carry out this plan.json, edited or not.")
    ] = None,
    dry_run: Annotated[bool, typer.Option(help="Write the plan and nothing else.")] = False,
    measure: Annotated[
        bool, typer.Option(help="Accuracy on the val images, and latency, before and after.")
    ] = True,
    *,
    work: options.WorkOptions,
) -> None:
    """Cut a network to a budget and save it.

    Writes config.json, model.safetensors, plan.json, the statistics that were needed, and what
    it measured as report.json and README.md.

    Examples:
      seprune prune seprune/se_resnet20 --checkpoint F.pth --data D \\
        --macs 0.5 --recover refit --out small
      seprune prune timm/seresnet50 --macs 0.5 --importance l2 \\
        --dry-run --out plan
      seprune prune timm/seresnet50 --plan plan/plan.json --out small
    """
    given = {"macs": macs, "params": params, "latency": latency}
    budget = {k: options.budget_of(k, v) for k, v in given.items() if v is not None}
    timed = {"runtime": runtime, "batch": batch}
    recipe = options.recipe(
        network, work, data, plan={**budget, "round_to": round_to, **timed},
        prune={"recover": recover or ("none" if data is None else "refit")},
        importance={"criterion": importance, "probe": probe and {"epochs": probe}},
        report={"latency": ["eager"], "batch_sizes": [1]},
    )  # fmt: skip
    from seprune.cli import next_step, open_inputs
    from seprune.pipeline.settings import CutSettings
    from seprune.pipeline.stages import distils
    from seprune.pipeline.step_report import Step

    settings = CutSettings.of(recipe)
    permission = open_inputs.permission(network)
    measure = measure and data is not None and not dry_run
    context = open_inputs.context(
        recipe,
        loader=permission,
        labelled=settings.needs_labels,
        glance=["val"] if measure else [],
    )
    step = Step(recipe, context, out, next_step.typed())
    if plan is not None:
        _refuse_beside_plan({**budget, "dry-run": dry_run})
    known = open_inputs.statistics(statistics, context.network)
    if dry_run:
        result = _plan_only(step, settings, known)
    else:
        cut = _cut(step, settings, known) if plan is None else _replayed(step, settings, plan)
        result = _saved(step, cut, permission, measure=measure and _labelled(context))
        teaches = data is not None and distils(context)
        next_step.show(next_step.after_prune(network, data, out, work, distils=teaches))
    if work.json:
        console.give(result)


def _labelled(context: Context) -> bool:
    """Whether the images have the labels that the network has outputs for."""
    return context.network.trained_for.labels == context.images().info.classes


@dataclass(frozen=True)
class _Made:
    """A cut, what it was to meet, and what it was made from."""

    cut: Cut
    label: str
    statistics: GateStatistics | None
    seconds: dict[str, float]


def _cut(step: Step, settings: CutSettings, statistics: GateStatistics | None) -> _Made:
    """Plan, cut, recover."""
    from seprune.pipeline import stages

    budget = _one_budget(settings)
    statistics, seconds = _prepare(step.context, settings, statistics)
    cut = stages.cut_in_steps(step.context, settings, statistics, budget)
    return _Made(cut, str(budget), statistics, {**seconds, **cut.seconds})


def _saved(step: Step, made: _Made, loader: ModelLoader, *, measure: bool) -> dict[str, Any]:
    """Save a cut network with its report; the network first, since it took the longest."""
    from seprune.export import pruned_model
    from seprune.pipeline import step_report
    from seprune.report import terminal, words
    from seprune.runtime.distributed import first

    cut, out = made.cut, step.out
    report, found = step_report.of_cut(step, cut, made.label, made.statistics)
    beside = step_report.beside(report)
    if made.statistics is not None:
        beside["statistics.safetensors"] = made.statistics.save
    save = partial(pruned_model.save, folder=out, architecture=cut.architecture, beside=beside)
    first(lambda: save(cut.recovered.cpu()))
    console.tell(f"pruned network: {out}")
    result = _result(cut.plan, made.seconds)
    if measure:
        report = step_report.measured(step, found, cut.recovered, loader)
        about = {"metrics": words.finite(report.measurements[-1].metrics)}
        first(lambda: save(cut.recovered.cpu(), about=about))
    report = first(lambda: step_report.write(report, out))
    console.stderr().print(terminal.results(report))
    for warning in report.warnings:
        console.tell(f"note: {warning}")
    console.tell(f"report: seprune report {shell_word(out)}")
    before, after = (dict(m.metrics) for m in report.measurements)
    return {**result, "metrics_before": before, "metrics_after": after}


def _prepare(
    context: Context, settings: CutSettings, statistics: GateStatistics | None
) -> tuple[GateStatistics | None, dict[str, float]]:
    """The statistics that the criterion needs, and the seconds that it took to find them."""
    from seprune.pipeline.collection import collect

    start = time.monotonic()
    groups = context.structure.groups
    seconds = {"analyse": time.monotonic() - start}
    if not any(g.prunable for g in groups):
        console.tell("note: no group of this network can be cut")
    if settings.needs_statistics and statistics is None:
        start = time.monotonic()
        statistics = collect(context, settings)
        seconds["collect"] = time.monotonic() - start
    for warning in statistics.warnings if statistics is not None else ():
        console.tell(f"note: {warning}")
    return statistics, seconds


def _plan_only(
    step: Step, settings: CutSettings, statistics: GateStatistics | None
) -> dict[str, Any]:
    """`--dry-run`: the plan and what it would give."""
    from seprune.export import pruned_model
    from seprune.pipeline import stages
    from seprune.runtime.distributed import first

    context, out = step.context, step.out
    statistics, seconds = _prepare(context, settings, statistics)
    _, plan = stages.planned(context, settings, statistics, _one_budget(settings))
    first(lambda: plan.save(out / pruned_model.PLANS))
    console.tell(f"plan: {out / pruned_model.PLANS} (nothing else was written)")
    return _result(plan, seconds)


def _one_budget(settings: CutSettings) -> Budget:
    budgets = settings.plan.budgets()
    if len(budgets) > 1:
        raise UsageError(
            "one budget at a time", why="prune writes one network", fix="seprune run RECIPE"
        )
    return budgets[0]


def _replayed(step: Step, settings: CutSettings, path: Path) -> _Made:
    """`--plan F`: carry out what the file says and recover; costs are counted, not read."""
    from seprune.importance import Importance
    from seprune.measure.flops import count
    from seprune.pipeline import stages
    from seprune.pruning.plan import PruningPlan, with_facts
    from seprune.pruning.prune import prune as carry_out

    start = time.monotonic()
    context, read = step.context, PruningPlan.load(path)
    network = context.network
    pruned = carry_out(network.model, read, network.example())
    before, after = (count(m, network.example(1)) for m in (network.model, pruned))
    costs = {"macs": [before.macs, after.macs], "params": [before.params, after.params]}
    plan = with_facts(read, **costs)
    seconds = {"prune": time.monotonic() - start}
    recovered = stages.recover(context, settings, pruned, plan)
    seconds["recover"] = time.monotonic() - start - seconds["prune"]
    scores = Importance(plan.facts.get("criterion", ""), {})
    architecture = network.architecture.cut(plan)
    cut = stages.Cut(scores, plan, pruned, recovered.model, architecture, seconds, recovered.notes)
    return _Made(cut, f"macs {after.macs / before.macs:.3g}", None, seconds)


def _refuse_beside_plan(given: Mapping[str, object]) -> None:
    """A plan has its budget in it."""
    if named := [name for name, value in given.items() if value]:
        raise UsageError(
            f"--plan and --{named[0]} do not go together",
            why="a plan says itself what is removed",
            fix=f"leave out --{named[0]}, or leave out --plan to make a new plan",
        )


def _result(plan: PruningPlan, seconds: dict[str, float]) -> dict[str, Any]:
    """The contract's JSON; the table goes to people."""
    from seprune.cli.tables import widths

    facts, timed = plan.facts, plan.facts.get("latency") or {}
    if timed.get("note"):
        console.tell(f"note: {timed['note']}")
    console.stderr().print(widths(plan))
    return {
        "macs_before": facts["macs"][0],
        "macs_after": facts["macs"][1],
        "params_before": facts["params"][0],
        "params_after": facts["params"][1],
        "latency": facts.get("latency"),
        "groups": plan.widths(),
        "not_pruned": {g.name: g.reason for g in plan.groups if g.reason},
        "seconds": seconds,
    }
