"""Tables of `inspect`, `rank` and `prune`, within 80 columns."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal

from rich.table import Table

from seprune.measure.metric_names import metric_title, metric_value
from seprune.report import sensitivity as sensitivities
from seprune.report import words

if TYPE_CHECKING:
    from seprune.export.artefacts import Artefact
    from seprune.graph.groups import NetworkStructure
    from seprune.importance import Importance
    from seprune.pipeline.preprocessing_trial import PreprocessingTrial
    from seprune.pruning.plan import PruningPlan


def gates(structure: NetworkStructure) -> Table:
    """One row a gate."""
    table = _table(f"{len(structure.gates)} gates")
    table.add_column("gate", overflow="fold", ratio=1)
    table.add_column("channels", justify="right", no_wrap=True)
    for name in ("squeeze", "activation", "placement"):
        table.add_column(name, no_wrap=True)
    for gate in structure.gates:
        name = gate.name if gate.runs else f"{gate.name} (never runs)"
        table.add_row(name, str(gate.channels), gate.squeeze, gate.activation, gate.placement)
    return table


def groups(structure: NetworkStructure) -> Table:
    """One row a dependency group."""
    table = _table(f"{len(structure.groups)} dependency groups")
    table.add_column("group", overflow="fold", ratio=3)
    table.add_column("channels", justify="right", no_wrap=True)
    table.add_column("gates", justify="right", no_wrap=True)
    table.add_column("note", overflow="fold", ratio=2)
    for group in structure.groups:
        note = (
            group.reason
            or group.caveat
            or ("SE hidden width" if group.role == "bottleneck" else "")
        )
        if group.units != group.channels and group.prunable:
            note = f"{group.units} units {note}".strip()
        style = None if group.prunable else "dim"
        table.add_row(
            group.name, str(group.channels), str(len(group.gates) or ""), note, style=style
        )
    return table


def widths(plan: PruningPlan) -> Table:
    """The width of every group before and after."""
    macs, params = plan.facts["macs"], plan.facts["params"]
    table = _table(
        f"MACs {macs[0]:,} -> {macs[1]:,} ({macs[1] / macs[0]:.3f}), "
        f"params {params[0]:,} -> {params[1]:,}"
    )
    table.add_column("group", overflow="fold", ratio=3)
    table.add_column("before", justify="right", no_wrap=True)
    table.add_column("after", justify="right", no_wrap=True)
    table.add_column("note", overflow="fold", ratio=2)
    for group in plan.groups:
        changed = group.kept_channels != group.channels
        style = None if changed else "dim"
        table.add_row(
            group.name, str(group.channels), str(group.kept_channels),
            group.reason or group.caveat or "", style=style,
        )  # fmt: skip
    return table


def sensitivity(found: Mapping[str, Any]) -> Table:
    """Losses by group and share, `Sensitivity.plain()`."""
    table = _table(sensitivities.caption(found))
    for number, name in enumerate(sensitivities.head(found)):
        how = {"overflow": "fold", "ratio": 1} if not number else {"no_wrap": True}
        table.add_column(name, justify="right" if number else "left", **how)
    for row in sensitivities.rows(found):
        table.add_row(*row)
    return table


def ranking(importance: Importance) -> Table:
    """Lowest, middle and highest score of every group."""
    table = _table(f"scores by {importance.criterion} (higher: keep)")
    table.add_column("group", overflow="fold", ratio=1)
    for name in ("units", "lowest", "median", "highest"):
        table.add_column(name, justify="right", no_wrap=True)
    for name, scores in importance.scores.items():
        ends = [f"{float(v):.3g}" for v in (scores.min(), scores.median(), scores.max())]
        table.add_row(name, str(len(scores)), *ends)
    return table


def preprocessing(trials: list[PreprocessingTrial]) -> Table:
    """Loss and metric of every candidate, the best first."""
    table = _table("Preprocessing by the loss on calibration images")
    table.add_column("candidate", overflow="fold", ratio=1)
    for name in ("mean", "std", "loss", metric_title(trials[0].metric)):
        table.add_column(name, justify="right", no_wrap=True)
    for trial in trials:
        levels = ["/".join(f"{v:.3g}" for v in values) for values in trial.preprocessing.levels]
        table.add_row(trial.name, *levels, f"{trial.loss:.4g}", f"{trial.value:.4f}")
    return table


def artefacts(found: list[Artefact]) -> Table:
    """Size, metrics and latency of exported files."""
    table = _table("The network and its exported files")
    table.add_column("file", overflow="fold", ratio=1)
    metrics = [name for name in (found[0].metrics or {}) if name != "top5"]
    batches = list(found[0].milliseconds)
    titles = ["bytes", *map(metric_title, metrics), *(f"ms at batch {b}" for b in batches)]
    for title in titles:
        table.add_column(title, justify="right", no_wrap=True)
    for one in found:
        times = [one.milliseconds[b] for b in batches]
        table.add_row(
            one.name,
            f"{one.bytes:,}",
            *(metric_value(name, (one.metrics or {}).get(name)) for name in metrics),
            *(words.DASH if t is None else f"{t:.2f}" for t in times),
        )
    return table


def comparison(rows: list[list[str]]) -> Table:
    """Runs side by side under the names of the first row; columns without values are left out."""
    columns = [c for c in zip(*rows) if any(cell not in ("", words.DASH) for cell in c[1:])]
    table = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0))
    for number, (name, *_) in enumerate(columns):
        side: Literal["left", "right"] = "left" if number < 2 else "right"
        table.add_column(name, overflow="fold", justify=side, no_wrap=number != 1)
    for row in list(zip(*columns))[1:]:
        table.add_row(*row)
    return table


def _table(title: str) -> Table:
    return Table(title=title, title_justify="left", box=None, pad_edge=False, expand=True)
