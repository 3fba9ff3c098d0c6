"""A child process that looks at damaged run folders: `python checker.py`, requests on stdin.

A request is a run folder and the part of it to read (its first folder or file, or everything). The
answer is one JSON line: what `verify` says, and for each reader of that part a digest of what it
gave or the error's code. Anything that is no SepruneError ends the process with a traceback.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from reader import outcome, tensors

from seprune.export import pruned_model
from seprune.pipeline.run_folder import RunFolder, verify
from seprune.pruning.plan import PruningPlan
from seprune.recovery.finetune.checkpoints import load_generation
from seprune.report import measurement
from seprune.statistics import GateStatistics


def look(run: Path, part: str = "") -> dict[str, Any]:
    """What each reader makes of its part of the run folder."""
    readers: dict[str, Callable[[], str]] = {
        "statistics.safetensors": lambda: tensors(
            _flat(GateStatistics.load(run / "statistics.safetensors"))
        ),
        "pruned": lambda: tensors(pruned_model.load(run / "pruned").state_dict()),
        "finetuned": lambda: tensors(pruned_model.load(run / "finetuned").state_dict()),
        "finetuned/state": lambda: "read" if load_generation(run / "finetuned/state") else "none",
    }
    # these have no hash of their own, so that people can edit them: they may say something else
    unchecked: dict[str, Callable[[], object]] = {
        "plan.json": lambda: PruningPlan.load(run / "plan.json").layers(),
        "report.json": lambda: measurement.read(run),
        "journal.jsonl": RunFolder(run).records,
    }
    for name, read in unchecked.items():
        if part.startswith(name):
            outcome(read)
    found = outcome(lambda: verify(run))
    problems = [str(found)] if isinstance(found, dict) else found
    concerned = {n: read for n, read in readers.items() if not part or part.startswith(n)}
    return {"verify": problems, **{name: outcome(read) for name, read in concerned.items()}}


def _flat(statistics: Any) -> dict[str, Any]:
    rooms = (statistics.values, statistics.units, statistics.groups)
    return {
        f"{number}/{owner}/{name}": tensor
        for number, room in enumerate(rooms)
        for owner, own in room.items()
        for name, tensor in own.items()
    }


if __name__ == "__main__":
    for line in sys.stdin:
        folder, part = json.loads(line)
        print(json.dumps(look(Path(folder), part)), flush=True)
