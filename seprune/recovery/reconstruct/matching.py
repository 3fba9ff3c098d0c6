"""How far a pruned network is from its parent: at its outputs, and layer by layer."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from seprune.errors import InputError
from seprune.graph.hooks import tapped
from seprune.graph.tap_points import Tap
from seprune.recovery.refit.targets import Target
from seprune.runtime.distributed import sum_over_processes
from seprune.tasks.batches import leaves


@dataclass(frozen=True)
class Gap:
    """Squared errors of a batch relative to the variance of the parent's values.

    Attributes:
        outputs: mean over the tensors that the network gives.
        layers: one for each matched layer.
    """

    outputs: Tensor
    layers: tuple[Tensor, ...]

    def loss(self, weight: float) -> Tensor:
        """The errors of the outputs plus `weight` times the mean over the layers."""
        if not self.layers or weight == 0:
            return self.outputs
        return self.outputs + weight * torch.stack(self.layers).mean()


def _call(model: nn.Module, images: Any) -> Any:
    return model(images)


@dataclass
class Matching:
    """Compares two networks on batches of images.

    Attributes:
        targets: the layers whose outputs are compared, at the channels that the pruned one has.
        run: gives a network's outputs for a batch.
        scales: variances of the parent's values, by layer and by output tensor; `measure` sets
            them once, so that every batch counts alike.
    """

    parent: nn.Module
    pruned: nn.Module
    targets: Sequence[Target]
    run: Callable[[nn.Module, Any], Any] = _call
    scales: dict[str, Tensor] = field(default_factory=dict)

    def measure(self, batches: Iterable[Any]) -> None:
        """Take the variances from these images; every process gives its own part of them."""
        moments: dict[str, Tensor] = {}
        with torch.no_grad():
            for images in batches:
                for name, value in self._parent(images).items():
                    own = value.double()
                    new = torch.stack([own.new_tensor(own.numel()), own.sum(), own.square().sum()])
                    moments[name] = moments[name] + new if name in moments else new
        for name, sums in moments.items():
            count, total, squares = sum_over_processes(sums)
            variance = squares / count - (total / count).square()
            self.scales[name] = variance.clamp(min=1e-12).float()

    def __call__(self, images: Any) -> Gap:
        """The errors on a batch, with a graph back to the weights of the pruned network.

        Raises:
            InputError: the two networks give outputs of different shapes.
        """
        with torch.no_grad():
            wanted = self._parent(images)
        seen = self._pruned(images)
        errors = {name: self._error(name, seen, wanted) for name in wanted}
        outputs = [error for name, error in errors.items() if name.startswith(_OUTPUT)]
        layers = [error for name, error in errors.items() if not name.startswith(_OUTPUT)]
        return Gap(torch.stack(outputs).mean(), tuple(layers))

    def _error(self, name: str, seen: dict[str, Tensor], wanted: dict[str, Tensor]) -> Tensor:
        if name not in seen or seen[name].shape != wanted[name].shape:
            raise InputError(
                f"the pruned network and its parent cannot be compared at {name}",
                why="they give tensors of different shapes there",
                fix="reconstruct what prune(parent, plan) returned, with the same plan",
                code="plan",
            )
        return (seen[name] - wanted[name]).square().mean() / self.scales[name]

    def _parent(self, images: Any) -> dict[str, Tensor]:
        with self._watching(self.parent, cut=False) as seen:
            outputs = self.run(self.parent, images)
        return seen | _named(outputs)

    def _pruned(self, images: Any) -> dict[str, Tensor]:
        with self._watching(self.pruned, cut=True) as seen:
            outputs = self.run(self.pruned, images)
        return seen | _named(outputs)

    @contextmanager
    def _watching(self, model: nn.Module, *, cut: bool) -> Iterator[dict[str, Tensor]]:
        """What the matched layers give in the forward inside."""
        seen: dict[str, Tensor] = {}
        taps = [
            (Tap(t.layer, 0, "output", 0), partial(_keep, seen, t, cut=cut)) for t in self.targets
        ]
        with tapped(model, taps):
            yield seen


_OUTPUT = "output "


def _keep(seen: dict[str, Tensor], target: Target, value: Tensor, *, cut: bool) -> None:
    if not cut and target.keep is not None:
        value = value.index_select(target.dim, target.keep.to(value.device))
    # an activation that works in place would change what was seen
    seen[target.layer] = value.clone() if cut else value.detach().clone()


def _named(outputs: Any) -> dict[str, Tensor]:
    """All floating-point tensors of what a network gives, by their place."""
    floats = [t.float() for t in leaves(outputs) if t.is_floating_point() and t.numel()]
    if not floats:
        raise InputError(
            "the network gives no tensor of numbers that could be matched",
            why=f"its output is a {type(outputs).__name__}",
            fix="reconstruct the part of the model that gives tensors, or recover by refit",
        )
    return {f"{_OUTPUT}{number}": leaf for number, leaf in enumerate(floats)}
