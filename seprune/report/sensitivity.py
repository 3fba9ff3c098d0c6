"""What the network loses without a part of one dependency group, as a table."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from seprune.report import words

EXPLANATION = (
    "Top-1 in points and, in brackets, loss, against the uncut network, when the lowest-scored "
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
        f"uncut: top-1 {words.percent(found['top1'])}, loss {found['loss']:.3f}"
    )


def _cells(found: Mapping[str, Any], row: Mapping[str, Any]) -> list[str]:
    cells = []
    for top1, loss in zip(row["top1"], row["loss"]):
        more = words.DASH if loss is None else f"{loss - found['loss']:+.2f}".replace("-", "−")
        cells.append(f"{words.points(top1 - found['top1'])} ({more})")
    return cells
