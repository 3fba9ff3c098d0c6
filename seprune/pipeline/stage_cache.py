"""Stages that several runs have in common, each done once and copied to the others."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import torch.distributed as dist

from seprune.errors import InputError
from seprune.pipeline.journal import Record
from seprune.pipeline.run_folder import RunFolder
from seprune.pipeline.stage import Stage
from seprune.runtime import files
from seprune.runtime.distributed import first
from seprune.runtime.lock import waiting_for
from seprune.runtime.paths import inside


@dataclass(frozen=True)
class StageCache:
    """What several runs have in common: a folder for each stage and key.

    The key is the hash of all that the stage depends on, so runs agree on a stage if and only if
    its result is the same for them.
    """

    folder: Path

    def once(self, run: RunFolder, stage: Stage, work: Callable[[], Record]) -> Record:
        """The stage's record in `run`: taken over from another run, or from `work` and handed on.

        Whoever comes while another run works on the same stage waits for it.

        Raises:
            InputError: what was taken over is not what was committed.
        """
        if dist.is_initialized():  # its processes would wait for each other
            return work()
        key = stage.key
        place = inside(self.folder, f"{stage.name}-{key[:12]}")
        with ExitStack() as stack:
            first(lambda: stack.enter_context(waiting_for(place)))
            there = RunFolder(place)
            record = first(lambda: there.committed(stage.name, key, stage.facts))
            if record is not None:
                return first(lambda: _hand_over(record, there, run))
            made = work()
            first(lambda: _hand_over(made, run, there))
            return made


def _hand_over(record: Record, giver: RunFolder, taker: RunFolder) -> Record:
    for name in record.files:
        files.copy(inside(giver.path, name), inside(taker.path, name))
    made = taker.commit(
        record.stage, record.key, files=list(record.files), facts=dict(record.facts)
    )
    if made.files != record.files:
        raise InputError(
            f"{taker.path}: stage {record.stage} was copied and came out different",
            why="the files of the two folders do not have the same hashes",
            fix="check the disk and run the same command again",
            code="damaged",
        )
    return made
