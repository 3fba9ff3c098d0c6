"""Where a reconstruction stands, and how that is kept in a folder after every epoch."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

from seprune.errors import InputError
from seprune.recovery.finetune.checkpoints import (
    Generation,
    load_generation,
    optimizer_state,
    save_generation,
)
from seprune.runtime.distributed import first
from seprune.runtime.typed import Natural, require_like, typed

Weights = dict[str, Tensor]


@dataclass
class State:
    """What a resumed reconstruction needs beside weights and optimizer.

    Attributes:
        epoch: how many are done.
        best: the epoch whose weights are chosen so far.
        errors: of the outputs on the held-out images, from the network given on.
        before, after: errors by layer, of the network given and of the chosen one.
    """

    epoch: Natural = 0
    best: Natural = 0
    errors: list[float] = field(default_factory=list)
    before: list[float] = field(default_factory=list)
    after: list[float] = field(default_factory=list)

    def fits(self, layers: int) -> bool:
        """Whether there is an error for every epoch and layer."""
        counts = len(self.before) == len(self.after) == layers
        return counts and len(self.errors) == self.epoch + 1 > self.best


@dataclass(frozen=True)
class _ReconstructionFacts:
    """What a generation on disk says beside its tensors."""

    identity: str
    state: State


def weights_of(model: nn.Module) -> Weights:
    """A copy of a network's weights."""
    return {name: t.detach().clone() for name, t in model.state_dict().items()}


def save_state(
    folder: Path,
    identity: str,
    state: State,
    *,
    model: nn.Module,
    best: Weights,
    optimizer: torch.optim.Optimizer,
) -> None:
    """Write the state; the last two generations stay."""
    tensors = {f"model.{n}": t for n, t in model.state_dict().items()}
    tensors |= {f"best.{n}": t for n, t in best.items()}
    for number, parameter in enumerate(_parameters(optimizer)):
        for name, value in optimizer.state.get(parameter, {}).items():
            tensors[f"optimizer.{number}.{name}"] = value
    cpu = {n: t.detach().cpu().clone().contiguous() for n, t in tensors.items()}
    facts = {"identity": identity, "state": asdict(state)}
    first(lambda: save_generation(folder, Generation(cpu, facts)))


def load_state(
    folder: Path,
    identity: str,
    *,
    layers: int,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
) -> tuple[State, Weights] | None:
    """The saved state, put into `model` and `optimizer`, and the chosen weights; None at first.

    Args:
        layers: how many have errors.

    Raises:
        InputError: the folder belongs to another reconstruction, or its state is damaged.
    """
    saved, source = load_generation(folder), str(folder)
    if saved is None:
        return None
    fix = f"give another folder, or delete {folder}"
    facts = typed(_ReconstructionFacts, saved.facts, source=source, fix=fix, code="damaged")
    if facts.identity != identity:
        raise InputError(
            f"{folder}: belongs to another reconstruction",
            why="it was made of other networks, images or options",
            fix=fix,
        )
    own, best = _part(saved.tensors, "model."), _part(saved.tensors, "best.")
    for found in (own, best):
        require_like(found, model.state_dict(), source=source, fix=fix)
    remembered = _part(saved.tensors, "optimizer.")
    state = optimizer_state(remembered, optimizer, source=source, fix=fix)
    if not facts.state.fits(layers):
        raise InputError(
            f"{folder}: not what seprune wrote",
            why=f"its errors are not those of {facts.state.epoch} epochs and {layers} layers",
            fix=fix,
            code="damaged",
        )
    model.load_state_dict(own)
    for number, parameter in enumerate(_parameters(optimizer)):
        if number in state:
            optimizer.state[parameter] = {
                name: value if name == "step" else value.to(parameter.device)
                for name, value in state[number].items()
            }
    return facts.state, best


def _parameters(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    return [p for group in optimizer.param_groups for p in group["params"]]


def _part(tensors: Weights, prefix: str) -> Weights:
    return {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}
