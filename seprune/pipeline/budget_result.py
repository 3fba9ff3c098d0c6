"""What one budget came to: its plan, its scores, its saved networks, as reports need them."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from seprune.errors import InputError
from seprune.graph.groups import NetworkStructure
from seprune.importance import Importance
from seprune.pruning.plan import PruningPlan
from seprune.report import BudgetReport, GroupCut
from seprune.runtime.files import write_text
from seprune.runtime.reading import read_json, read_text
from seprune.runtime.text import csv_text, from_csv_cell, shell_word

PLAN, SCORES = "plan.json", "importance.csv"
_COLUMNS = ("group", "unit", "score", "kept")


@dataclass(frozen=True)
class BudgetResult:
    """One budget of a run.

    Attributes:
        scores: one a unit, by group; none for a plan that was carried out as it came.
        macs: of the cut network.
        seconds: by step.
        networks: the folders of the saved networks, by the stage that they were measured at.
        tuning: `FineTuned.numbers`.
        notes: of the recovery.
    """

    label: str
    plan: PruningPlan
    scores: Mapping[str, Sequence[float]]
    macs: int
    seconds: Mapping[str, float] = field(default_factory=dict)
    networks: Mapping[str, Path] = field(default_factory=dict)
    tuning: Mapping[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    @classmethod
    def read(
        cls, label: str, home: Path, facts: Mapping[str, Any], networks: Mapping[str, Path]
    ) -> BudgetResult:
        """From the files that a run keeps in `home` and the numbers of its prune stage."""
        plan = PruningPlan.loads(read_json(home / PLAN), path=home)
        scores = read_importance(home / SCORES, facts["plan"]["criterion"])
        return cls(
            label,
            plan,
            as_lists(scores),
            facts["pruned"]["macs"],
            facts["laps"],
            networks,
            notes=tuple(facts.get("notes", ())),
        )

    def report(self, structure: NetworkStructure) -> BudgetReport:
        """As the report has it.

        Args:
            structure: of the dense network.
        """
        prunable = {g.name: g.prunable for g in structure.groups}
        layers = {g.name: list(g.layers) for g in structure.groups}
        groups = [
            GroupCut(
                name=g.name,
                before=g.units,
                after=len(g.keep),
                prunable=prunable.get(g.name, True),
                reason=g.reason,
                layers=layers.get(g.name, []),
                scores=list(self.scores.get(g.name, ())),
                keep=list(g.keep),
            )
            for g in self.plan.groups
        ]
        facts, dense = self.plan.facts, structure.macs_at(structure.full_widths())
        reached = self.macs / dense
        return BudgetReport(
            label=self.label,
            target=float(facts.get("targets", {}).get("macs", self.macs) / dense),
            reached=float(reached),
            criterion=facts.get("criterion", ""),
            allocation=facts.get("allocation", ""),
            seconds={k: float(v) for k, v in self.seconds.items()},
            groups=groups,
            history=[dict(t) for t in self.plan.history],
            tuning=dict(self.tuning),
            choice=dict(facts.get("candidates", {})),
            removed=self.plan.removed.names(),
        )


def as_lists(importance: Importance) -> dict[str, list[float]]:
    """The scores as plain numbers."""
    return {name: [float(s) for s in scores] for name, scores in importance.scores.items()}


def write_importance(importance: Importance, plan: PruningPlan, path: Path) -> None:
    """One row a unit: group, unit, score, kept."""
    rows: list[list[Any]] = [list(_COLUMNS)]
    for group in plan.groups:
        kept = set(group.keep)
        scores = importance.scores.get(group.name)
        for unit in range(group.units):
            score = "" if scores is None else repr(float(scores[unit]))
            rows.append([group.name, unit, score, int(unit in kept)])
    write_text(path, csv_text(rows))


def read_importance(path: Path, criterion: str) -> Importance:
    """The scores that `write_importance` wrote.

    Raises:
        InputError: it is not such a table.
    """
    scores: dict[str, list[float]] = {}
    try:
        for row in csv.DictReader(io.StringIO(read_text(path))):
            if row["score"]:
                scores.setdefault(from_csv_cell(row["group"]), []).append(float(row["score"]))
    except (KeyError, TypeError, ValueError, csv.Error) as error:
        raise InputError(
            f"{path}: not a table of scores",
            why=f"it needs UTF-8 text with the columns {', '.join(_COLUMNS)} ({error})",
            fix=f"remove {shell_word(path)} and give the same command again",
            code="damaged",
        ) from error
    import torch

    tensors = {n: torch.tensor(v, dtype=torch.float64) for n, v in scores.items()}
    return Importance(criterion, tensors)
