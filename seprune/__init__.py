"""seprune: prune Squeeze-and-Excitation networks by what their own gates say.

Importing this module imports neither torch nor any other library; names are looked up on use.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_HOMES = {
    "find_gates": "gates",
    "collect_statistics": "statistics",
    "GateStatistics": "statistics",
    "CollectOptions": "statistics",
    "analyse": "groups",
    "cuttable": "pruning",
    "prune": "pruning",
    "collecting": "importance",
    "score": "importance",
    "Scoring": "importance",
    "CRITERIA": "importance",
    "make_plan": "budget",
    "Allocation": "allocation",
    "PruningPlan": "plan",
    "refit": "refitting",
    "recalibrate": "evaluation",
    "evaluate": "evaluation",
    "FineTuneSettings": "finetuning",
    "finetune": "finetuning",
    "Architecture": "saved",
    "save": "saved",
    "load": "saved",
    "GateImportance": "cut",
    "run": "pipeline",
}
__all__ = ["__version__", *_HOMES]


def __getattr__(name: str) -> Any:
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module 'seprune' has no attribute '{name}'")
    return getattr(importlib.import_module(f"seprune.{home}"), name)


if TYPE_CHECKING:
    from seprune.statistics import GateStatistics as GateStatistics
