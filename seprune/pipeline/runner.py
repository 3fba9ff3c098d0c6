"""The one runner of stages: it carries them out and remembers what is finished."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from functools import partial

from seprune.pipeline.journal import Record
from seprune.pipeline.run_folder import RunFolder
from seprune.pipeline.stage import Stage
from seprune.pipeline.stage_cache import StageCache
from seprune.runtime.distributed import first


@dataclass
class Runner:
    """Carries stages out in a run folder: each once, unless its inputs or files have changed.

    Attributes:
        cache: where runs of a sweep keep what they have in common.
        seconds: of each stage, also of those that were finished before.
        notes: on stages that had to be repeated.
    """

    folder: RunFolder
    cache: StageCache | None = None
    seconds: dict[str, float] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def __call__(self, stage: Stage) -> Record:
        """The committed record of a stage; carried out now unless it was before."""
        key = stage.key
        record = first(lambda: self.folder.committed(stage.name, key, stage.facts))
        if record is None:
            if first(lambda: any(r.stage == stage.name for r in self.folder.records())):
                self.notes.append(
                    f"stage {stage.name} was made anew: its files, the images, the weights or the "
                    "version of seprune changed since it was finished"
                )
            if self.cache is not None and stage.shared:
                work = partial(self._carry_out, stage, key)
                record = self.cache.once(self.folder, stage, work)
            else:
                record = self._carry_out(stage, key)
        self.seconds[stage.name] = float(record.facts["seconds"])
        return record

    def _carry_out(self, stage: Stage, key: str) -> Record:
        start = time.monotonic()
        output = stage.run()
        facts = {**output.facts, "seconds": time.monotonic() - start}
        return first(lambda: self.folder.commit(stage.name, key, files=output.files, facts=facts))
