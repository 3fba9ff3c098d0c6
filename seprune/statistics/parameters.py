"""First and second moments of the loss's derivatives by weights, one image at a time.

What torch-pruning's Taylor and Hessian importances are made of; gates have no part in it.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from seprune.statistics.accumulate import State

KINDS = (nn.modules.conv._ConvNd, nn.Linear, nn.modules.batchnorm._BatchNorm, nn.LayerNorm)


def new_moments(model: nn.Module, device: torch.device) -> State:
    """The state before the first image: of every weight the sum of derivatives and of squares."""

    def zeros(weight: Tensor) -> Tensor:
        return torch.zeros(weight.shape, dtype=torch.float64, device=device)

    state = {"count": torch.zeros(1, dtype=torch.float64, device=device)}
    for name, weight in _weights(model).items():
        state |= {f"sum/{name}": zeros(weight), f"square/{name}": zeros(weight)}
    return state


def add_moments(
    model: nn.Module, loss_of: Callable[[int], Tensor], count: int, *, device: torch.device
) -> State:
    """The moments of `count` images; `loss_of` gives the loss of one of them by its number."""
    state, weights = new_moments(model, device), _weights(model)
    for number in range(count):
        for weight in weights.values():
            weight.requires_grad_()
        try:
            with torch.enable_grad():
                loss = loss_of(number)
            found = torch.autograd.grad(loss, list(weights.values()), allow_unused=True)
        finally:
            for weight in weights.values():
                weight.requires_grad_(False)
        for name, gradient in zip(weights, found):
            if gradient is not None:
                state[f"sum/{name}"] += gradient
                state[f"square/{name}"] += gradient.double().square()
    state["count"] += count
    return state


def summarise_moments(model: nn.Module, state: State) -> dict[str, dict[str, Tensor]]:
    """Of every weight |w E[d]| and w^2 E[d^2], summed over kernel positions, float64 on CPU."""
    table, n = {}, state["count"].clamp(min=1)
    first_names = {id(weight): name for name, weight in _weights(model).items()}
    for name, weight in _all_weights(model).items():
        w, key = weight.detach().double().to(n.device), first_names[id(weight)]
        first = (w * state[f"sum/{key}"] / n).abs()
        second = w.square() * state[f"square/{key}"] / n
        table[name] = {"taylor": _by_sides(first), "hessian": _by_sides(second)}
    return table


def _by_sides(values: Tensor) -> Tensor:
    return values.flatten(2).sum(2).cpu() if values.dim() > 2 else values.cpu()


def _weights(model: nn.Module) -> dict[str, nn.Parameter]:
    """Every weight once, by its first name."""
    found: dict[int, tuple[str, nn.Parameter]] = {}
    for name, weight in _all_weights(model).items():
        found.setdefault(id(weight), (name, weight))
    return dict(found.values())


def _all_weights(model: nn.Module) -> dict[str, nn.Parameter]:
    """The weights of all layers that count; tied ones under each of their names."""
    modules = model.named_modules(remove_duplicate=False)
    weights = {f"{n}.weight" if n else "weight": m for n, m in modules if isinstance(m, KINDS)}
    return {n: m.weight for n, m in weights.items() if isinstance(m.weight, nn.Parameter)}
