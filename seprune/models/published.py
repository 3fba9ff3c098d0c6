"""What the zoos say of the weights that they publish: preprocessing and accuracy."""

from __future__ import annotations

import re
from typing import Any

from seprune.models import hub, zoos
from seprune.models.preprocessing import Preprocessing, of_timm
from seprune.runtime.reading import read_text
from seprune.runtime.timeout import at_most

CARD_LIMIT, CARD_SECONDS = 1 << 20, 5.0  # bytes of a card, and for the YAML in it


def published_preprocessing(name: str) -> Preprocessing | None:
    """That of the weights that a name of torchvision or timm stands for; None without any."""
    zoo, _, rest = name.partition("/")
    if zoo == "timm" and zoos.has(zoo, rest):
        config = zoos.timm_config(rest)
        return of_timm(config, f"published with timm/{rest}") if config.get("mean") else None
    if zoo == "torchvision" and zoos.has(zoo, rest):
        weights = zoos.torchvision_weights(rest, rest.partition(".")[2] or "DEFAULT")
        return None if weights is None else of_torchvision(weights)
    return None


def card_metrics(repo: hub.HubRepo, side: int | None = None) -> dict[str, float]:
    """The top-1 accuracy that the card of a repository states, as a fraction; nothing without.

    In its front matter, or in the table of results that cards of timm have.

    Args:
        side: of the images, one of several that such a table has rows for.
    """
    try:
        text, results = _card_of(repo)
    except Exception:  # a card is prose of other people's: without it nothing is missing
        return {}
    stated = [r.metric_value for r in results if r.metric_type in ("accuracy", "top1", "acc@1")]
    for value in (*stated, *_in_table(text, repo.name.partition("/")[2], side)):
        if isinstance(value, int | float) and 0 <= value <= 100:
            return {"top1": value / (100 if value > 1 else 1)}
    return {}


def _card_of(repo: hub.HubRepo) -> tuple[str, list[Any]]:
    """The text of a repository's card, and the results that its front matter states."""
    path = hub.if_there(repo, "README.md")
    text = read_text(path, limit=CARD_LIMIT) if path else ""
    with at_most(CARD_SECONDS, TimeoutError):
        stated = text.startswith("---") and hub.hub_library().ModelCard(text).data.eval_results
    return text, list(stated or [])


LONGEST = 300  # characters of a cell that may name a network


def _in_table(text: str, name: str, side: int | None) -> list[float]:
    """What the rows of tables say of the network `name` at a size of images."""
    found, head = [], list[str]()
    for line in text.splitlines():
        cells = [cell.strip() for cell in line.strip().strip("|").split("|")]
        if {"model", "img_size", "top1"} <= set(cells):
            head = cells
        elif len(cells) == len(head):
            row = dict(zip(head, cells))
            own = re.fullmatch(r"\[?(.+?)(\]\(.*\))?", row["model"][:LONGEST])
            if own and own[1] == name and row["img_size"] == str(side):
                found += [float(row["top1"])] if re.fullmatch(r"\d+(\.\d+)?", row["top1"]) else []
    return found


def of_torchvision(weights: Any) -> Preprocessing | None:
    """The transforms of an entry of a weights enum; None for detectors, which have their own."""
    made = weights.transforms()
    if not hasattr(made, "mean"):
        return None
    [side] = made.resize_size
    crop = getattr(made, "crop_size", [side])[0]
    cut = hasattr(made, "crop_size")
    return Preprocessing(
        (3, crop, crop),
        tuple(made.mean),
        tuple(made.std),
        resize=(max(side, crop),) * 2,
        scaling="cover" if cut else "stretch",
        interpolation=made.interpolation.value,
        source=f"published with {weights}",
    )
