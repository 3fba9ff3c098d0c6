"""Stages as values, and the one runner that carries them out and remembers what is finished."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from seprune.pipeline.journal import Record, stage_key
from seprune.pipeline.run_folder import RunFolder
from seprune.pipeline.stage_cache import StageCache
from seprune.runtime.distributed import first


@dataclass(frozen=True)
class Output:
    """What a stage wrote, relative to the run folder, and its numbers."""

    files: Sequence[str | Path]
    facts: Mapping[str, Any]


@dataclass(frozen=True)
class Stage:
    """One step of a run.

    Attributes:
        name: as the journal has it, such as `prune/macs 0.5`.
        inputs: all that its result depends on, as plain data; what its key is the hash of.
        run: does the work and writes its files.
        shared: its files lie at the same place in every run, so that runs can take them over from
            each other.
    """

    name: str
    inputs: Mapping[str, Any]
    run: Callable[[], Output]
    shared: bool = False

    @property
    def key(self) -> str:
        """The hash of the inputs."""
        return stage_key(**self.inputs)


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
        record = first(lambda: self.folder.committed(stage.name, key))
        if record is None:
            if first(lambda: any(r.stage == stage.name for r in self.folder.records())):
                self.notes.append(
                    f"stage {stage.name} was made anew: its files, the images, the weights or the "
                    "version of seprune changed since it was finished"
                )
            if self.cache is not None and stage.shared:
                work = partial(self._carry_out, stage, key)
                record = self.cache.once(self.folder, stage.name, key, work)
            else:
                record = self._carry_out(stage, key)
        self.seconds[stage.name] = float(record.facts["seconds"])
        return record

    def _carry_out(self, stage: Stage, key: str) -> Record:
        start = time.monotonic()
        output = stage.run()
        facts = {**output.facts, "seconds": time.monotonic() - start}
        return first(lambda: self.folder.commit(stage.name, key, files=output.files, facts=facts))
