"""`seprune inspect`: gates, dependency groups, cost; what cannot be pruned, and why."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from seprune.cli import console, options

if TYPE_CHECKING:
    from seprune.graph.groups import NetworkStructure
    from seprune.pipeline.context import Context
    from seprune.statistics import GateStatistics


def inspect(
    network: options.NetworkOptions,
    data: options.Calibration = None,
    statistics: options.Statistics = None,
    *,
    work: options.WorkOptions,
) -> None:
    """Gates, dependency groups, cost; what cannot be pruned, why.

    With --data or --statistics also what the gates say, before anything is cut; with a checkpoint
    and --data also which preprocessing its weights fit.

    Examples:
      seprune inspect timm/seresnet18 --input 3x224x224
      seprune inspect seprune/se_resnet20 --checkpoint F.pth --data D
    """
    recipe = options.recipe(network, work, data, collect={"gradients": "none"})
    from seprune.cli import open_inputs
    from seprune.pipeline.collection import collect
    from seprune.pipeline.settings import CutSettings

    context = open_inputs.context(
        recipe,
        loader=open_inputs.permission(network),
        quiet=statistics is None,
    )
    structure = context.structure
    if context.data is None:
        measured = open_inputs.statistics(statistics, context.network)
    else:
        measured = collect(context, CutSettings.of(recipe))
    trials = _preprocessing(context, recipe.seed)
    if work.json:
        console.give(_facts(network.model, structure, measured) | trials)
    else:
        size = "x".join(map(str, context.network.shape))
        _show(f"{network.model} at {size}", structure, measured)


def _preprocessing(context: Context, seed: int) -> dict[str, Any]:
    """Candidates compared by loss, where weights of a checkpoint meet images with their labels."""
    from seprune.cli import tables
    from seprune.data.joint import TargetLoader
    from seprune.models.published import published_preprocessing
    from seprune.pipeline.preprocessing_trial import fits, try_preprocessing

    network, data = context.network, context.data
    if data is None:
        return {}
    used = data.info.preprocessing
    found: dict[str, Any] = {"used": used.plain()}
    labelled = network.trained_for.labels == data.info.classes
    if network.digest is None or not labelled or isinstance(data.calibration(1), TargetLoader):
        return {"preprocessing": found}
    trials = try_preprocessing(
        network.model,
        data,
        device=context.runtime.device,
        published=published_preprocessing(network.architecture.name),
        seed=seed,
    )
    console.stderr().print(tables.preprocessing(trials))
    best = trials[0].preprocessing
    if fits(trials, used):
        console.tell(f"the preprocessing in use fits: {used}")
    else:
        given = [f"data.mean={list(best.mean)}", f"data.std={list(best.std)}"]
        given += [f"data.channel_order={best.channel_order}"]
        console.tell(
            f"warning: {trials[0].name} fits better than the preprocessing in use; to use it: "
            + " ".join(f"--set '{key.replace(' ', '')}'" for key in given)
        )
    found["fits"] = trials[0].name
    found["candidates"] = [
        {"name": t.name, "loss": t.loss, t.metric: t.value, **t.preprocessing.plain()}
        for t in trials
    ]
    return {"preprocessing": found}


def _show(title: str, structure: NetworkStructure, statistics: GateStatistics | None) -> None:
    """Tables for people."""
    from seprune.cli import tables
    from seprune.pipeline.reporting import across_channels, gate_summaries
    from seprune.report import terminal, words

    out = console.stderr()
    dense = structure.full_widths()
    macs, params = structure.macs_at(dense), structure.params_at(dense)
    out.print(f"{title}: {macs:,} MACs, {params:,} parameters", soft_wrap=True)
    out.print(tables.gates(structure))
    out.print(tables.groups(structure))
    if not structure.gates:
        console.tell("note: no channel gates; importance l2 works without them")
    for note in across_channels(structure):
        console.tell(f"note: {note}")
    if statistics is not None:
        summaries = gate_summaries(structure, statistics)
        out.print(terminal.gates(summaries, f"Statistics over {statistics.samples:,} images"))
        for remark in (*words.gate_remarks(summaries), *statistics.warnings):
            console.tell(f"note: {remark}")


def _facts(
    model: str, structure: NetworkStructure, statistics: GateStatistics | None
) -> dict[str, Any]:
    """The contract's JSON; with statistics each gate has a list of one value a channel for each."""
    from seprune.pipeline.reporting import gate_summaries
    from seprune.report import measurement

    dense = structure.full_widths()
    found: dict[str, Any] = {
        "model": model,
        "macs": structure.macs_at(dense),
        "params": structure.params_at(dense),
        "gates": _gates(structure),
        "groups": _groups(structure),
    }
    if statistics is not None:
        for gate, summary in zip(found["gates"], gate_summaries(structure, statistics)):
            known = measurement.plain(summary)
            gate |= {k: known[k] for k in ("statistics", "rank_agreement", "saturated")}
    return found


def _gates(structure: NetworkStructure) -> list[dict[str, Any]]:
    owners: dict[str, list[str]] = {}
    for group in structure.groups:
        for link in group.gates:
            owners.setdefault(link.gate, []).append(group.name)
    return [
        {"name": g.name, "channels": g.channels, "squeeze": g.squeeze,
         "activation": g.activation, "placement": g.placement,
         "groups": owners.get(g.name, []), "runs": g.runs, "scales": list(g.scales)}
        for g in structure.gates
    ]  # fmt: skip


def _groups(structure: NetworkStructure) -> list[dict[str, Any]]:
    return [
        {"name": g.name, "channels": g.channels, "gates": [link.gate for link in g.gates],
         "layers": list(g.layers), "prunable": g.prunable, "reason": g.reason, "caveat": g.caveat,
         "units": g.units, "role": g.role}
        for g in structure.groups
    ]  # fmt: skip
