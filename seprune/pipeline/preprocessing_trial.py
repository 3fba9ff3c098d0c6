"""Which preprocessing a network was trained with: candidates compared by their loss on the data."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import nn

from seprune.data import Data
from seprune.data.preprocessing import CIFAR, DIGITS, GREY, IMAGENET, Levels, normalise
from seprune.measure.metrics import evaluate
from seprune.models.preprocessing import Preprocessing

IMAGES = 256
AS_GOOD = 1.02  # of the lowest loss: what is below fits as well
CLIP: Levels = ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))
CAFFE: Levels = (
    (0.40784314, 0.45882353, 0.48627451),
    (0.00392157,) * 3,
)  # BGR less its mean, 0-255


@dataclass(frozen=True)
class PreprocessingTrial:
    """One candidate, and what the network made of the images."""

    name: str
    preprocessing: Preprocessing
    loss: float
    metric: str
    value: float


def try_preprocessing(
    model: nn.Module,
    data: Data,
    *,
    device: torch.device,
    published: Preprocessing | None = None,
    seed: int = 0,
) -> list[PreprocessingTrial]:
    """The loss of the network on calibration images, by each candidate; the lowest first.

    The candidates share the size and the crop, so that every image is decoded once.

    Args:
        published: of the weights that the network's name is known for.
    """
    loader = data.calibration(IMAGES, seed=seed)
    loader.rows = loader.rows[:IMAGES]
    targets = getattr(loader.store, "targets", loader.store.labels)
    batches = [(pixels, targets[rows]) for pixels, rows in zip(loader.pixels(), loader.own_rows())]
    trials = []
    for name, candidate in _candidates(data.info.preprocessing, published):
        prepared = [(normalise(pixels, candidate), wanted) for pixels, wanted in batches]
        found = evaluate(model, prepared, device=device, task=data.task)
        trials.append(PreprocessingTrial(name, candidate, found.loss, found.metric, found.value))
    return sorted(
        trials, key=lambda trial: trial.loss if trial.loss == trial.loss else float("inf")
    )


def fits(trials: list[PreprocessingTrial], used: Preprocessing) -> bool:
    """Whether what is used is as good as the best of the candidates."""
    own = next(t for t in trials if not t.preprocessing.differences(used))
    return own.loss <= trials[0].loss * AS_GOOD


def _candidates(
    used: Preprocessing, published: Preprocessing | None
) -> Iterator[tuple[str, Preprocessing]]:
    """The one in use, and others that differ from it and from each other."""
    channels = used.shape[0]
    usual: list[tuple[str, Levels, bool]] = [
        ("-1 to 1", ((0.5,) * channels, (0.5,) * channels), False),
        ("0 to 1", ((0.0,) * channels, (1.0,) * channels), False),
    ]
    if channels == 3:
        usual += [("ImageNet", IMAGENET, False), ("CIFAR-10", CIFAR, False), ("CLIP", CLIP, False)]
        flipped = tuple(v[::-1] for v in IMAGENET)
        usual += [("ImageNet, BGR", flipped, True), ("Caffe, BGR", CAFFE, True)]  # type: ignore[list-item]
    if channels == 1:
        usual += [("MNIST", GREY, False), ("digits", DIGITS, False)]
    if published is not None and published.shape[0] == channels:
        usual.insert(0, ("published", published.levels, published.channel_order == "bgr"))
    seen = [used]
    yield "in use", used
    for name, (mean, std), reversed_ in usual:
        order = "bgr" if reversed_ else "rgb"
        made = replace(used, mean=mean, std=std, channel_order=order, source=name)  # type: ignore[arg-type]
        if all(made.differences(other) for other in seen):
            seen.append(made)
            yield name, made
