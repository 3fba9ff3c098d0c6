"""Images of the classes that a gate lets through least and most."""

from __future__ import annotations

import base64
import copy
from collections.abc import Mapping, Sequence
from io import BytesIO

import torch
from torch import Tensor
from torchvision.transforms.v2.functional import to_pil_image

from seprune.data import Loader
from seprune.report import ClassExamples, GateSummary
from seprune.report.gate_figures import stage_ends

LARGEST = 96  # pixels on a side
Values = Mapping[str, Mapping[str, Tensor]]  # of `GateStatistics.values`


def class_examples(
    loader: Loader,
    names: Sequence[str],
    values: Values,
    gates: Sequence[GateSummary],
    *,
    count: int,
) -> list[ClassExamples]:
    """Up to `count` images of two classes for the last gate of each stage.

    The excitation of a class is its mean over the images of the class and over the channels. A
    gate that saw fewer than two classes has none.

    Args:
        loader: of the calibration images; nothing else is read.
        names: of the classes.
    """
    found = [end for gate in stage_ends(gates) for end in _ends(gate.name, values[gate.name])]
    ends = [end for end in found if end[2] < len(names)]
    jpegs = _images(loader, sorted({label for _, _, label, _ in ends}), count)
    return [
        ClassExamples(gate, end, names[label], excitation, jpegs[label])
        for gate, end, label, excitation in ends
    ]


def _images(loader: Loader, labels: Sequence[int], count: int) -> dict[int, list[str]]:
    """By class its first images."""
    own = loader.store.labels[loader.rows]
    rows = {label: loader.rows[own == label][:count] for label in labels}
    few = copy.copy(loader)
    few.rows = torch.cat([*rows.values(), loader.rows[:0]])
    pixels = (image for batch in few.pixels() for image in batch) if len(few.rows) else iter(())
    return {label: [_jpeg(next(pixels)) for _ in found] for label, found in rows.items()}


def _ends(gate: str, values: Mapping[str, Tensor]) -> list[tuple[str, str, int, float]]:
    """(gate, lowest or highest, class, excitation) of two classes."""
    means = values["class_mean"].double().mean(1)
    seen = torch.nonzero(values["class_count"] > 0).flatten()
    if len(seen) < 2:
        return []
    ordered = seen[torch.argsort(means[seen], stable=True)].tolist()
    return [
        (gate, end, label, float(means[label]))
        for end, label in (("lowest", ordered[0]), ("highest", ordered[-1]))
    ]


def _jpeg(pixels: Tensor) -> str:
    """uint8 (C, H, W) as JPEG in base64; of more than three channels the first three."""
    image = to_pil_image(pixels[:3] if len(pixels) > 2 else pixels[:1])
    image.thumbnail((LARGEST, LARGEST))
    buffer = BytesIO()
    image.save(buffer, "JPEG", quality=85)
    return base64.b64encode(buffer.getvalue()).decode()
