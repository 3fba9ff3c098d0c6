"""The networks of the support table: how each is built, and inputs that it takes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from foreign_networks import FOREIGN
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from seprune.export.architecture import Architecture
from seprune.measure.flops import quietly
from seprune.models import ModelLoader, input_size
from seprune.tasks.detection import HEADS

SIDE = 96  # of the images, where the network takes them
FILE = "benchmarks/foreign_networks.py"  # from the root of the repository, where rows run


@dataclass(frozen=True)
class Subject:
    """A network in which no tensor is constant, and shapes of one sample that it takes.

    Attributes:
        shape, other: the usual shape and another one; the same where it takes no other.
    """

    architecture: Architecture
    model: nn.Module
    shape: tuple[int, ...]
    other: tuple[int, ...]

    @property
    def detects(self) -> bool:
        """Whether it takes lists of images, and targets in training."""
        return hasattr(self.model, "transform") and hasattr(self.model, "backbone")

    def inputs(self, batch: int, *, other: bool = False, seed: int = 0) -> Any:
        """A batch of samples; for a detector the tuple of a list of images."""
        return samples(self.model, batch, self.other if other else self.shape, seed)


def subject_of(name: str) -> Subject:
    """The network of a row.

    Raises:
        RuntimeError: it runs on none of the shapes that it may be made for.
    """
    torch.manual_seed(0)
    found = FOREIGN.get(name)
    architecture = Architecture(
        f"{FILE}:{found.function}" if found else name, args=found.args if found else None
    )
    model = loader_of(architecture).build(architecture.name, **(architecture.args or {})).eval()
    shake(model)
    shapes = list(found.shapes) if found else list(_shapes(name, model))
    shape = next((s for s in shapes if runs(model, samples(model, 2, s))), None)
    if shape is None:
        raise RuntimeError(f"the parent runs on none of {shapes}")
    enliven(model, samples(model, 8, shape, seed=7))
    if not answers(model, samples(model, 2, shape)):
        raise RuntimeError("the parent says the same of every input")
    wider = (shape[0], *(n + n // 2 if n >= 32 else 2 * n for n in shape[1:]))
    if name.startswith("speechbrain"):
        wider = (shape[0] + 20, *shape[1:])  # (time, features)
    other = wider if runs(model, samples(model, 1, wider)) else shape
    return Subject(architecture, model, shape, other)


def loader_of(architecture: Architecture) -> ModelLoader:
    """What may build a network of the table."""
    return ModelLoader.allowing(architecture.name)


def _shapes(name: str, model: nn.Module) -> Iterator[tuple[int, ...]]:
    channels, published, _ = input_size(name, model)
    if not name.startswith("seprune/"):
        channels = 3  # of the images; the first convolution may come after a rearrangement
    for side in dict.fromkeys(min(side, published) for side in (SIDE, 128, published)):
        yield channels, side, side


def shake(model: nn.Module) -> None:
    """Fresh networks are too regular (gains of 0, no shifts): errors would not show."""
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.running_mean is not None:
            module.running_mean.uniform_(-0.2, 0.2)
            module.running_var.uniform_(0.8, 1.5)  # type: ignore[union-attr]
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.numel() > 1 and bool((parameter == parameter.flatten()[0]).all()):
                low, high = (-0.2, 0.2) if name.endswith("bias") else (0.5, 1.5)
                parameter.uniform_(low, high)
            elif parameter.numel() == 1 and not parameter.any() and not name.endswith("bias"):
                parameter.fill_(0.5)  # a gain of a branch (SkipInit), which would hide the branch


def enliven(model: nn.Module, inputs: Any) -> None:
    """Give norms the statistics of some inputs: small fresh weights would let every signal die."""
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    settings = [(norm.momentum, norm.training) for norm in norms]
    for norm in norms:
        norm.momentum = 1.0
        norm.train()
    with torch.no_grad():
        model(*(inputs if isinstance(inputs, tuple) else (inputs,)))
    for norm, (momentum, training) in zip(norms, settings, strict=True):
        norm.momentum = momentum
        norm.train(training)


def answers(model: nn.Module, inputs: Any) -> bool:
    """Whether outputs depend on the inputs; a network that is dead would pass every check."""
    made = [t for t in outputs(model, inputs) if t.is_floating_point() and t.numel()]
    zeros = ([0 * t for t in inputs[0]],) if isinstance(inputs, tuple) else 0 * inputs
    other = [t for t in outputs(model, zeros) if t.is_floating_point() and t.numel()]
    if [t.shape for t in made] != [t.shape for t in other]:
        return True
    return any(
        float((a - b).abs().max()) > 1e-3 * float(a.abs().max()) for a, b in zip(made, other)
    )


def samples(model: nn.Module, batch: int, shape: tuple[int, ...], seed: int = 0) -> Any:
    """A batch, or for a detector a list of single images."""
    generator = torch.Generator().manual_seed(100 * seed + batch)
    noise = torch.rand(batch, *shape, generator=generator)
    return ([*noise],) if hasattr(model, "transform") else noise


def runs(model: nn.Module, inputs: Any) -> bool:
    """Whether the parent takes these inputs; what it raises otherwise is its own business."""
    try:
        outputs(model, inputs)
    except Exception:
        return False
    return True


def outputs(model: nn.Module, inputs: Any) -> list[Tensor]:
    """All tensors that come out; of a detector what its heads say, before boxes are selected."""
    found: list[Tensor] = []
    heads = dict(model.named_modules()) if hasattr(model, "transform") else {}
    hooks = [
        heads[name].register_forward_hook(lambda *call: found.extend(tensors(call[-1])))
        for name in HEADS
        if name in heads
    ]
    try:
        with quietly(model), torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)  # some add noise, also in evaluation mode
            made = model(*(inputs if isinstance(inputs, tuple) else (inputs,)))
    finally:
        for hook in hooks:
            hook.remove()
    return found or list(tensors(made))


def tensors(tree: Any) -> Iterator[Tensor]:
    """The tensors in what a forward returns."""
    values = list(tree.values()) if isinstance(tree, Mapping) else tree
    return (t for t in tree_leaves(values) if isinstance(t, Tensor))


def double(inputs: Any) -> Any:
    """The same inputs in float64."""
    return ([t.double() for t in inputs[0]],) if isinstance(inputs, tuple) else inputs.double()
