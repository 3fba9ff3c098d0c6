"""JSON becomes typed values, or an error that names file, place, expectation and find."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, TypedDict

import pytest
import torch

from seprune.errors import InputError
from seprune.runtime.files import write_json
from seprune.runtime.typed import Natural, fits, read_typed, require_like, skim, typed


@dataclass(frozen=True)
class Inner:
    size: Natural
    name: str | None = None


class Numbers(TypedDict):
    value: float


@dataclass(frozen=True)
class Outer:
    inner: list[Inner]
    pair: tuple[float, float]
    numbers: Numbers
    more: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.pair[0] > self.pair[1]:
            raise ValueError("the pair descends")


def document(**changes: Any) -> dict[str, Any]:
    right = {"inner": [{"size": 3}, {"size": 0, "name": "x\udcff"}], "pair": [1, 2.5]}
    return {**right, "numbers": {"value": 1}, **changes}


def test_what_fits_becomes_the_types():
    found = typed(Outer, document(later="unknown keys are passed over"), source="f", fix="g")
    assert found == Outer([Inner(3), Inner(0, "x\udcff")], (1.0, 2.5), {"value": 1.0})
    assert type(found.pair[0]) is float


@pytest.mark.parametrize(
    ("changes", "place"),
    [
        ({"inner": [{"size": "3"}]}, "inner[0].size: expected int, got str"),
        ({"inner": [{"size": True}]}, "inner[0].size: expected int, got bool"),
        ({"inner": [{"size": 3.0}]}, "inner[0].size: expected int, got float"),
        ({"inner": [{"size": -1}]}, "inner[0].size: expected int >= 0"),
        ({"inner": [{}]}, "inner[0]: object missing required field size"),
        ({"inner": {}}, "inner: expected array, got object"),
        ({"pair": [1]}, "pair: expected array of length 2"),
        ({"pair": [2, 1]}, "the document: the pair descends"),
        ({"numbers": {}}, "numbers: object missing required field value"),
        ({"more": None}, "more: expected object, got null"),
    ],
)
def test_what_does_not_fit_is_named(tmp_path, changes, place):
    path = tmp_path / "f.json"
    write_json(path, document(**changes))
    with pytest.raises(InputError) as caught:
        read_typed(Outer, path, fix="mend it", code="damaged")
    error = caught.value
    assert error.what.startswith(f"{path}: {place}")
    assert (error.code, error.exit_status, error.fix) == ("damaged", 3, "mend it")
    assert not fits(Outer, document(**changes))


def test_of_a_large_document_the_rest_is_only_skimmed(tmp_path):
    path = tmp_path / "f.json"
    rest = "[" + ",".join(["[1, 2]"] * 10) + "]"
    path.write_text(f'{{"inner": [], "pair": [0, 0], "numbers": {{"value": 2}}, "x": {rest}}}')
    assert skim(Outer, path, fix="g", code="c").numbers == {"value": 2.0}
    path.write_text('{"inner": [')
    with pytest.raises(InputError, match="not valid JSON"):
        skim(Outer, path, fix="g", code="c")


@pytest.mark.parametrize(
    ("found", "why"),
    [
        ({}, "a is missing"),
        ({"a": torch.zeros(2), "b": torch.zeros(2)}, "'b' does not belong there"),
        ({"a": torch.zeros(1)}, r"a is \(1,\) torch.float32, not \(2,\) torch.float32"),
        ({"a": torch.zeros(2).double()}, "a is .*float64, not .*float32"),
    ],
)
def test_tensors_of_other_names_shapes_and_types_are_refused(found, why):
    own = {"a": torch.ones(2)}
    require_like({"a": torch.zeros(2)}, own, source="f", fix="g")
    with pytest.raises(InputError, match=why):
        require_like(found, own, source="f", fix="g")
