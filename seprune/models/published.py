"""What the zoos say of the weights that they publish: preprocessing and accuracy."""

from __future__ import annotations

from typing import Any

from seprune.models import zoos
from seprune.models.preprocessing import Preprocessing, of_timm


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
