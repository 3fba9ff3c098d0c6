"""One forward (and backward) after another, read into accumulator states."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from seprune.errors import EnvironmentFault, InputError
from seprune.graph.gates import Gate
from seprune.graph.hooks import tapped, watch
from seprune.runtime.distributed import out_of_memory
from seprune.runtime.inference import autocast
from seprune.statistics.accumulate import (
    NEVER,
    Observed,
    State,
    new_effect,
    new_state,
    summarise,
    summarise_effect,
    together,
    update,
    update_effect,
)
from seprune.statistics.batches import class_labels, sample_keys, start_graph
from seprune.statistics.columns import ColumnLayout
from seprune.statistics.gate_gradients import (
    Coupling,
    Gradients,
    Sensor,
    UnitGate,
    objective,
    units_of,
)
from seprune.statistics.parameters import add_moments, new_moments, summarise_moments
from seprune.statistics.rows import RowFile
from seprune.statistics.states import refused
from seprune.tasks import Classification, Task
from seprune.tasks.batches import channels_last, leaves, map_tensors
from seprune.tasks.classification import logits_of

SUM = "sum"  # in place of a kind: the sum over a group
_ROWS = 256  # samples that wait to be added at once: an update costs much the same for any number


@dataclass(frozen=True)
class ObserverSettings:
    """What is observed, and how the model is run."""

    model: nn.Module
    gates: tuple[Gate, ...]
    layout: ColumnLayout
    gradients: Gradients = "none"
    units: Mapping[str, int] | None = None  # unit -> channels
    taps: Mapping[str, UnitGate] | None = None  # the units that are no module's output
    copied: frozenset[str] = frozenset()
    couplings: Mapping[str, Coupling] | None = None
    precision: str = "no"
    channels_last: bool = False
    seed: int = 0
    task: Task = field(default_factory=Classification)
    most: int = NEVER  # images at once

    @property
    def with_effects(self) -> bool:
        """Whether u is collected."""
        return self.gradients not in ("none", "weights")

    @property
    def widths(self) -> dict[tuple[str, str], int]:
        """(kind, name) -> channels of everything that has a u, in the order of the u columns."""
        if not self.with_effects:
            return {}
        gates = {("values", g.name): g.channels for g in self.gates}
        units = {("units", name): size for name, size in (self.units or {}).items()}
        groups = {("groups", name): c.width for name, c in (self.couplings or {}).items()}
        return gates | units | groups | {(SUM, name): 1 for _, name in groups}


class Observer:
    """Runs the model on batches with hooks in place; `gates` and `u` are its states."""

    def __init__(self, settings: ObserverSettings, rows: RowFile | None = None) -> None:
        self.settings, self._rows = settings, rows
        device = settings.layout.device
        self._gates: State = new_state(settings.layout)
        self._waiting: list[Observed] = []  # small batches are added together
        self.u: State = new_effect(sum(settings.widths.values()), device)
        self.w: State = (
            new_moments(settings.model, device) if settings.gradients == "weights" else {}
        )
        self.samples = self.batches = 0
        self._limit = NEVER  # samples that fit into memory at once
        # the proposals of a detector belong to their image, and images differ in how many
        self._most = 1 if settings.task.name == "detection" else settings.most
        self._numbers = {gate.name: i for i, gate in enumerate(settings.gates)}
        self._seen: list[list[tuple[Tensor, Tensor]]] = []
        self._sensor = Sensor(settings.copied)

    @property
    def gates(self) -> State:
        """The state of the gates, with everything observed so far."""
        self._add_waiting()
        return self._gates

    @gates.setter
    def gates(self, state: State) -> None:
        self._gates = state

    def _add_waiting(self) -> None:
        while self._waiting:
            same = [p for p in self._waiting if p.gates == self._waiting[0].gates]
            self._waiting = [p for p in self._waiting if p.gates != same[0].gates]
            update(self._gates, self.settings.layout, together(same))

    @contextmanager
    def attached(self) -> Iterator[None]:
        """Hooks are in place while the context is open."""
        with ExitStack() as stack:
            model, taps = self.settings.model, self.settings.taps or {}
            senses = self.settings.with_effects
            stack.enter_context(watch(model, self.settings.gates, self._see, derivatives=senses))
            if senses:
                names = tuple(name for name in self.settings.units or () if name not in taps)
                stack.enter_context(units_of(model, names, self._sensor.unit))
                catch = self._sensor.tapped
                at_taps = [(u.tap, partial(catch, name, u)) for name, u in taps.items()]
                stack.enter_context(tapped(model, at_taps))
            yield

    def observe(self, batch: Any) -> None:
        """Add one batch; one that does not fit into memory is halved until it does.

        Raises:
            EnvironmentFault: a single image does not fit.
        """
        task, device = self.settings.task, self.settings.layout.device
        if self.settings.channels_last:
            batch = map_tensors(batch, channels_last)
        parts = [batch]
        while parts:
            batch = parts.pop(0)
            size = task.size(batch)
            if size > min(self._limit, self._most) or not self._fits(batch, size):
                if size == 1:
                    raise EnvironmentFault(
                        "out of memory with a single image",
                        why=f"gradients {self.settings.gradients!r} on {device}",
                        fix="use a larger device, smaller images, or gradients none",
                    )
                if size <= self._most:
                    self._limit = min(self._limit, (size + 1) // 2)
                step = min(self._limit, self._most)
                parts[:0] = [task.part(batch, slice(i, i + step)) for i in range(0, size, step)]
        self.batches += 1

    def remarks(self) -> tuple[str, ...]:
        """What happened on the way, in words."""
        if self._limit == NEVER:
            return ()
        return (
            f"batches of more than {self._limit} images did not fit into memory and were taken in "
            "parts; the statistics are the same",
        )

    def _fits(self, batch: Any, size: int) -> bool:
        """Add some images at once, or return False and change nothing if memory is short."""
        labels = class_labels(self.settings.task, batch)
        try:
            self._seen = [[] for _ in self.settings.gates]
            w = self._moments(batch, size)
            self._seen = [[] for _ in self.settings.gates]  # of the one pass that counts
            u_BC = self._forward(batch, size, labels)
        except RuntimeError as error:  # torch.OutOfMemoryError is one
            if not out_of_memory(error):
                raise (refused(error) if self.settings.with_effects else error) from None
            return False
        self._record(labels)
        if u_BC is not None:
            update_effect(self.u, u_BC)
        for key, value in w.items():
            self.w[key] += value
        self.samples += size
        return True

    def _forward(self, batch: Any, size: int, labels: Tensor | None) -> Tensor | None:
        settings, task, device = self.settings, self.settings.task, self.settings.layout.device
        self._sensor.images = size
        self._sensor.forget()
        if not settings.with_effects:
            with torch.no_grad(), autocast(device, settings.precision):
                task.forward(settings.model, batch)
            return None
        batch = map_tensors(batch, start_graph)
        sample = task.split(batch)
        inputs = list(leaves((sample.args, sample.kwargs)))
        with torch.enable_grad():
            with autocast(device, settings.precision):
                z = self._objective(batch, size, labels, inputs)
            found = self._sensor.backward(z, [t for t in inputs if t.requires_grad])
        return self._u_columns(found, size)

    def _objective(
        self, batch: Any, size: int, labels: Tensor | None, inputs: list[Tensor]
    ) -> Tensor:
        """z of a batch: by the logits, the labels, or the loss of a task that has none."""
        settings, task = self.settings, self.settings.task
        if settings.gradients == "logits":
            flat = task.flat_outputs(settings.model, batch)
        elif labels is not None or settings.gradients == "sampled":
            flat = logits_of(task.forward(settings.model, batch))
        else:
            outputs = task.forward(settings.model, batch, training=True)
            return task.loss(outputs, task.split(batch).target) * size
        if labels is not None:
            labels = labels.clamp(0, flat.shape[1] - 1)  # strange ones are counted elsewhere
        keys = sample_keys(inputs, size, settings.seed)
        with torch.autocast(flat.device.type, enabled=False):
            return objective(settings.gradients, flat, labels, keys)

    def _moments(self, batch: Any, size: int) -> State:
        """Moments of the derivatives by weights, where they are collected."""
        settings, task = self.settings, self.settings.task
        if not self.w:
            return {}

        def loss(number: int) -> Tensor:
            one = task.part(batch, slice(number, number + 1))
            with autocast(settings.layout.device, settings.precision):
                outputs = task.forward(settings.model, one, training=True)
            labels = class_labels(task, one)
            if labels is None:
                return task.loss(outputs, task.split(one).target)
            logits = logits_of(outputs).float()
            labels = labels.clamp(0, logits.shape[1] - 1)  # strange ones are counted elsewhere
            return F.cross_entropy(logits, labels)

        return add_moments(settings.model, loss, size, device=settings.layout.device)

    def _u_columns(self, found: dict[str, list[Tensor]], size: int) -> Tensor:
        """u (B, all columns): gates, units, groups, the sum over each group.

        Zero where z does not depend on a channel.
        """
        total: dict[str, Tensor] = {}
        groups: dict[str, Tensor] = {}
        table = []
        for (kind, name), width in self.settings.widths.items():
            if kind == "groups":
                groups[name] = (self.settings.couplings or {})[name].combine(total)
                table.append(groups[name])
                continue
            if kind == SUM:
                table.append(groups[name].sum(1, keepdim=True))
                continue
            zero = torch.zeros(size, width, dtype=torch.float64, device=self.settings.layout.device)
            total[name] = sum((u.double() for u in found.get(name, [])), start=zero)
            table.append(total[name])
        return torch.cat(table, 1)

    def _see(self, gate: Gate, gate_BC: Tensor, features: Tensor | None) -> None:
        value = gate_BC.detach().clone()  # the model may reuse its memory
        if features is not None and features.shape[:2] == value.shape:
            size = root_mean_square(features.detach())
        else:
            size = torch.full_like(value, torch.nan)
        uses = self._seen[self._numbers[gate.name]]
        count = self._sensor.images
        frames = len(value) // count  # of each image, where they are folded into the batch
        for frame in range(frames):
            uses.append((value[frame::frames], size[frame::frames]))
        if self.settings.with_effects:
            self._sensor.gate(gate.name, gate_BC)

    def _record(self, labels: Tensor | None) -> None:
        """Add what the gates showed in one forward: all of them at once, as they have run."""
        for use in range(max(map(len, self._seen), default=0)):
            calls = {i: seen[use] for i, seen in enumerate(self._seen) if len(seen) > use}
            values = torch.cat([value for value, _ in calls.values()], 1).double()
            energy = torch.cat([size for _, size in calls.values()], 1).double().square_()
            seen = Observed(tuple(calls), values, energy, labels, self.batches)
            self._waiting.append(seen)
            if self._rows is not None and len(calls) == len(self.settings.gates):
                self._rows.append(values)
        if sum(len(p.values_BC) for p in self._waiting) >= _ROWS:
            self._add_waiting()

    def check(self) -> None:
        """Look for faults; this is where the device is waited for.

        Raises:
            InputError: a gate or derivative that is not finite, or labels that are no class.
        """
        bad, strange = self.gates["first_bad"].tolist(), int(self.gates["strange"])
        if bad and min(bad) < NEVER:
            gate, batch = self.settings.gates[bad.index(min(bad))], min(bad)
            raise InputError(
                f"gate {gate.name!r}: NaN or infinity in batch {batch}",
                why="a weight before it or an image of that batch is not finite",
                fix="check the checkpoint, and the images of that batch",
            )
        if strange:
            raise InputError(
                f"{strange} labels are outside 0..{self.settings.layout.classes - 1}",
                why=f"the model has {self.settings.layout.classes} outputs",
                fix="use the data that the model was trained for",
            )
        if not bool(torch.isfinite(self.u["square"]).all()):
            raise InputError(
                f"the derivative of the {self.settings.gradients} objective is not finite",
                why="a logit or a unit's output is NaN or infinite",
                fix="check the checkpoint and the images, or use precision no",
            )

    def tables(self) -> dict[str, dict[str, dict[str, Tensor]]]:
        """The statistics by kind (`values`, `units`, `groups`, `weights`) and name."""
        summaries = summarise(self.gates, self.settings.layout)
        kinds: dict[str, dict[str, dict[str, Tensor]]] = {"values": {}, "units": {}, "groups": {}}
        kinds["values"] = {g.name: own for g, own in zip(self.settings.gates, summaries)}
        moments, start = summarise_effect(self.u), 0
        for (kind, name), width in self.settings.widths.items():
            own = {key: value[start : start + width].clone() for key, value in moments.items()}
            start += width
            if kind == SUM:
                kinds["groups"][name]["effect_sum_square"] = own["effect_square"]
            else:
                kinds[kind].setdefault(name, {}).update(own)
        kinds["weights"] = summarise_moments(self.settings.model, self.w) if self.w else {}
        return kinds


def root_mean_square(features: Tensor) -> Tensor:
    """Root mean square over positions of (B, C, *), as (B, C), in one pass over the features."""
    positions = tuple(range(2, features.dim()))
    if not positions:
        return features.abs()
    wide = torch.float32 if features.dtype in (torch.float16, torch.bfloat16) else None
    norm: Tensor = torch.linalg.vector_norm(features, dim=positions, dtype=wide)
    return norm.mul_(math.prod(features.shape[2:]) ** -0.5)
