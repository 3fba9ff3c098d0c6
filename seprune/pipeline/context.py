"""What the stages of a run work with: the network, the data, and where the work is done."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Literal

import torch
from torch import nn

from seprune.data import Data
from seprune.errors import UsageError
from seprune.export.architecture import Architecture
from seprune.graph.groups import NetworkStructure
from seprune.pipeline.network import LoadedNetwork
from seprune.pipeline.run_folder import kept_threads
from seprune.pruning.analyse import analyse
from seprune.recipe import CommandRecipe
from seprune.runtime.distributed import first, join, resolve_device
from seprune.runtime.progress import Track, silent
from seprune.runtime.threads import Threads, choose_threads, use_threads, used_threads


@dataclass(frozen=True)
class Runtime:
    """Where and how the work is done: resolved once, before the first stage.

    Attributes:
        processes: that `torchrun` started together; 1 without it.
        threads: of the CPU; None where they were left as they are.
        memory: bytes that collect and refit may take, or `auto`.
        shared_machine: other runs work on this machine, so that times would be theirs too.
    """

    device: torch.device
    processes: int = 1
    threads: Threads | None = None
    memory: int | Literal["auto"] = "auto"
    track: Track = silent
    shared_machine: bool = False

    @classmethod
    def of(
        cls,
        recipe: CommandRecipe,
        folder: Path | None = None,
        *,
        track: Track = silent,
        shared_machine: bool = False,
    ) -> Runtime:
        """The device, processes and threads that a recipe's `device` and `threads` mean here.

        Args:
            folder: of a run, whose earlier choice of threads stands.

        Raises:
            EnvironmentFault: the device is not there.
        """
        device = resolve_device(recipe.device)
        _, processes = join(device)
        threads = used_threads()
        if threads is None or recipe.threads != "auto":
            kept = kept_threads(folder)
            threads = first(lambda: choose_threads(recipe.threads, kept=kept))
            use_threads(threads)
        return cls(device, processes, threads, recipe.memory, track, shared_machine)

    @property
    def cuda(self) -> bool:
        """Whether the work is done on a GPU of NVIDIA's or AMD's."""
        return self.device.type == "cuda"


@dataclass(frozen=True)
class Context:
    """A network, the data it is pruned and measured with, and where the work is done."""

    network: LoadedNetwork
    data: Data | None
    runtime: Runtime

    @cached_property
    def structure(self) -> NetworkStructure:
        """Gates, groups and costs: a pure function of the network, worked out when needed first."""
        return analyse(self.network.model, self.network.example())

    def images(self, needed_by: str = "this step") -> Data:
        """The data.

        Raises:
            UsageError: there are none, and this step needs them.
        """
        if self.data is None:
            raise UsageError(
                f"{needed_by} needs calibration images",
                why="no data are given",
                fix="--data FOLDER, or --importance l2 --recover none",
            )
        return self.data

    def after(self, model: nn.Module, architecture: Architecture) -> Context:
        """The context of the next cut: the network as the last cut left it."""
        network = replace(self.network, model=model, architecture=architecture)
        return replace(self, network=network)
