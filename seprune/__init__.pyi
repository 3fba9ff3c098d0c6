# The public API. `__init__.py` reads this file and imports each name from where it is defined.
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
from .graph.gates import Gate, find_gates
from .graph.groups import ChannelGroup, NetworkStructure
from .importance.ablation import Sensitivity, SensitivityOptions, measure_sensitivity
from .importance.criteria import CRITERIA, Importance, Scoring, score
from .importance.probes import ProbeSettings
from .integrations.torch_pruning import GateImportance
from .measure.flops import count
from .measure.latency import latency
from .measure.metrics import Evaluation, evaluate
from .models.loader import ModelLoader, build
from .pipeline.compress import Compressed, compress
from .pipeline.run import run
from .pruning.analyse import analyse
from .pruning.constraints import Allocation
from .pruning.plan import PlannedGroup, PruningPlan
from .pruning.prune import prune
from .pruning.search import make_plan
from .recipe.load import load_recipe
from .recipe.sections import Recipe
from .recovery.finetune.features import Teacher
from .recovery.finetune.run import finetune
from .recovery.finetune.settings import Epoch, FineTuned, FineTuneSettings
from .recovery.recalibrate import recalibrate
from .recovery.refit.network import RefitOptions, Refitted, refit
from .report.measurement import Measurement, Report
from .statistics.collect import CollectOptions, collect_statistics
from .statistics.result import GateStatistics

__version__: str
__all__ = [
    "CRITERIA",
    "Allocation",
    "Architecture",
    "ChannelGroup",
    "CollectOptions",
    "Compressed",
    "EnvironmentFault",
    "Epoch",
    "Evaluation",
    "Exported",
    "FineTuneSettings",
    "FineTuned",
    "Gate",
    "GateImportance",
    "GateStatistics",
    "Importance",
    "InputError",
    "LockedError",
    "Measurement",
    "ModelLoader",
    "NetworkStructure",
    "PeerError",
    "PlannedGroup",
    "ProbeSettings",
    "PruningPlan",
    "Recipe",
    "RefitOptions",
    "Refitted",
    "Report",
    "Scoring",
    "Sensitivity",
    "SensitivityOptions",
    "SepruneError",
    "StoppedError",
    "Teacher",
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
    "latency",
    "load",
    "load_recipe",
    "make_plan",
    "measure_sensitivity",
    "prune",
    "recalibrate",
    "refit",
    "run",
    "save",
    "score",
]
