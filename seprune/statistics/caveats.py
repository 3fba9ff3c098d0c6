"""What makes statistics weaker than they look, in words."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor

from seprune.graph.gates import Gate

_SATURATED = 0.95  # share of a gate's values below 0.05 or above 0.95


def caveats(
    gates: Sequence[Gate],
    values: Mapping[str, Mapping[str, Tensor]],
    samples: int,
    batch_size: int | None,
) -> tuple[str, ...]:
    """Warnings about the gates and about the calibration set."""
    return (*_of_gates(gates, values), *_of_set(values, samples, batch_size))


def _of_gates(gates: Sequence[Gate], values: Mapping[str, Mapping[str, Tensor]]) -> list[str]:
    found = [f"gate {g.name!r} never runs: it has no statistics" for g in gates if not g.runs]
    constant, saturated = [], []
    for name, own in values.items():
        if bool((own["maximum"] - own["minimum"] <= 1e-6).all()):
            constant.append(name)
        elif float((own["low"] + own["high"]).mean()) >= _SATURATED:
            saturated.append(name)
    running = len(values)
    if constant:
        found.append(
            f"{len(constant)} of {running} gates are the same for every image: "
            f"{', '.join(map(repr, constant))}; their statistics rank by that constant alone"
        )
    if saturated:
        found.append(
            f"{len(saturated)} of {running} gates are saturated (at least 95 % of the values below "
            f"0.05 or above 0.95): {', '.join(map(repr, saturated))}; "
            "means barely tell their channels apart"
        )
    return found


def _of_set(
    values: Mapping[str, Mapping[str, Tensor]], samples: int, batch_size: int | None
) -> list[str]:
    found = []
    if batch_size and samples < batch_size:
        found.append(
            f"the calibration set has {samples} images, less than one batch of {batch_size}"
        )
    if samples < 2:
        found.append("one image alone has no variance and no rank agreement: both are trivial")
    counts = next((own["class_count"] for own in values.values() if "class_count" in own), None)
    if counts is None:
        if values:
            found.append("no class statistics: the images came without class numbers")
    elif int((counts > 0).sum()) == 1:
        only = int(counts.argmax())
        found.append(
            f"all images are of class {only}: between_class is 0 and class_mean is the mean"
        )
    return found
