"""Other ways to score the same statistics, to be tried beside the one that is asked for."""

from __future__ import annotations

from dataclasses import replace

from seprune.importance.criteria import CRITERIA, Scoring
from seprune.statistics import GateStatistics

MEASURED = "gate_mean_measured"


def alternatives(scoring: Scoring, statistics: GateStatistics | None) -> dict[str, Scoring]:
    """Scorings by name, `scoring` first; it alone where the others cannot be compared with it.

    Squared effects are combined by `joint` and by `coupled`, and where gates have been seen,
    with the gradients that it needs, `gate_mean_measured` orders units by the gates.
    """
    own = {_name(scoring): scoring}
    if statistics is None or scoring.normalize or scoring.criterion not in _SQUARES:
        return own
    others = [replace(scoring, combine=way) for way in ("joint", "coupled")]
    if statistics.values and statistics.gradients == CRITERIA[MEASURED].gradients:
        others += [replace(other, criterion=MEASURED) for other in others]
    return own | {_name(other): other for other in others}


_SQUARES = {
    MEASURED,
    *(name for name, rule in CRITERIA.items() if rule.of is CRITERIA["gate_logit"].of),
}


def _name(scoring: Scoring) -> str:
    return f"{scoring.criterion} {scoring.combine}"
