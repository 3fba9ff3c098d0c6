"""Metrics of torchmetrics, which is an extra."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from seprune.runtime.extras import require


def torch_metric(path: str, **options: Any) -> Any:
    """A torchmetrics metric by its path, such as `classification.MulticlassJaccardIndex`.

    Raises:
        EnvironmentFault: the extra is not installed.
    """
    module, _, name = path.rpartition(".")
    needs = {
        "extra": "tasks",
        "what": "the metrics of this task need the packages torchmetrics and pycocotools",
    }
    found = require(f"torchmetrics.{module}", **needs)
    if module == "detection":
        require("pycocotools", **needs)  # which torchmetrics asks for only when a metric is made
    return getattr(found, name)(**options)


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
