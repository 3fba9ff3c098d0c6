"""Training metrics: metrics.jsonl, and the text beside the progress bar."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from seprune.measure.metric_names import metric_title, metric_value
from seprune.recovery.finetune.settings import Epoch
from seprune.runtime.files import write_text
from seprune.runtime.text import null_for_nan

METRICS = "metrics.jsonl"


@dataclass
class LiveMetrics:
    """The newest numbers of a training; a call formats them for the progress bar."""

    left: int  # steps, over all epochs
    loss: float | None = None
    metric: str = "top1"
    value: float | None = None  # of the metric, on the validation split
    lr: float = 0.0
    images: int = 0
    steps: int = 0
    start: float = field(default_factory=time.perf_counter)

    def step(self, images: int, lr: float) -> None:
        """Count one more step over `images` images."""
        self.images, self.steps, self.lr = self.images + images, self.steps + 1, lr

    @property
    def speed(self) -> float:
        """Images a second since the start."""
        return self.images / max(time.perf_counter() - self.start, 1e-9)

    def __call__(self) -> str:
        """Loss, metric, images a second, learning rate, time to the last epoch's end."""
        words = [f"loss {self.loss:.3f}"] if self.loss is not None else []
        if self.value is not None:
            shown = metric_value(self.metric, self.value).replace(" %", "%")
            words.append(f"{metric_title(self.metric)} {shown}")
        words += [f"{self.speed:,.0f} images/s", f"lr {self.lr:.2g}"]
        if self.steps:
            took = time.perf_counter() - self.start
            left = round(took / self.steps * max(self.left - self.steps, 0))
            words.append(f"{left // 3600}:{left // 60 % 60:02}:{left % 60:02} left")
        return " ".join(words)


def write_metrics(folder: Path, history: Sequence[Epoch]) -> None:
    """One line an epoch, written anew: what follows a kill repeats no line."""
    lines = (json.dumps(null_for_nan(row.plain()), allow_nan=False) + "\n" for row in history)
    write_text(folder / METRICS, "".join(lines))
