"""Metrics of torchmetrics, which is an extra."""

from __future__ import annotations

import importlib
from typing import Any

from torch import Tensor

from seprune.errors import EnvironmentFault, first_line


def torch_metric(path: str, **options: Any) -> Any:
    """A torchmetrics metric by its path, such as `classification.MulticlassJaccardIndex`.

    Raises:
        EnvironmentFault: the extra is not installed.
    """
    module, _, name = path.rpartition(".")
    try:
        found = importlib.import_module(f"torchmetrics.{module}")
        return getattr(found, name)(**options)
    except ImportError as error:
        raise EnvironmentFault(
            "the metrics of this task need the packages torchmetrics and pycocotools",
            why=first_line(error),
            fix='pip install "seprune[tasks]"',
            code="extra",
        ) from error


class TorchMeter:
    """Several torchmetrics at once; they are made on the device of the first batch."""

    def __init__(self, metrics: dict[str, Any]) -> None:
        self.metrics = metrics

    def update(self, outputs: Tensor, target: Tensor) -> None:
        """Add one batch to each."""
        for metric in self.metrics.values():
            metric.to(outputs.device).update(outputs, target)

    def compute(self) -> dict[str, float]:
        """Every metric by its name."""
        return {name: float(metric.compute()) for name, metric in self.metrics.items()}
