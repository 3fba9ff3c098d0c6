"""What a batch, an output, a loss and a metric are, for one kind of network."""

from seprune.tasks.callables import FromCallables
from seprune.tasks.classification import Classification
from seprune.tasks.detection import Detection
from seprune.tasks.embedding import Embedding
from seprune.tasks.infer import TASKS, infer_task, task_by_name, unlabelled_task
from seprune.tasks.multi_label import MultiLabel
from seprune.tasks.protocol import Meter, Sample, Task
from seprune.tasks.regression import Regression
from seprune.tasks.segmentation import Segmentation

__all__ = [
    "TASKS",
    "Classification",
    "Detection",
    "Embedding",
    "FromCallables",
    "Meter",
    "MultiLabel",
    "Regression",
    "Sample",
    "Segmentation",
    "Task",
    "infer_task",
    "task_by_name",
    "unlabelled_task",
]
