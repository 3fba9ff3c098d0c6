"""`GateStatistics`: what was collected, of which model, data and preprocessing."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from seprune.data.fingerprint import difference
from seprune.errors import InputError
from seprune.graph.gates import Gate
from seprune.runtime.short_table import ShortTable, Tabular
from seprune.runtime.typed import Natural, typed
from seprune.statistics.stored import read_tensors, write_tensors

Table = dict[str, dict[str, Tensor]]

FORMAT = 3
_WHAT = "gate statistics"
_AGAIN = "restore the file, or collect again: seprune collect"
KINDS = ("values", "units", "groups", "weights")


@dataclass(frozen=True, repr=False)
class GateStatistics(Tabular):
    """Statistics by name; the formulas are in docs/importance.md.

    Attributes:
        gates: every gate of the model, those that never run included.
        values: gate name -> statistic -> float64 tensor of shape (C,); `class_mean` is
            (classes, C), `class_count` (classes,), `rank_agreement` a scalar.
        units: module name -> moments of u of its unit gates, where `units` were asked for.
        groups: coupling name -> moments of the coupled u, and `effect_sum_square` (1,), the mean
            square of its sum over the group.
        weights: weight -> `taylor`, `hessian` (outputs, inputs), where gradients are `weights`.
        samples: images seen.
        classes: outputs of the model, 0 where the images had no labels.
        gradients: which derivative u is made of.
        warnings: what makes these statistics weaker than they look, in words.
        meta: hashes of `model`, `data` and `preprocessing`, and what else the caller noted.
    """

    gates: tuple[Gate, ...]
    values: Table
    samples: int
    classes: int = 0
    gradients: str = "none"
    units: Table = field(default_factory=dict)
    groups: Table = field(default_factory=dict)
    weights: Table = field(default_factory=dict)
    warnings: tuple[str, ...] = ()
    meta: Mapping[str, str] = field(default_factory=dict)

    def _short_table(self) -> ShortTable:
        count = f"images: {self.samples:,}, gates: {len(self.values)}"
        title = f"{count}, derivatives: {self.gradients}"
        rows = [
            (name, table["mean"].numel(), f"{float(table['mean'].mean()):.4f}")
            for name, table in self.values.items()
        ]
        return ShortTable.of(title, ("gate", "channels", "mean"), rows)

    def require(self, **expected: str) -> None:
        """Refuse statistics of another `model`, `data` or `preprocessing` (hashes).

        Raises:
            InputError: names which of them differ.
        """
        require_same(self.meta, expected, what="the statistics")

    def save(self, path: Path) -> None:
        """Write one safetensors file, atomically."""
        tensors = {
            f"{kind}/{owner}/{name}": value
            for kind in KINDS
            for owner, own in getattr(self, kind).items()
            for name, value in own.items()
        }
        write_tensors(path, tensors, {"format": FORMAT, "what": _WHAT} | self._facts())

    def _facts(self) -> dict[str, Any]:
        names = [f.name for f in fields(_GateFacts)]
        gates = [{name: getattr(gate, name) for name in names} for gate in self.gates]
        plain = {key: getattr(self, key) for key in ("samples", "classes", "gradients")}
        return plain | {"gates": gates, "warnings": list(self.warnings), "meta": dict(self.meta)}

    @classmethod
    def load(cls, path: Path) -> GateStatistics:
        """Read what `save` wrote.

        Raises:
            InputError: missing, damaged, of another kind or of a newer version.
        """
        tensors, content = read_tensors(path, what=_WHAT)
        if content.get("what") != _WHAT or content.get("format") != FORMAT:
            raise InputError(
                f"{path}: {str(content.get('what', 'a file'))[:60]} of format "
                f"{str(content.get('format'))[:60]}",
                why=f"this seprune reads {_WHAT} of format {FORMAT}",
                fix="install the seprune that wrote it, or collect again: seprune collect",
            )
        facts = typed(_StatisticsFacts, content, source=str(path), fix=_AGAIN, code="damaged")
        kinds: dict[str, Table] = {kind: _Complete(kind) for kind in KINDS}
        for key, value in tensors.items():
            kind, _, rest = key.partition("/")
            owner, _, name = rest.rpartition("/")
            _require_ours(path, key, value, known=kind in kinds and bool(owner))
            kinds[kind].setdefault(owner, _Complete(f"{kind}/{owner}"))[name] = value
        _require_shapes(path, facts, kinds)
        return cls(
            gates=tuple(Gate(**vars(gate)) for gate in facts.gates),
            samples=facts.samples,
            classes=facts.classes,
            gradients=facts.gradients,
            warnings=facts.warnings,
            meta=facts.meta,
            **kinds,
        )


class _Complete(dict[str, Any]):
    """A table out of a file: what it lacks is the file's fault."""

    def __init__(self, where: str) -> None:
        super().__init__()
        self.where = where

    def __missing__(self, name: str) -> NoReturn:
        raise InputError(
            f"the statistics lack {self.where}/{name}",
            why="they were collected for another criterion or network, or were edited",
            fix="collect again for this network and criterion: seprune collect",
            code="statistics",
        )


@dataclass(frozen=True)
class _GateFacts:
    """What a file keeps of a gate."""

    name: str
    channels: Natural
    squeeze: str
    activation: str
    placement: str
    scales: tuple[str, ...]
    excitation: tuple[str, ...]
    runs: bool


@dataclass(frozen=True)
class _StatisticsFacts:
    """What a file of statistics says beside its tensors."""

    samples: Natural
    classes: Natural
    gradients: str
    gates: list[_GateFacts]
    warnings: tuple[str, ...]
    meta: dict[str, str]


def described(gate: Gate) -> Gate:
    """What a file keeps of a gate: everything but where it sits in the live model."""
    return Gate(**{f.name: getattr(gate, f.name) for f in fields(_GateFacts)})


def _require_ours(path: Path, key: str, value: Tensor, *, known: bool) -> None:
    """Refuse a tensor that no collection makes."""
    if not known:
        why = f"{key!r} is no statistic of a gate, a unit gate, a group or a weight"
    elif value.dtype != torch.float64:
        why = f"{key} is {value.dtype}, statistics are float64"
    elif not value.numel() or not bool(torch.isfinite(value).all()):
        why = f"{key} is empty, or holds NaN or infinities"
    else:
        return
    raise InputError(f"{path}: not {_WHAT} that seprune wrote", why=why, fix=_AGAIN, code="damaged")


def _require_shapes(path: Path, facts: _StatisticsFacts, kinds: Mapping[str, Table]) -> None:
    """Refuse tables that are not as wide as their gate, or whose columns differ in length."""
    channels = {gate.name: gate.channels for gate in facts.gates}
    for kind in ("values", "units", "groups"):
        for owner, own in kinds[kind].items():
            width = channels.get(owner, 0) if kind == "values" else _width(own)
            wrong = [n for n, t in own.items() if t.shape != _shape(n, width, facts.classes)]
            if wrong or not width:
                first = wrong[0] if wrong else next(iter(own))
                raise InputError(
                    f"{path}: not {_WHAT} that seprune wrote",
                    why=f"{kind}/{owner}/{first} has the shape {tuple(own[first].shape)}",
                    fix=_AGAIN,
                    code="damaged",
                )


def _width(own: Mapping[str, Tensor]) -> int:
    return next((t.numel() for name, t in own.items() if name == "effect_square"), 0)


def _shape(name: str, width: int, classes: int) -> tuple[int, ...]:
    """Of the statistic of that name."""
    odd: dict[str, tuple[int, ...]] = {
        "rank_agreement": (),
        "effect_sum_square": (1,),
        "class_count": (classes,),
        "class_mean": (classes, width),
    }
    return odd.get(name, (width,))


def require_same(
    found: Mapping[str, str],
    expected: Mapping[str, str],
    *,
    what: str,
    fix: str = "collect again for this model and data: seprune collect",
) -> None:
    """Refuse to mix: every key of `expected` must be the same in `found`."""
    wrong = [key for key, value in expected.items() if found.get(key) != value]
    if wrong:
        raise InputError(
            f"{what} belong to another {' and another '.join(wrong)}",
            why="; ".join(_told_apart(key, found.get(key), expected[key]) for key in wrong),
            fix=fix,
        )


def _told_apart(key: str, found: str | None, expected: str) -> str:
    known = f"{key} is {_short(found)}, wanted {_short(expected)}"
    if key != "data" or found is None:
        return known
    return f"{known} ({difference(found, expected)})"


def _short(value: str | None) -> str:
    return "not noted" if value is None else repr(value if len(value) <= 40 else value[:12] + "…")


def fingerprint(model: nn.Module) -> str:
    """The SHA-256 of a model's state: names, shapes, dtypes and values."""
    digest = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        if isinstance(tensor, Tensor):
            plain = tensor.detach().cpu().contiguous().reshape(-1)
            digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}\n".encode())
            digest.update(plain.view(torch.uint8).numpy().data)
    return digest.hexdigest()
