"""seprune: prune Squeeze-and-Excitation networks by what their own gates say.

Importing this module imports neither torch nor any other library; names are looked up on use.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_HOMES = {
    "find_gates": "graph.gates",
    "collect_statistics": "statistics",
    "GateStatistics": "statistics",
    "CollectOptions": "statistics",
    "analyse": "graph.groups",
    "cuttable": "pruning.prune",
    "prune": "pruning.prune",
    "score": "importance",
    "Scoring": "importance",
    "CRITERIA": "importance",
    "make_plan": "pruning.search",
    "Allocation": "pruning.constraints",
    "PruningPlan": "pruning.plan",
    "refit": "recovery.refit",
    "recalibrate": "recovery.recalibrate",
    "evaluate": "measure.metrics",
    "FineTuneSettings": "recovery.finetune",
    "finetune": "recovery.finetune",
    "Architecture": "export.pruned_model",
    "save": "export.pruned_model",
    "load": "export.pruned_model",
    "GateImportance": "integrations.torch_pruning",
    "run": "pipeline.run",
}
__all__ = ["__version__", *_HOMES]


def __getattr__(name: str) -> Any:
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module 'seprune' has no attribute '{name}'")
    return getattr(importlib.import_module(f"seprune.{home}"), name)


if TYPE_CHECKING:
    from seprune.statistics import GateStatistics as GateStatistics
