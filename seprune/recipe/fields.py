"""Types of a recipe's values: what each accepts, and what the JSON Schema says of it."""

from __future__ import annotations

import math
import os
import re
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field, WithJsonSchema

from seprune.errors import SepruneError
from seprune.recipe.budget import parse_limit

Written = float | str


def _home(value: str) -> str:
    """`~` means the home folder, also after a data set's name; variables stay as they are."""
    head, colon, tail = value.partition(":~")
    return head + ":" + os.path.expanduser("~" + tail) if colon else os.path.expanduser(value)


def _scalar(value: Any) -> Any:
    if not isinstance(value, (int, float, str)):
        raise ValueError("must be a number, a text, true or false")
    return value


def _budgets(value: Any) -> tuple[Written, ...]:
    values = tuple(value) if isinstance(value, (list, tuple)) else (value,)
    if not values or not all(map(_is_limit, values)):
        raise ValueError("must be a fraction kept, between 0 and 1, or an amount like 20M or 1.5G")
    return values


def _is_limit(value: Any) -> bool:
    """A fraction is a number and an amount a text; a bare 20 would be an amount of 20 MACs."""
    try:
        return isinstance(value, float | str) and (
            parse_limit("", value).is_fraction is isinstance(value, float)
        )
    except SepruneError:
        return False


def _times(value: Any) -> tuple[Any, ...]:
    values = tuple(value) if isinstance(value, (list, tuple)) else (value,)
    if not values or not all(map(_is_time, values)):
        raise ValueError("must be a fraction kept, between 0 and 1, or a time like 4ms")
    return values


def _is_time(value: Any) -> bool:
    """A fraction as a number, or milliseconds as a text."""
    try:
        limit = parse_limit("latency", value)
    except SepruneError:
        return False
    return limit.milliseconds if isinstance(value, str) else isinstance(value, float)


def _rate(value: Any) -> Any:
    value = _number_or_auto(value)
    if value != "auto" and value <= 0:
        raise ValueError("must be greater than 0")
    return value


def _weight(value: Any) -> Any:
    value = _number_or_auto(value)
    if value != "auto" and not 0 <= value <= 1:
        raise ValueError("must be between 0 and 1")
    return value


def _number_or_auto(value: Any) -> Any:
    if value == "auto":
        return "auto"
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise ValueError("must be a number or auto")
    if not math.isfinite(value):
        raise ValueError("must be a finite number")
    return float(value)


def _memory(value: Any) -> int | str:
    """Bytes, from a number or a text like 2GB; binary units, as memory is sold and counted."""
    written = re.fullmatch(r"(\d+(?:\.\d+)?) ?([KMGT])i?B", str(value).strip())
    if written:
        value = int(float(written[1]) * 1024 ** (1 + "KMGT".index(written[2])))
    if value == "auto" or (type(value) is int and 0 < value <= _MOST_MEMORY):
        return value  # type: ignore[no-any-return]
    raise ValueError("must be auto, or bytes as a number or like 2GB")


_MOST_MEMORY = 1 << 60
RUNTIMES = ("eager", "compiled", "onnx", "openvino")


def _runtimes(value: Any) -> bool | tuple[str, ...]:
    if isinstance(value, bool):
        return value
    if not isinstance(value, (list, tuple)) or not value or set(value) - set(RUNTIMES):
        raise ValueError(f"must be true, false or a list of {', '.join(RUNTIMES)}")
    return tuple(dict.fromkeys(value))


_ONE_BUDGET = {"type": ["number", "string"], "exclusiveMinimum": 0, "exclusiveMaximum": 1}
Budgets = Annotated[
    tuple[Written, ...],
    BeforeValidator(_budgets),
    WithJsonSchema({"anyOf": [_ONE_BUDGET, {"type": "array", "items": _ONE_BUDGET}]}),
]
Times = Annotated[
    tuple[Written, ...],
    BeforeValidator(_times),
    WithJsonSchema({"anyOf": [_ONE_BUDGET, {"type": "array", "items": _ONE_BUDGET}]}),
]
Runtimes = Annotated[
    Any,
    BeforeValidator(_runtimes),
    WithJsonSchema(
        {"anyOf": [{"type": "boolean"}, {"type": "array", "items": {"enum": list(RUNTIMES)}}]}
    ),
]
Location = Annotated[str, Field(min_length=1), AfterValidator(_home)]
Scalar = Annotated[
    Any, BeforeValidator(_scalar), WithJsonSchema({"type": ["number", "string", "boolean"]})
]
LARGEST = 10**9
"""Of any number of things: beyond it lie mistakes, and what libraries cannot count."""
Count = Annotated[int, Field(ge=1, le=LARGEST)]
Natural = Annotated[int, Field(ge=0, le=LARGEST)]
SmallCount = Annotated[int, Field(ge=1, le=1024)]
Rate = Annotated[
    Any,
    BeforeValidator(_rate),
    WithJsonSchema({"anyOf": [{"type": "number", "exclusiveMinimum": 0}, {"const": "auto"}]}),
]
Weight = Annotated[
    Any,
    BeforeValidator(_weight),
    WithJsonSchema({"anyOf": [{"type": "number", "minimum": 0, "maximum": 1}, {"const": "auto"}]}),
]
Memory = Annotated[
    Any,
    BeforeValidator(_memory),
    WithJsonSchema(
        {
            "anyOf": [
                {"const": "auto"},
                {"type": "integer", "minimum": 1, "maximum": _MOST_MEMORY},
                {"type": "string", "pattern": r"^\d+(\.\d+)? ?[KMGT]i?B$"},
            ]
        }
    ),
]
Fraction = Annotated[float, Field(ge=0, lt=1)]
Amount = Annotated[float, Field(ge=0)]

Tasks = Literal[
    "classification", "multi_label", "regression", "segmentation", "detection", "embedding"
]

Trackers = Literal["tensorboard", "wandb", "mlflow", "trackio"]
TrackerNames = tuple[Trackers, ...]
ChannelOrders = Literal["rgb", "bgr"]
Interpolations = Literal["nearest", "bilinear", "bicubic", "lanczos", "box", "hamming"]

Gradients = Literal["auto", "none", "labels", "sampled", "smoothed", "logits", "weights"]
