"""Where a reconstruction stands, and how that is kept in a folder after every epoch."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

from seprune.errors import InputError
from seprune.recovery.finetune.checkpoints import Generation, load_generation, save_generation
from seprune.runtime.distributed import first

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

    epoch: int = 0
    best: int = 0
    errors: list[float] = field(default_factory=list)
    before: list[float] = field(default_factory=list)
    after: list[float] = field(default_factory=list)


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
    folder: Path, identity: str, *, model: nn.Module, optimizer: torch.optim.Optimizer
) -> tuple[State, Weights] | None:
    """The saved state, put into `model` and `optimizer`, and the chosen weights; None at first.

    Raises:
        InputError: the folder belongs to another reconstruction, or its state is damaged.
    """
    saved = load_generation(folder)
    if saved is None:
        return None
    if saved.facts.get("identity") != identity:
        raise InputError(
            f"{folder}: belongs to another reconstruction",
            why="it was made of other networks, images or options",
            fix=f"give another folder, or delete {folder}",
        )
    model.load_state_dict(_part(saved.tensors, "model."))
    for number, parameter in enumerate(_parameters(optimizer)):
        found = _part(saved.tensors, f"optimizer.{number}.")
        if found:
            optimizer.state[parameter] = {
                name: value if name == "step" else value.to(parameter.device)
                for name, value in found.items()
            }
    return State(**saved.facts["state"]), _part(saved.tensors, "best.")


def _parameters(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    return [p for group in optimizer.param_groups for p in group["params"]]


def _part(tensors: Weights, prefix: str) -> Weights:
    return {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}
