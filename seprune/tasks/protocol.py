"""The interface between seprune's stages and a kind of network, and what most kinds share."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any, ClassVar, Protocol, runtime_checkable

from torch import Tensor, nn
from torch.nn import functional as F

from seprune.errors import InputError
from seprune.tasks.batches import (
    TARGETS,
    as_mapping,
    call,
    flatten_outputs,
    leaves,
    slice_batch,
)


@dataclass(frozen=True)
class Sample:
    """The arguments of a forward, and the target beside them; None where there is none."""

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    target: Any = None


class Meter(Protocol):
    """Adds up what a metric needs over the batches.

    One that knows the deciding metric of every class has `by_class() -> list[float]` too.
    """

    def update(self, outputs: Any, target: Any) -> None:
        """Add one batch."""

    def compute(self) -> dict[str, float]:
        """Metrics by name, over the batches of all processes."""


@runtime_checkable
class Task(Protocol):
    """What a batch, an output, a loss and a metric are.

    Attributes:
        name: as `--task` takes it.
        metric: the name of the metric that decides; one of those that the meter computes.
        higher_is_better: whether more of it is better.
    """

    @property
    def name(self) -> str:
        """As `--task` takes it."""

    @property
    def metric(self) -> str:
        """The metric that decides."""

    @property
    def higher_is_better(self) -> bool:
        """Whether more of the metric is better."""

    def split(self, batch: Any) -> Sample:
        """A batch of a loader as arguments and target."""

    def size(self, batch: Any) -> int:
        """How many samples a batch holds."""

    def part(self, batch: Any, index: slice) -> Any:
        """The samples of a batch at `index`, as a batch."""

    def unlabelled(self, batch: Any) -> Any:
        """A batch without its target, such that `split` finds the same arguments."""

    def comparable(self, model: nn.Module) -> AbstractContextManager[None]:
        """Inside, the outputs of two networks can be compared number by number."""

    def forward(self, model: nn.Module, batch: Any, *, training: bool = False) -> Any:
        """The model's outputs; with `training` those that `loss` takes."""

    def flat_outputs(self, model: nn.Module, batch: Any) -> Tensor:
        """The outputs that label-free derivatives project: (B, K), with a graph."""

    def loss(self, outputs: Any, target: Any) -> Tensor:
        """Mean loss of a batch."""

    def losses(self, outputs: Any, target: Any) -> Tensor:
        """The loss of every sample (B,)."""

    def distillation(self, outputs: Any, teacher: Any, *, temperature: float) -> Tensor:
        """How far outputs are from a teacher's."""

    def meter(self) -> Meter:
        """A fresh meter."""


class BaseTask(ABC):
    """What tasks with outputs and losses by sample have in common."""

    inputs: int = 1  # leading elements of a tuple batch that are arguments of the model
    name: ClassVar[str]
    metric: ClassVar[str]
    higher_is_better: ClassVar[bool] = True

    def split(self, batch: Any) -> Sample:
        """(inputs, target), ((inputs, ...), target), a dict with a target's key, or inputs alone.

        A dataclass is the dict of its fields.

        Raises:
            InputError: a batch without a tensor.
        """
        if next(leaves(batch), None) is None:
            raise InputError(
                f"a batch of the loader is {type(batch).__name__}, not images or (images, labels)",
                why="it holds no tensor"
                + (
                    f"; its first part is {type(batch[0]).__name__}"
                    if isinstance(batch, (tuple, list)) and batch
                    else ""
                ),
                fix="give a loader of tensors (B, C, H, W), of (inputs, target), or of dicts",
            )
        batch = as_mapping(batch)
        if isinstance(batch, Mapping):
            key = next((key for key in TARGETS if key in batch), None)
            kwargs = {name: value for name, value in batch.items() if name != key}
            return Sample((), kwargs, batch[key] if key else None)
        if isinstance(batch, (tuple, list)):
            given, rest = batch[: self.inputs], batch[self.inputs :]
            if len(given) == 1 and isinstance(given[0], (tuple, list)):
                given = given[0]
            if len(given) == 1 and isinstance(given[0], Mapping):
                return Sample((), dict(given[0]), rest[0] if rest else None)
            return Sample(tuple(given), {}, rest[0] if rest else None)
        return Sample((batch,))

    def size(self, batch: Any) -> int:
        """Length of the first input."""
        sample = self.split(batch)
        return len(next(leaves((sample.args, sample.kwargs))))

    def part(self, batch: Any, index: slice) -> Any:
        """Every tensor that is as long as the batch is cut."""
        return slice_batch(batch, index, self.size(batch))

    def unlabelled(self, batch: Any) -> Any:
        """The only input, a dict of inputs, or a tuple of a tuple of them."""
        sample = self.split(batch)
        if sample.kwargs:
            return dict(sample.kwargs)
        return sample.args[0] if len(sample.args) == 1 else (sample.args,)

    def comparable(self, model: nn.Module) -> AbstractContextManager[None]:
        """Nothing to do: outputs have the same shape whatever was cut."""
        return nullcontext()

    def forward(self, model: nn.Module, batch: Any, *, training: bool = False) -> Any:
        """The model's outputs."""
        sample = self.split(batch)
        return call(model, sample.args, sample.kwargs)

    def flat_outputs(self, model: nn.Module, batch: Any) -> Tensor:
        """Every floating-point tensor of the outputs, side by side."""
        return flatten_outputs(self.forward(model, batch), self.size(batch))

    @abstractmethod
    def losses(self, outputs: Any, target: Any) -> Tensor:
        """The loss of every sample (B,)."""

    def loss(self, outputs: Any, target: Any) -> Tensor:
        """Mean over the samples."""
        return self.losses(outputs, target).mean()

    def distillation(self, outputs: Any, teacher: Any, *, temperature: float) -> Tensor:
        """Mean squared difference over all output tensors, each over the teacher's variance."""
        pairs = [
            (own, taught)
            for own, taught in zip(leaves(outputs), leaves(teacher))
            if taught.is_floating_point()
        ]
        for own, taught in pairs:
            require_same_shape(own, taught)
        gaps = [
            (own.float() - taught.float()).square().mean()
            / taught.float().var(correction=0).clamp(min=1e-6)
            for own, taught in pairs
        ]
        return sum(gaps[1:], gaps[0]) / len(gaps)


def require_same_shape(own: Tensor, taught: Tensor) -> None:
    """Raises InputError where a teacher answers in another shape."""
    if own.shape == taught.shape:
        return
    if own.dim() == taught.dim() == 2:
        raise InputError(
            f"the teacher has {taught.shape[1]} outputs, the model {own.shape[1]}",
            why="distillation compares them class by class",
            fix="use a teacher for the same classes",
        )
    raise InputError(
        f"the teacher's outputs are {tuple(taught.shape)}, the model's {tuple(own.shape)}",
        why="distillation compares them number by number",
        fix="use a teacher for the same task",
    )


def single_logit() -> InputError:
    """A softmax over one logit is always 1: every loss would be 0."""
    return InputError(
        "the model has a single output, which tells no classes apart",
        why="the softmax of one number is 1, whatever it is",
        fix="name the task that fits: --task multi_label for a yes or no, --task regression for a "
        "number",
    )


def soft_cross_entropy(logits: Tensor, teacher: Tensor, *, temperature: float) -> Tensor:
    """T^2 KL(softmax(teacher / T) || softmax(logits / T)), batch mean (arXiv:1503.02531).

    Raises:
        InputError: outputs of another shape, or a single one, whose softmax is always 1.
    """
    require_same_shape(logits, teacher)
    if logits.shape[1] == 1:
        raise single_logit()
    soft = F.kl_div(
        F.log_softmax(logits.float() / temperature, 1),
        F.log_softmax(teacher.float() / temperature, 1),
        reduction="batchmean",
        log_target=True,
    )
    return temperature**2 * soft
