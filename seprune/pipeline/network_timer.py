"""Milliseconds of a plan's network on the runtime that a latency budget is for."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable
from contextlib import ExitStack, suppress
from dataclasses import replace
from functools import cached_property
from typing import Any

import torch
from torch import nn

from seprune.errors import EnvironmentFault, InputError
from seprune.export.onnx_cut import ExportedParent
from seprune.measure.latency import noise, take_turns, undisturbed_clock
from seprune.measure.latency_model import latency_model
from seprune.measure.latency_table import LatencyModel, TableKey
from seprune.pipeline import timing
from seprune.pipeline.context import Context
from seprune.pruning.plan import PruningPlan
from seprune.pruning.prune import prune
from seprune.recipe.sections import PlanSection

ROUNDS = 40
LEAST_SECONDS, MOST_SECONDS = 1.0, 30.0
"""Of measuring. Other processes take the core for tens of milliseconds at a time: within a shorter
time every round of a small network may be disturbed, and both halves agree on a wrong ratio."""
FEWEST_TRIES = 8  # before the machine is called too busy
LARGEST_SPREAD = 0.03  # between both halves of the rounds: what a plan may stay below its budget


class NetworkTimer:
    """Times networks in turns with the network given, so that a machine's drift cancels out.

    The shortest times count: other processes only add to them.
    """

    def __init__(self, context: Context, section: PlanSection, stack: ExitStack) -> None:
        """
        Args:
            stack: to be closed when all is measured; networks stay ready until then.
        """
        self.model, self.runtime = context.network.model, section.runtime
        self.setup = timing.TimingSetup.of(context, (section.batch,))
        self.images = noise((section.batch, *self.setup.shape), self.setup.device)
        self.stack = stack
        self.dense_ms: float | None = None

    @torch.no_grad()
    def __call__(self, plan: PruningPlan) -> float:
        """Milliseconds of one forward pass of the batch through the network that `plan` makes.

        Raises:
            InputError: the runtime cannot run the network; names what it cannot.
            EnvironmentFault: the machine is too noisy for the measurement to mean anything.
        """
        small = self.cut(plan) if plan.cuts else self.dense
        ratio, dense_ms = self.ratio({"dense": self.dense, "small": small})
        self.dense_ms = dense_ms if self.dense_ms is None else self.dense_ms
        return self.dense_ms * (ratio if plan.cuts else 1.0)

    @cached_property
    def dense(self) -> Callable[..., Any]:
        """The network given as the runtime calls it."""
        return self.parent.dense() if self.parent is not None else self.ready(self.model)

    @cached_property
    def parent(self) -> ExportedParent | None:
        """Its ONNX file, where that is the runtime and can hold it."""
        if self.runtime not in timing.READERS:
            return None
        with suppress(Exception):  # of any kind; `ready` meets it again, and names it
            reader = timing.READERS[self.runtime]
            return ExportedParent.of(self.model, self.setup.shape, reader)
        return None

    def cut(self, plan: PruningPlan) -> Callable[..., Any]:
        """The plan's network as the runtime calls it."""
        plan = replace(plan, removed=plan.removed.with_unit_means())  # takes as long
        small = prune(self.model, plan)
        quick = self.parent.cut(plan, small, self.images) if self.parent is not None else None
        return quick or self.ready(small)

    def ready(self, model: nn.Module) -> Callable[..., Any]:
        """A network as the runtime calls it."""
        made = timing.ready(model, self.runtime, self.setup, self.stack)
        if not isinstance(made, str):
            return made
        raise InputError(
            f"the runtime '{self.runtime}' cannot run this network",
            why=made,
            fix="--runtime eager, or plan.runtime: eager",
            code="export",
        )

    def ratio(self, calls: dict[str, Callable[..., Any]]) -> tuple[float, float]:
        """Time of the small network by that of the dense one, and the latter in milliseconds."""
        dense: list[float] = []
        small: list[float] = []
        spread = 0.0
        clock = undisturbed_clock(self.setup.device)
        began = time.monotonic()
        for tries in itertools.count(1):
            times = take_turns(calls, self.images, ROUNDS, clock)
            dense, small = dense + times["dense"], small + times["small"]
            # by pairs: in even and odd rounds the networks go in different orders, and a network
            # that runs twice in succession finds its weights in the processor's cache
            parts = [
                [t for n, t in enumerate(column) if n // 2 % 2 == i]
                for i in (0, 1)
                for column in (small, dense)
            ]
            halves = [min(parts[i]) / min(parts[i + 1]) for i in (0, 2)]
            spread = max(halves) / min(halves) - 1
            spent = time.monotonic() - began
            if spread <= LARGEST_SPREAD and spent >= LEAST_SECONDS:
                return min(small) / min(dense), min(dense)
            if tries >= FEWEST_TRIES and spent >= MOST_SECONDS:
                break
        raise EnvironmentFault(
            "this machine is too busy for a latency budget",
            why=f"both halves of {len(dense)} rounds differ by {spread:.0%}, "
            "and a budget is to be met within 3 %",
            fix="stop what else runs here, or give a budget in MACs: --macs 0.5",
        )


def latency_of(
    context: Context, section: PlanSection, stack: ExitStack
) -> tuple[NetworkTimer, LatencyModel]:
    """What a latency budget needs: measurements of networks, and a model of their times."""
    network, runtime = context.network, context.runtime
    timer = NetworkTimer(context, section, stack)
    key = TableKey.here(section.runtime, batch=section.batch, device=str(runtime.device))
    model = latency_model(
        network.model, context.structure, network.example(), key=key, track=runtime.track
    )
    return timer, model
