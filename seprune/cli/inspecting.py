"""What `seprune inspect` says: gates, groups, costs, and the gates' statistics if there are any."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from seprune.cli import console, tables
from seprune.pipeline.reporting import gate_summaries
from seprune.report import measurement, terminal, words

if TYPE_CHECKING:
    from seprune.graph.groups import NetworkStructure
    from seprune.pipeline.context import Bench
    from seprune.statistics import GateStatistics


def show(model: str, bench: Bench, statistics: GateStatistics | None) -> None:
    """Tables for people."""
    structure, out = bench.structure, console.stderr()
    whole = structure.whole()
    macs, params = structure.macs_at(whole), structure.params_at(whole)
    size = "x".join(map(str, bench.subject.shape))
    out.print(f"{model} at {size}: {macs:,} MACs, {params:,} parameters", soft_wrap=True)
    out.print(tables.gates(structure))
    out.print(tables.groups(structure))
    if not structure.gates:
        console.tell("note: no channel gates; importance l2 works without them")
    if statistics is not None:
        summaries = gate_summaries(structure, statistics)
        out.print(terminal.gates(summaries, f"Statistics over {statistics.samples:,} images"))
        for remark in (*words.gate_remarks(summaries), *statistics.warnings):
            console.tell(f"note: {remark}")


def facts(model: str, bench: Bench, statistics: GateStatistics | None) -> dict[str, Any]:
    """The contract's JSON; with statistics each gate has a list of one value a channel for each."""
    structure = bench.structure
    whole = structure.whole()
    said: dict[str, Any] = {
        "model": model,
        "macs": structure.macs_at(whole),
        "params": structure.params_at(whole),
        "gates": _gates(structure),
        "groups": _groups(structure),
    }
    if statistics is not None:
        for gate, summary in zip(said["gates"], gate_summaries(structure, statistics)):
            known = measurement.plain(summary)
            gate |= {k: known[k] for k in ("statistics", "rank_agreement", "saturated")}
    return said


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
         "layers": list(g.layers), "prunable": g.prunable, "reason": g.reason,
         "units": g.units, "role": g.role}
        for g in structure.groups
    ]  # fmt: skip
