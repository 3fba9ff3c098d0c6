"""Feature matching: the channels that teacher and student both still have, group by group."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from seprune.errors import InputError
from seprune.pruning.plan import PruningPlan

Shared = Mapping[str, Tensor | None]  # layer -> its kept positions in the teacher; None: all


@dataclass(frozen=True)
class Teacher:
    """A dense parent, and the plans that led from it to the student, in order."""

    model: nn.Module
    plans: tuple[PruningPlan, ...] = ()


def shared_features(student: nn.Module, plans: Sequence[PruningPlan]) -> Shared:
    """For each dependency group the last BatchNorm that it passes.

    Raises:
        InputError: there are none.
    """
    modules = dict(student.named_modules())
    place = {name: number for number, name in enumerate(modules)}
    found: dict[str, Tensor | None] = {}
    for group in plans[-1].groups if plans else ():
        norms = [
            m.layer
            for m in group.members
            if m.side == "out" and isinstance(modules.get(m.layer), _BatchNorm)
        ]
        if norms:
            last = max(norms, key=place.__getitem__)
            found[last] = _kept(last, plans)
    if not found:
        raise InputError(
            "teacher and student share no group outputs that could be matched",
            why="no dependency group of the plan passes a BatchNorm"
            if plans
            else "no plan says which channels of the teacher the student has kept",
            fix="set finetune.distill.features=0, or tune a folder that seprune pruned",
        )
    return found


def _kept(layer: str, plans: Sequence[PruningPlan]) -> Tensor | None:
    kept = None
    for plan in plans:
        side = plan.layers().get(layer, {}).get("out")
        if side is not None:
            now = torch.from_numpy(side)
            kept = now if kept is None else kept[now]
    return kept


class Features:
    """What the shared layers of both networks gave in their last forward."""

    def __init__(self, student: nn.Module, teacher: nn.Module, shared: Shared) -> None:
        self.shared = shared
        self.seen: dict[str, dict[str, Tensor]] = {"student": {}, "teacher": {}}
        for role, network in (("student", student), ("teacher", teacher)):
            for name in shared:
                hook = partial(self._see, role, name)
                network.get_submodule(name).register_forward_hook(hook)

    def _see(self, role: str, name: str, _module: nn.Module, _inputs: Any, out: Tensor) -> None:
        self.seen[role][name] = out

    def distance(self) -> Tensor:
        """Mean squared difference over the teacher's variance, mean over the groups.

        Raises:
            InputError: a layer's output has other sizes in the two networks.
        """
        parts = []
        for name, kept in self.shared.items():
            student, teacher = (self.seen[role].pop(name).float() for role in self.seen)
            if kept is not None:
                teacher = teacher.index_select(1, kept.to(teacher.device))
            if student.shape != teacher.shape:
                raise InputError(
                    f"{name}: teacher and student cannot be matched",
                    why=f"outputs of {tuple(teacher.shape)} and {tuple(student.shape)}",
                    fix="use the network that was pruned as the teacher, "
                    "or finetune.distill.features=0",
                )
            gap = (student - teacher).square().mean()
            parts.append(gap / teacher.var(correction=0).clamp(min=1e-6))
        return torch.stack(parts).mean()
