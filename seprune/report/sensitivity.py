"""What the network loses without a part of one dependency group, as a table."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from seprune.measure.metric_names import metric_title, metric_value
from seprune.report import words

EXPLANATION = (
    "The metric and, in brackets, the loss, against the uncut network, when the lowest-scored "
    "part of one dependency group is masked and nothing else; on images of the validation split, "
    "without recovery."
)


def head(found: Mapping[str, Any]) -> list[str]:
    """Column names: the group, its units, the MACs of one of them, and a column a share."""
    return ["group", "units", "MACs a unit", *(f"-{share:.0%}" for share in found["shares"])]


def rows(found: Mapping[str, Any]) -> list[list[str]]:
    """A row a group, in the order of the network."""
    return [
        [row["group"], str(row["units"]), words.quantity(row["macs"]), *_cells(found, row)]
        for row in found["groups"]
    ]


def caption(found: Mapping[str, Any]) -> str:
    """What the numbers are measured against."""
    return (
        f"by {found['criterion']}, {found['images']:,} validation images, "
        f"uncut: {metric_title(found['metric'])} "
        f"{metric_value(found['metric'], found['value'])}, loss {found['loss']:.3f}"
    )


def _cells(found: Mapping[str, Any], row: Mapping[str, Any]) -> list[str]:
    cells = []
    for value, loss in zip(row["value"], row["loss"]):
        more = words.DASH if loss is None else f"{loss - found['loss']:+.2f}".replace("-", "−")
        change = words.metric_change(found["metric"], value - found["value"])
        cells.append(f"{change} ({more})")
    return cells
