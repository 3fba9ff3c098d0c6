"""How a network is built again: by name, and by the plans that cut it since."""

from __future__ import annotations

import ast
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from seprune.errors import InputError
from seprune.models import NO_CODE, ModelLoader, origin_of
from seprune.models.usercode import CODE, is_code
from seprune.pruning.plan import PruningPlan
from seprune.pruning.prune import apply, plans_of
from seprune.runtime.reading import read_text
from seprune.runtime.timeout import at_most, memory_at_most

BUILD_SECONDS = 45, 9  # with weights; on the meta device, without; a library may be imported
BUILD_BYTES = 8 << 30, 2 << 30


@dataclass(frozen=True)
class Architecture:
    """How a network is built again: a name for `models.build`, and the cuts made since.

    `plans` are replayed in order; a pruned network that is pruned again has two.
    """

    name: str
    classes: int | None = None
    input: tuple[int, int, int] | None = None
    args: Mapping[str, Any] | None = None
    plans: tuple[PruningPlan, ...] = ()

    def cut(self, plan: PruningPlan) -> Architecture:
        """The same network after one more cut."""
        return Architecture(self.name, self.classes, self.input, self.args, (*self.plans, plan))


def architecture_of(model: nn.Module) -> Architecture | None:
    """How `model` is built again; None if it was not built by name (see `seprune.build`)."""
    origin = origin_of(model)
    if origin is None:
        return None
    args = dict(origin.args)
    return Architecture(origin.name, origin.classes, origin.input, args, plans_of(model))


def readable(
    model: nn.Module, architecture: Architecture | None, tensors: Mapping[str, torch.Tensor]
) -> Architecture:
    """The architecture under which `tensors` of `model` can be loaded again.

    Raises:
        InputError: it is not known, or makes a network with other tensors.
    """
    known = architecture_of(model)
    architecture = architecture or known
    if architecture is None:
        raise InputError(
            f"{type(model).__name__}: not saved, since nothing says how to build it again",
            why="the folder holds weights and plans, and `load` builds the network by its name",
            fix="build it by seprune.build('timm/seresnet50', classes=10), or give "
            "seprune.Architecture('FILE.py:FUNCTION').cut(plan) as third argument of seprune.save",
        )
    if is_code(architecture.name) and (known is None or known.name != architecture.name):
        _require_function(architecture.name)  # nobody has allowed to run that file
        return architecture
    loader = ModelLoader.allowing(architecture.name)  # this process has built it before
    made = rebuilt(architecture, loader=loader)
    named = {**dict(made.named_buffers()), **made.state_dict()}
    _require_same(architecture, {n: tuple(t.shape) for n, t in named.items()}, tensors)
    return architecture


def _require_same(
    architecture: Architecture,
    made: Mapping[str, tuple[int, ...]],
    tensors: Mapping[str, torch.Tensor],
) -> None:
    given = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    wrong = [name for name in (*given, *made) if given.get(name) != made.get(name)]
    if not wrong:
        return
    name = wrong[0]
    have, makes = given.get(name, "no such tensor"), made.get(name, "no such tensor")
    plans = len(architecture.plans)
    raise InputError(
        f"not saved: {architecture.name} with {plans} plans makes another network than this one",
        why=f"{name}: the model has {have}, it makes {makes}",
        fix="build the model with its own number of outputs, "
        f"seprune.build('{architecture.name}', classes=N), and cut it with seprune.prune; or give "
        "the seprune.Architecture that makes it as third argument of seprune.save",
    )


def _require_function(name: str) -> None:
    """Look for FUNCTION in FILE.py without running the file."""
    matched = CODE.fullmatch(name)
    path, function = (Path(matched[1]), matched[2]) if matched else (Path(name), "")
    try:
        tree = ast.parse(read_text(path))
    except (OSError, SyntaxError, ValueError) as error:
        raise InputError(
            f"{path}: cannot be read as Python",
            why=f"{type(error).__name__}: {error}",
            fix="give the file whose function builds the network, as FILE.py:FUNCTION",
        ) from error
    names = {n.name for n in ast.walk(tree) if isinstance(n, (ast.FunctionDef, ast.ClassDef))}
    if function not in names:
        raise InputError(
            f"{path}: no function {function}",
            why=f"it defines {', '.join(sorted(names)) or 'none'}",
            fix="name the function that builds the network",
        )


def rebuilt(
    architecture: Architecture, *, loader: ModelLoader = NO_CODE, device: str = "meta"
) -> nn.Module:
    """The network of an architecture, cuts included, without its weights.

    Args:
        device: on `meta` nothing is allocated; a network of a user's file, and one that computes
            with values while it is built, are built on the CPU instead.

    Raises:
        InputError: building it takes more than `BUILD_SECONDS`; a plan that does not fit.
        UsageError: it cannot be built, also not within `BUILD_BYTES` of memory.
    """
    if is_code(architecture.name):  # what its file imports would stay without values for good
        device = "cpu"
    try:
        return _rebuilt(architecture, loader, device)
    except (RuntimeError, TypeError) as error:
        wants_values = isinstance(error, NotImplementedError) or "meta" in str(error)
        if device != "meta" or not wants_values:
            raise
    return _rebuilt(architecture, loader, "cpu")


def _rebuilt(architecture: Architecture, loader: ModelLoader, device: str) -> nn.Module:
    def too_slow() -> Exception:
        return InputError(
            f"{architecture.name}: building it does not end within {seconds} s",
            why=f"its arguments are {str(architecture.args or {})[:80]}",
            fix="check its arguments; of a folder: copy it again",
            code="damaged",
        )

    seconds, size = BUILD_SECONDS[device == "meta"], BUILD_BYTES[device == "meta"]
    limits = at_most(seconds, too_slow), memory_at_most(size)
    with limits[0], limits[1], torch.device(device):
        model = loader.build(
            architecture.name,
            classes=architecture.classes,
            input=architecture.input,
            **(architecture.args or {}),
        )
    for plan in architecture.plans:
        apply(model, plan)
    return model
