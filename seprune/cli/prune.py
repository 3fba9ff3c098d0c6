"""`seprune prune`: a network cut to a budget, recovered and saved."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from seprune.cli import console, options
from seprune.errors import UsageError

if TYPE_CHECKING:
    from seprune.pipeline.context import Context
    from seprune.pipeline.settings import CutSettings
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
    runtime: Annotated[str, typer.Option(help="Of --latency: eager, compiled or onnx.")] = "eager",
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
    *,
    work: options.WorkOptions,
) -> None:
    """Cut a network to a budget and save it.

    Writes config.json, model.safetensors, plan.json and the statistics that were needed.

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
    )  # fmt: skip
    from seprune.cli import open_inputs
    from seprune.pipeline.settings import CutSettings

    settings = CutSettings.of(recipe)
    permission = open_inputs.permission(network)
    context = open_inputs.context(recipe, loader=permission, labelled=settings.needs_labels)
    if plan is not None:
        _refuse_beside_plan({**budget, "dry-run": dry_run})
        result = _replay(context, settings, plan, out)
    else:
        known = open_inputs.statistics(statistics, context.network)
        result = (_plan_only if dry_run else _prune)(context, settings, known, out)
    if work.json:
        console.give(result)


def _prune(
    context: Context, settings: CutSettings, statistics: GateStatistics | None, out: Path
) -> dict[str, Any]:
    """Cut, recover, save."""
    from seprune.export import pruned_model
    from seprune.pipeline import stages
    from seprune.runtime.distributed import first

    statistics, seconds = _prepare(context, settings, statistics)
    cut = stages.cut_in_steps(context, settings, statistics, _one_budget(settings))
    beside = {} if statistics is None else {"statistics.safetensors": statistics.save}
    first(lambda: pruned_model.save(cut.recovered.cpu(), out, cut.architecture, beside=beside))
    console.tell(f"pruned network: {out}")
    return _result(cut.plan, {**seconds, **cut.seconds})


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
    context: Context, settings: CutSettings, statistics: GateStatistics | None, out: Path
) -> dict[str, Any]:
    """`--dry-run`: the plan and what it would give."""
    from seprune.export import pruned_model
    from seprune.pipeline import stages
    from seprune.runtime.distributed import first

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


def _replay(context: Context, settings: CutSettings, path: Path, out: Path) -> dict[str, Any]:
    """`--plan F`: carry out what the file says, recover, save; costs are counted, not read."""
    from seprune.export import pruned_model
    from seprune.measure.flops import count
    from seprune.pipeline import stages
    from seprune.pruning.plan import PruningPlan, with_facts
    from seprune.pruning.prune import prune as carry_out
    from seprune.runtime.distributed import first

    start = time.monotonic()
    network, read = context.network, PruningPlan.load(path)
    pruned = carry_out(network.model, read, network.example())
    before, after = (count(m, network.example(1)) for m in (network.model, pruned))
    costs = {"macs": [before.macs, after.macs], "params": [before.params, after.params]}
    plan = with_facts(read, **costs)
    seconds = {"prune": time.monotonic() - start}
    recovered = stages.recover(context, settings, pruned, plan)
    seconds["recover"] = time.monotonic() - start - seconds["prune"]
    first(lambda: pruned_model.save(recovered.cpu(), out, network.architecture.cut(plan)))
    console.tell(f"pruned network: {out}")
    return _result(plan, seconds)


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
