# The public API. `__init__.py` reads this file and imports each name from where it is defined.
from .data.dataset import Data, DataSettings, open_data
from .data.loaders import Loader
from .errors import (
    EnvironmentFault,
    InputError,
    LockedError,
    PeerError,
    SepruneError,
    StoppedError,
    UsageError,
)
from .export.architecture import Architecture
from .export.onnx import Exported, export_model
from .export.pruned_model import load, save
from .graph.cost_terms import Term
from .graph.gates import Gate, find_gates
from .graph.groups import ChannelGroup, GateLink, Member, NetworkStructure, ScoreSource
from .importance.ablation import (
    AblationLoss,
    GroupSensitivity,
    Sensitivity,
    SensitivityOptions,
    measure_sensitivity,
)
from .importance.criteria import CRITERIA, Importance, Scoring, score
from .importance.probes import ProbeSettings
from .integrations.torch_pruning import GateImportance
from .measure.flops import Cost, count
from .measure.latency import Latency, latency
from .measure.latency_model import latency_model
from .measure.latency_table import LatencyModel, LatencyTable, TableKey
from .measure.metrics import Evaluation, evaluate
from .models.hub import HubAccess
from .models.loader import ModelLoader, build
from .models.preprocessing import Preprocessing, TrainedFor, trained_for
from .pipeline.compress import Compressed, CompressOptions, compress
from .pipeline.context import Runtime
from .pipeline.hub_models import from_pretrained, push_to_hub
from .pipeline.run import run
from .pruning.analyse import analyse
from .pruning.constraints import Allocation
from .pruning.plan import PlannedGroup, PruningPlan
from .pruning.prune import prune
from .pruning.removals import FrozenGate, Part, Removals
from .pruning.search import make_plan
from .recipe.budget import Budget, Limit
from .recipe.load import load_recipe
from .recipe.sections import Recipe
from .recovery.finetune.features import Teacher
from .recovery.finetune.run import finetune
from .recovery.finetune.settings import Epoch, FineTuned, FineTuneSettings
from .recovery.recalibrate import recalibrate
from .recovery.reconstruct.options import Reconstructed, ReconstructOptions
from .recovery.reconstruct.run import reconstruct
from .recovery.refit.network import refit
from .recovery.refit.options import RefitOptions, Refitted
from .report.artefacts import ArtefactReport
from .report.measurement import (
    BudgetReport,
    ClassExamples,
    GateSummary,
    GroupCut,
    Measurement,
    Report,
    TrainedEpoch,
    TrainingCurve,
)
from .runtime.progress import Track
from .runtime.threads import Threads
from .statistics.collect import collect_statistics
from .statistics.options import CollectOptions
from .statistics.result import GateStatistics
from .tasks.callables import FromCallables
from .tasks.classification import Classification
from .tasks.detection import Detection
from .tasks.embedding import Embedding
from .tasks.multi_label import MultiLabel
from .tasks.protocol import Meter, Sample, Task
from .tasks.regression import Regression
from .tasks.segmentation import Segmentation

__version__: str
__all__ = [
    "CRITERIA",
    "AblationLoss",
    "Allocation",
    "Architecture",
    "ArtefactReport",
    "Budget",
    "BudgetReport",
    "ChannelGroup",
    "ClassExamples",
    "Classification",
    "CollectOptions",
    "CompressOptions",
    "Compressed",
    "Cost",
    "Data",
    "DataSettings",
    "Detection",
    "Embedding",
    "EnvironmentFault",
    "Epoch",
    "Evaluation",
    "Exported",
    "FineTuneSettings",
    "FineTuned",
    "FromCallables",
    "FrozenGate",
    "Gate",
    "GateImportance",
    "GateLink",
    "GateStatistics",
    "GateSummary",
    "GroupCut",
    "GroupSensitivity",
    "HubAccess",
    "Importance",
    "InputError",
    "Latency",
    "LatencyModel",
    "LatencyTable",
    "Limit",
    "Loader",
    "LockedError",
    "Measurement",
    "Member",
    "Meter",
    "ModelLoader",
    "MultiLabel",
    "NetworkStructure",
    "Part",
    "PeerError",
    "PlannedGroup",
    "Preprocessing",
    "ProbeSettings",
    "PruningPlan",
    "Recipe",
    "ReconstructOptions",
    "Reconstructed",
    "RefitOptions",
    "Refitted",
    "Regression",
    "Removals",
    "Report",
    "Runtime",
    "Sample",
    "ScoreSource",
    "Scoring",
    "Segmentation",
    "Sensitivity",
    "SensitivityOptions",
    "SepruneError",
    "StoppedError",
    "TableKey",
    "Task",
    "Teacher",
    "Term",
    "Threads",
    "Track",
    "TrainedEpoch",
    "TrainedFor",
    "TrainingCurve",
    "UsageError",
    "__version__",
    "analyse",
    "build",
    "collect_statistics",
    "compress",
    "count",
    "evaluate",
    "export_model",
    "find_gates",
    "finetune",
    "from_pretrained",
    "latency",
    "latency_model",
    "load",
    "load_recipe",
    "make_plan",
    "measure_sensitivity",
    "open_data",
    "prune",
    "push_to_hub",
    "recalibrate",
    "reconstruct",
    "refit",
    "run",
    "save",
    "score",
    "trained_for",
]
