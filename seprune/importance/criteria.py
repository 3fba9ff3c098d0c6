"""One score per unit of every dependency group: higher means keep.

Formulas, sources and failure modes: docs/importance.md.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from seprune.errors import InputError, UsageError
from seprune.graph.groups import NetworkStructure
from seprune.importance import weights
from seprune.importance.fitting import require_fit
from seprune.importance.gate_values import class_spread, maximum_of, mean_of, statistic
from seprune.importance.joint import correlation, effects_in_order, joint_scores
from seprune.importance.propagate import propagate
from seprune.runtime.short_table import ShortTable, Tabular
from seprune.statistics import GateStatistics

Combine = Literal["mean", "max", "sum", "coupled", "joint"]
Ungated = Literal["unit", "propagate", "none"]
Normalize = Literal["none", "mean", "max", "sum", "standard", "rank"]


@dataclass(frozen=True, repr=False)
class Importance(Tabular):
    """Scores (units,), float64 on CPU, by group name; groups that must not be pruned are left out.

    `additive`: a sum of scores, over groups too, means what a set of units is worth.
    """

    criterion: str
    scores: Mapping[str, Tensor]
    additive: bool = False

    def _short_table(self) -> ShortTable:
        units = sum(map(len, self.scores.values()))
        title = f"{self.criterion}, units: {units:,}, dependency groups: {len(self.scores)}"
        rows = [
            (name, len(s), *(f"{float(f(s)):.4g}" for f in (torch.min, torch.median, torch.max)))
            for name, s in self.scores.items()
            if len(s)
        ]
        return ShortTable.of(title, ("group", "units", "lowest", "median", "highest"), rows)


@dataclass(frozen=True)
class Scoring:
    """How statistics become scores.

    Attributes:
        criterion: a key of `CRITERIA`.
        combine: of several gates and units in a group; `coupled` adds their derivatives before
            squaring, `joint` looks at how units of a group correlate, too; both count as `mean`
            where there are no derivatives, `joint` as `coupled` where nothing is squared.
        ungated: groups without a gate: `unit` gates, `propagate` through the
            weights to the next gates, or `none`: do not prune them.
        normalize: within a group; None is the criterion's own.
        seed: of `random`.
    """

    criterion: str = "gate_logit"
    combine: Combine = "joint"
    ungated: Ungated = "unit"
    normalize: Normalize | None = None
    seed: int = 0


@dataclass(frozen=True)
class Criterion:
    """What a criterion needs, and the statistic or the function of the weights that it is."""

    family: Literal["gate", "ordered", "effect", "moments", "weights"]
    of: Callable[..., Any]  # a tensor of scores; None from weights that have none
    gradients: Literal["none", "labels", "smoothed", "sampled", "logits", "weights"] = "none"
    normalize: Normalize = "none"
    gamma: bool = False  # times the |gamma| of the norm that makes the gated channel


_SQUARE, _ABSOLUTE = statistic("effect_square"), statistic("effect_absolute")
CRITERIA: dict[str, Criterion] = {
    "gate_logit": Criterion("effect", _SQUARE, "logits"),
    "gate_fisher": Criterion("effect", _SQUARE, "labels"),
    "gate_fisher_sampled": Criterion("effect", _SQUARE, "sampled"),
    "gate_fisher_smoothed": Criterion("effect", _SQUARE, "smoothed"),
    "gate_taylor": Criterion("effect", _ABSOLUTE, "labels"),
    "gate_mean": Criterion("gate", mean_of, normalize="mean"),
    "gate_mean_measured": Criterion("ordered", mean_of, "logits"),
    "gate_max": Criterion("gate", maximum_of, normalize="mean"),
    "gate_std": Criterion("gate", lambda v: v["variance"].sqrt(), normalize="mean"),
    "gate_class": Criterion("gate", class_spread, normalize="mean"),
    "gate_between": Criterion("gate", statistic("between_class"), normalize="mean"),
    "gate_bn": Criterion("gate", mean_of, normalize="mean", gamma=True),
    "gate_energy": Criterion("gate", statistic("energy_after"), normalize="mean"),
    "l1": Criterion("weights", weights.l1, normalize="mean"),
    "l2": Criterion("weights", weights.l2, normalize="mean"),
    "bn_scale": Criterion("weights", weights.bn_scale, normalize="mean"),
    "lamp": Criterion("weights", weights.lamp),
    "fpgm": Criterion("weights", weights.fpgm, normalize="mean"),
    "taylor": Criterion("moments", weights.taylor, "weights", normalize="mean"),
    "hessian": Criterion("moments", weights.hessian, "weights", normalize="mean"),
    "random": Criterion("weights", weights.random),
    "uniform": Criterion("weights", weights.uniform),
}


def criterion(name: str) -> Criterion:
    """The criterion of that name.

    Raises:
        UsageError: unknown; names the close ones.
    """
    if name not in CRITERIA:
        close = difflib.get_close_matches(name, CRITERIA, 3, 0.4) or list(CRITERIA)
        raise UsageError(
            f"importance.criterion: unknown criterion '{name}'",
            why=f"known: {', '.join(CRITERIA)}",
            fix=f"importance.criterion={close[0]}",
            code="criterion",
        )
    return CRITERIA[name]


def score(
    structure: NetworkStructure,
    statistics: GateStatistics | None = None,
    *,
    model: nn.Module | None = None,
    scoring: Scoring | None = None,
) -> Importance:
    """One score per unit of every group.

    Args:
        statistics: needed by all but the weight criteria, collected with the criterion's
            gradients; derivatives were collected with `structure`.
        model: needed by all that looks at weights: those criteria, `taylor`, `hessian`,
            `gate_bn`, and `ungated="propagate"`.

    Raises:
        UsageError: unknown criterion.
        InputError: the statistics lack what the criterion needs, or a score is not finite.
    """
    scoring = scoring or Scoring()
    rule = criterion(scoring.criterion)
    if statistics is not None:
        require_fit(structure, statistics, model)
    if rule.family == "weights":
        scores = _of_weights(structure, rule, _needed(model), scoring.seed)
    elif statistics is None:
        raise _lacking(scoring.criterion, "no statistics were given")
    elif rule.family == "moments":
        _require(statistics, rule, scoring.criterion)
        scores = _of_weights(structure, rule, _needed(model), statistics.weights)
    elif rule.family == "gate":
        scaling = _needed(model) if rule.gamma else None
        scores = _gate_scores(structure, statistics, rule, scoring.combine, scaling)
        scores = _with_ungated(model, structure, scores, scoring)
    elif rule.family == "ordered":
        ranks = _gate_scores(structure, statistics, rule, "mean")
        ranks = _with_ungated(model, structure, ranks, scoring) if ranks else ranks
        effects = _effects(structure, statistics, replace(rule, of=_SQUARE), scoring)
        scores = effects | _in_order(ranks, effects, statistics, scoring.combine)
    else:
        scores = _effects(structure, statistics, rule, scoring)
    normalize = rule.normalize if scoring.normalize is None else scoring.normalize
    made = {name: _normalized(value.double(), normalize) for name, value in scores.items()}
    for name, value in made.items():
        if not bool(torch.isfinite(value).all()):
            raise InputError(
                f"criterion '{scoring.criterion}' gives a score that is not finite in group "
                f"'{name}'",
                why="the statistics or weights hold NaN or infinities",
                fix="check the weights with: seprune inspect MODEL --checkpoint F",
                code="nonfinite",
            )
    additive = rule.of is _SQUARE or rule.family == "ordered"
    return Importance(scoring.criterion, made, additive and normalize == "none")


def _needed(model: nn.Module | None) -> nn.Module:
    if model is None:
        raise UsageError(
            "this criterion looks at weights, and no model was given",
            why="statistics alone do not hold them",
            fix="score(..., model=model)",
        )
    return model


def _lacking(name: str, why: str) -> InputError:
    gradients = CRITERIA[name].gradients
    return InputError(
        f"criterion '{name}' cannot be computed",
        why=why,
        fix=f"collect again: seprune collect ... --gradients {gradients}",
        code="statistics",
    )


def _require(statistics: GateStatistics, rule: Criterion, name: str) -> None:
    if statistics.gradients != rule.gradients:
        raise _lacking(
            name,
            f"the statistics hold gradients of '{statistics.gradients}', "
            f"it needs '{rule.gradients}'",
        )


def _of_weights(
    structure: NetworkStructure, rule: Criterion, model: nn.Module, more: object
) -> dict[str, Tensor]:
    """Groups that the criterion has a score for; `more`: the seed, or moments by weight."""
    found = {g.name: rule.of(model, g, more) for g in structure.groups}
    return {name: value for name, value in found.items() if value is not None}


def _gate_scores(
    structure: NetworkStructure,
    statistics: GateStatistics,
    rule: Criterion,
    combine: Combine,
    model: nn.Module | None = None,
) -> dict[str, Tensor]:
    """Groups that gates scale: the statistic of their gates, combined.

    Args:
        model: where each gate's part is to be multiplied by the scale of its norm.
    """
    scores, layers = {}, {g.name: g.scales for g in statistics.gates}
    for group in structure.groups:
        found = []
        for link in (k for k in group.gates if k.gate in statistics.values):
            value = rule.of(statistics.values[link.gate])[torch.from_numpy(link.index)].mean(1)
            gamma = 1 if model is None else weights.gamma_of(model, group, layers[link.gate])
            found.append(value * gamma)
        if found:
            scores[group.name] = _combined(torch.stack(found), combine)
    return scores


def _with_ungated(
    model: nn.Module | None,
    structure: NetworkStructure,
    scores: dict[str, Tensor],
    scoring: Scoring,
) -> dict[str, Tensor]:
    """Scores of gated groups, and those of the others as `ungated` says."""
    if scoring.ungated == "propagate" or (scoring.ungated == "unit" and model is not None):
        return propagate(_needed(model), structure, scores)
    return scores


def _in_order(
    ranks: Mapping[str, Tensor],
    effects: Mapping[str, Tensor],
    statistics: GateStatistics,
    combine: Combine,
) -> dict[str, Tensor]:
    """The effects of each ranked group, in the order of its ranks."""
    scores = {}
    for name in sorted(set(ranks) & set(effects) & set(statistics.groups)):
        own = statistics.groups[name]
        squares, total = own["effect_square"], own["effect_sum_square"]
        alike = correlation(squares, total) if combine == "joint" else 0.0
        scores[name] = effects_in_order(ranks[name], squares, alike)
    return scores


def _effects(
    structure: NetworkStructure, statistics: GateStatistics, rule: Criterion, scoring: Scoring
) -> dict[str, Tensor]:
    _require(statistics, rule, scoring.criterion)
    scores = {}
    for group in structure.groups:
        if scoring.ungated == "none" and not group.gates:
            continue
        if scoring.combine in ("coupled", "joint"):
            if group.name in statistics.groups:
                scores[group.name] = _coupled(statistics.groups[group.name], rule, scoring)
            continue
        parts = [_of_source(statistics, rule, s.kind, s.name, s.index) for s in group.sources]
        if parts:
            scores[group.name] = _combined(torch.stack(parts), scoring.combine)
    if not scores:
        raise _lacking(scoring.criterion, "the statistics were collected for other groups")
    return scores


def _coupled(own: Mapping[str, Tensor], rule: Criterion, scoring: Scoring) -> Tensor:
    if scoring.combine == "joint" and rule.of is _SQUARE:
        return joint_scores(own["effect_square"], own["effect_sum_square"])
    values: Tensor = rule.of(own)
    return values


def _of_source(
    statistics: GateStatistics, rule: Criterion, kind: str, name: str, index: object
) -> Tensor:
    table = statistics.values if kind == "gate" else statistics.units
    values: Tensor = rule.of(table[name])
    return values[torch.as_tensor(index)].sum(1)


def _combined(parts: Tensor, combine: Combine) -> Tensor:
    if combine == "max":
        return parts.max(0).values
    return parts.sum(0) if combine == "sum" else parts.mean(0)


def _normalized(score: Tensor, how: Normalize) -> Tensor:
    if how == "none" or not len(score):
        return score
    if how == "rank":
        return score.argsort(stable=True).argsort(stable=True).double() / len(score)
    if how == "standard":
        return (score - score.mean()) / score.std(correction=0).clamp_min(1e-300)
    size = {"mean": score.mean(), "max": score.max(), "sum": score.sum()}[how]
    return score / size.abs().clamp_min(1e-300)
