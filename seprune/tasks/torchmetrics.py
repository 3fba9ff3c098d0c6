"""Metrics of torchmetrics, which is an extra."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from seprune.errors import InputError, first_line
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
    """Several torchmetrics at once; they are made for the first batch, on its device.

    Args:
        pair: outputs and target as the metrics take them.
        metrics: them by name, for outputs like these.
    """

    def __init__(
        self,
        pair: Callable[[Any, Any], tuple[Tensor, Tensor]],
        metrics: Callable[[Tensor], Mapping[str, Any]],
    ) -> None:
        self.pair, self.make = pair, metrics
        self.metrics: dict[str, Any] = {}

    def update(self, outputs: Any, target: Any) -> None:
        """Add one batch to each."""
        found, wanted = self.pair(outputs, target)
        if not self.metrics:
            self.metrics = {name: m.to(found.device) for name, m in self.make(found).items()}
        for metric in self.metrics.values():
            metric.update(found, wanted)

    def compute(self) -> dict[str, float]:
        """Every metric that is one number, by its name; of at least one batch.

        Raises:
            InputError: the images do not determine a metric, as one does not determine R2.
        """
        found = {}
        for name, metric in self.metrics.items():
            try:
                found[name] = metric.compute()
            except ValueError as error:
                raise InputError(
                    f"the metric {name} cannot be computed from these images",
                    why=first_line(error),
                    fix="evaluate on more images",
                ) from error
        return {name: float(value) for name, value in found.items() if value.dim() == 0}
