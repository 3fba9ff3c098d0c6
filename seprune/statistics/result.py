"""`GateStatistics`: what was collected, of which model, data and preprocessing."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from seprune.data.fingerprint import difference
from seprune.errors import InputError
from seprune.graph.gates import Gate
from seprune.runtime.short_table import ShortTable, Tabular
from seprune.statistics.stored import read_tensors, write_tensors

Table = dict[str, dict[str, Tensor]]

FORMAT = 3
_WHAT = "gate statistics"
_GATE_FACTS = (
    "name",
    "channels",
    "squeeze",
    "activation",
    "placement",
    "scales",
    "excitation",
    "runs",
)
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
        gates = [{key: getattr(gate, key) for key in _GATE_FACTS} for gate in self.gates]
        plain = {key: getattr(self, key) for key in ("samples", "classes", "gradients")}
        return plain | {"gates": gates, "warnings": list(self.warnings), "meta": dict(self.meta)}

    @classmethod
    def load(cls, path: Path) -> GateStatistics:
        """Read what `save` wrote.

        Raises:
            InputError: missing, damaged, of another kind or of a newer version.
        """
        tensors, facts = read_tensors(path, what=_WHAT)
        if facts.get("what") != _WHAT or facts.get("format") != FORMAT:
            raise InputError(
                f"{path}: {facts.get('what', 'a file')} of format {facts.get('format')!r}",
                why=f"this seprune reads {_WHAT} of format {FORMAT}",
                fix="install the seprune that wrote it, or collect again: seprune collect",
            )
        kinds: dict[str, Table] = {kind: {} for kind in KINDS}
        for key, value in tensors.items():
            kind, _, rest = key.partition("/")
            owner, _, name = rest.rpartition("/")
            kinds[kind].setdefault(owner, {})[name] = value
        gates = tuple(_gate(facts_of_gate) for facts_of_gate in facts["gates"])
        return cls(
            gates=gates,
            samples=facts["samples"],
            classes=facts["classes"],
            gradients=facts["gradients"],
            warnings=tuple(facts["warnings"]),
            meta=facts["meta"],
            **kinds,
        )


def described(gate: Gate) -> Gate:
    """What a file keeps of a gate: everything but where it sits in the live model."""
    return _gate({key: getattr(gate, key) for key in _GATE_FACTS})


def _gate(facts: dict[str, Any]) -> Gate:
    lists = {key: tuple(facts[key]) for key in ("scales", "excitation")}
    return Gate(**(facts | lists))


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
