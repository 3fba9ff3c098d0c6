"""The parent of a cut network whose layers do not hear the removed channels.

It shares no code with what seprune checks its own cuts by: a hook before every layer multiplies
what the layer reads by zeros and ones, and so does every function that is given the layer's weight.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from seprune.graph.groups import Member
from seprune.graph.sizes import is_size
from seprune.pruning.plan import PlannedGroup, PruningPlan

_LAYERS = {"conv1d", "conv2d", "conv3d", "conv_transpose1d", "conv_transpose2d", "conv_transpose3d",
           "linear"}  # fmt: skip


@contextmanager
def masked(model: nn.Module, plan: PruningPlan) -> Iterator[nn.Module]:
    """A copy of `model` that reads zeros where `plan` removes channels."""
    twin = copy.deepcopy(model)
    modules = dict(twin.named_modules())
    parameters = {**dict(twin.named_parameters()), **dict(twin.named_buffers())}
    heard = _heard(plan)
    with ExitStack() as stack:
        for group in plan.groups:
            gone = _gone(group)
            for member in group.members if gone else ():
                if member.layer in parameters and member.side.startswith("dim"):
                    _silence(parameters[member.layer], member, gone)
                elif _unread(group) and not is_size(
                    member.side
                ):  # queries and keys meet in a product of two maps
                    hook = modules[member.layer].register_forward_hook(_zeroed(member, gone))
                    stack.callback(hook.remove)
        for layer, factors in heard.items():
            hook = modules[layer].register_forward_pre_hook(_reads(factors))
            stack.callback(hook.remove)
        weights = {layer: modules[layer]._parameters.get("weight") for layer in heard}
        stack.enter_context(
            _Reads([(w, heard[n]) for n, w in weights.items() if isinstance(w, Tensor)])
        )
        yield twin


def _gone(group: PlannedGroup) -> list[int]:
    return sorted(set(range(group.units)) - set(group.keep))


def _unread(group: PlannedGroup) -> bool:
    return all(m.side == "out" for m in group.members if not is_size(m.side))


def _heard(plan: PruningPlan) -> dict[str, Tensor]:
    """For every layer that loses inputs: 1 where it keeps one, else 0."""
    found: dict[str, Tensor] = {}
    for group in plan.groups:
        gone = _gone(group)
        for member in group.members if gone else ():
            if member.side == "in":
                factors = found.setdefault(member.layer, torch.ones(member.total))
                factors[torch.from_numpy(member.index[gone].reshape(-1))] = 0
    return found


def _silence(parameter: Tensor, member: Member, gone: list[int]) -> None:
    """Zero a matrix that a forward reads by name; of a vector nothing is read but itself."""
    if parameter.dim() > 1:
        index = torch.from_numpy(member.index[gone].reshape(-1))
        parameter.data.index_fill_(int(member.side[3:]), index, 0)


def _zeroed(member: Member, gone: list[int]) -> Any:
    index = torch.from_numpy(member.index[gone].reshape(-1))

    def hook(module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
        return output.index_fill(-1 if isinstance(module, nn.Linear) else 1, index, 0)

    return hook


def _reads(factors: Tensor) -> Any:
    def hook(module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        return (_scaled(inputs[0], factors, isinstance(module, nn.Linear)), *inputs[1:])

    return hook


def _scaled(x: Tensor, factors: Tensor, last: bool) -> Tensor:
    """Inputs of a layer times factors along their channels, the second dimension or the last."""
    dim = x.dim() - 1 if last else 1
    assert x.shape[dim] == len(factors), (tuple(x.shape), len(factors))
    return x * factors.to(x).view([-1 if d == dim else 1 for d in range(x.dim())])


class _Reads(TorchFunctionMode):
    """The same for functions that are given a layer's weight without its module being called."""

    def __init__(self, weights: list[tuple[Tensor, Tensor]]) -> None:
        super().__init__()
        self.weights = {id(w): (w, factors) for w, factors in weights}

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        name = getattr(func, "__name__", "")
        if name in _LAYERS and len(args) > 1 and isinstance(args[1], Tensor):
            found = self.weights.get(id(args[1])) or self.weights.get(id(args[1]._base))
            if found is not None:
                args = (_scaled(args[0], found[1], name == "linear"), *args[1:])
        return func(*args, **(kwargs or {}))
