"""Fine-tuning that chooses its epoch on a validation split and survives being killed."""

from seprune.recovery.finetune.features import Teacher
from seprune.recovery.finetune.metrics_log import METRICS
from seprune.recovery.finetune.run import finetune
from seprune.recovery.finetune.settings import Epoch, FineTuned, FineTuneSettings

__all__ = ["METRICS", "Epoch", "FineTuneSettings", "FineTuned", "Teacher", "finetune"]
