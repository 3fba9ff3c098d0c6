"""Boxes, in torchvision's convention: losses in training mode, boxes in evaluation mode."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.hooks import RemovableHandle

from seprune.errors import InputError, UsageError, first_line
from seprune.tasks.batches import TARGETS, as_mapping, flatten_outputs, leaves, to_device
from seprune.tasks.callables import total_of
from seprune.tasks.protocol import Meter, Sample
from seprune.tasks.torchmetrics import torch_metric

# modules that stay in eval mode where losses are only measured
_FIXED = (nn.modules.batchnorm._NormBase, nn.modules.dropout._DropoutNd)
# modules whose outputs are what a detector answers, before boxes are picked
HEADS = ("rpn.head", "roi_heads.box_predictor", "head")


@dataclass(frozen=True)
class Detection:
    """Batches are (images, targets): a list of (C, H, W) or a tensor, and a list of dicts.

    A target holds `boxes` (N, 4), corners in pixels, and `labels` (N,), from 1. The losses come
    from the model itself, run in training mode with its norms and dropout in eval mode where they
    are only measured.
    """

    name: ClassVar[str] = "detection"
    metric: ClassVar[str] = "map"
    higher_is_better: ClassVar[bool] = True

    def split(self, batch: Any) -> Sample:
        """One argument, a list of images; the target is a list of dicts.

        A dict, or a dataclass, holds both, the boxes by a key such as `targets`.

        Raises:
            InputError: a batch of another kind.
        """
        if isinstance(given := as_mapping(batch), Mapping) and len(given) <= 2:
            key = next((key for key in TARGETS if key in given), None)
            rest = [value for name, value in given.items() if name != key]
            batch = (rest[0], given[key]) if rest and key else (rest or [batch])[0]
        images, targets = batch, None
        paired = (
            isinstance(batch, (tuple, list))
            and len(batch) == 2
            and isinstance(batch[0], (Tensor, tuple, list))
            and not (isinstance(batch[1], Tensor) and batch[1].dim() == 3)
        )
        if paired:
            images, targets = list(batch[0]), batch[1]
        elif isinstance(batch, Tensor):
            images = list(batch)
        if not isinstance(images, (tuple, list)) or any(
            not isinstance(image, Tensor) or image.dim() != 3 for image in images
        ):
            raise InputError(
                f"a batch of the loader is {type(batch).__name__}, not images and their boxes",
                why="detection takes a list of images (C, H, W), or a tensor of them",
                fix="collate with: lambda batch: tuple(zip(*batch))",
            )
        if targets is not None:
            targets = list(targets)
            _require_boxes(targets, len(images))
        return Sample((list(images),), {}, targets)

    def size(self, batch: Any) -> int:
        """How many images."""
        return len(self.split(batch).args[0])

    def part(self, batch: Any, index: slice) -> Any:
        """Some of the images and their boxes."""
        sample = self.split(batch)
        images = sample.args[0][index]
        return images if sample.target is None else (images, sample.target[index])

    def unlabelled(self, batch: Any) -> Any:
        """The list of images."""
        return self.split(batch).args[0]

    @contextmanager
    def comparable(self, model: nn.Module) -> Iterator[None]:
        """Inside, the model gives what its heads say, at boxes that do not depend on it.

        Picked boxes differ in number from network to network. A two-stage detector looks at boxes
        of three sizes, evenly spread, in place of those that it would propose.

        Raises:
            InputError: the heads are not found.
        """
        answers = _HeadAnswers()
        handles = answers.hook(model)
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def forward(self, model: nn.Module, batch: Any, *, training: bool = False) -> Any:
        """Boxes (a list of dicts) or, with `training`, the dict of losses.

        A model in eval mode gives its losses with a fixed draw of samples.
        """
        sample = self.split(batch)
        if not training:
            return _called(model, *sample.args)
        with nullcontext() if model.training else _losing(model):
            return _called(model, *sample.args, sample.target)

    def flat_outputs(self, model: nn.Module, batch: Any) -> Tensor:
        """What the heads give for every anchor and proposal, before boxes are picked.

        Picked boxes differ in number and have no derivative by what was not picked. Numbers of a
        two-stage detector's proposals are filled up with zeros.

        Raises:
            InputError: the heads are not found.
        """
        seen: dict[str, list[Any]] = {}
        modules = dict(model.named_modules())
        handles = [
            modules[name].register_forward_hook(partial(_keep, seen.setdefault(name, [])))
            for name in _heads(model)
        ]
        counts: list[int] = []
        if "roi_heads" in modules:
            handles.append(
                modules["roi_heads"].register_forward_pre_hook(partial(_proposals, counts))
            )
        try:
            self.forward(model, batch)
        finally:
            for handle in handles:
                handle.remove()
        return torch.cat(_rows(seen, counts, self.size(batch)), 1)

    def loss(self, outputs: Any, target: Any) -> Tensor:
        """The sum of the model's losses."""
        if not isinstance(outputs, Mapping):
            raise InputError(
                f"the detector gives {type(outputs).__name__} where losses are expected",
                why="in training mode a detector returns a dict of losses, as torchvision's do",
                fix="give FromCallables with a forward and a loss of your own",
            )
        return total_of(outputs)

    def losses(self, outputs: Any, target: Any) -> Tensor:
        """The batch's loss for each image: the model does not tell them apart."""
        return self.loss(outputs, target).expand(len(target))

    def distillation(self, outputs: Any, teacher: Any, *, temperature: float) -> Tensor:
        """Refused: in training mode a detector gives losses."""
        raise UsageError(
            "a detector's outputs cannot be distilled",
            why="in training mode it returns losses, and its boxes have no fixed number",
            fix="recover by refit and fine-tune without a teacher",
        )

    def meter(self) -> Meter:
        """COCO's mean average precision, and that at an overlap of 0.5."""
        return _BoxMeter()


def _called(model: nn.Module, *args: Any) -> Any:
    try:
        return model(*args)
    except (TypeError, AttributeError) as error:  # of what takes no list: a classifier
        raise InputError(
            f"{type(model).__name__} does not take a list of images and their boxes",
            why=first_line(error),
            fix="give a detector of torchvision's convention, or the task of the network: --task",
        ) from error


class _HeadAnswers:
    """Hooks on a detector; a deep copy of the network copies them with their state."""

    def __init__(self) -> None:
        self.seen: list[Any] = []

    def hook(self, model: nn.Module) -> list[RemovableHandle]:
        modules = dict(model.named_modules())
        handles = [modules[name].register_forward_hook(self.keep) for name in _heads(model)]
        if "roi_heads" in modules:
            handles.append(modules["roi_heads"].register_forward_pre_hook(self.place))
        return [*handles, model.register_forward_hook(self.answer)]

    def keep(self, _module: nn.Module, _inputs: Any, output: Any) -> None:
        self.seen.append(output)

    def place(self, _module: nn.Module, inputs: Any) -> Any:
        features, proposals, sizes, *rest = inputs
        boxes = [_spread_boxes(size).to(own) for size, own in zip(sizes, proposals, strict=True)]
        return (features, boxes, sizes, *rest)

    def answer(self, _module: nn.Module, _inputs: Any, _output: Any) -> Any:
        seen = {str(number): output for number, output in enumerate(self.seen)}
        self.seen.clear()
        return seen


def _spread_boxes(size: tuple[int, int]) -> Tensor:
    """Boxes (N, 4) of a quarter, half and all of an image's sides, each half over the next."""
    boxes = []
    for part in (0.25, 0.5, 1.0):
        starts = torch.arange(0, 1 - part + 1e-6, part / 2)
        top, left = (grid.flatten() for grid in torch.meshgrid(starts, starts, indexing="ij"))
        boxes.append(torch.stack([left, top, left + part, top + part], 1))
    height, width = size
    return torch.cat(boxes) * torch.tensor([width, height, width, height])


def _heads(model: nn.Module) -> list[str]:
    """The modules whose outputs a detector's boxes are made of.

    Raises:
        InputError: there are none.
    """
    modules = dict(model.named_modules())
    found = [name for name in HEADS if name in modules]
    if not found:
        raise InputError(
            f"{type(model).__name__}: no head of a detector is found",
            why=f"it has none of the modules {', '.join(HEADS)}",
            fix="give a task whose flat_outputs returns the raw outputs as a tensor (B, K)",
        )
    return found


class _BoxMeter:
    def __init__(self) -> None:
        self.inner: Any = None

    def update(self, outputs: Any, target: Any) -> None:
        if self.inner is None:
            self.inner = torch_metric("detection.MeanAveragePrecision", iou_type="bbox")
        cpu = torch.device("cpu")
        keys = ("boxes", "scores", "labels")
        found = [{key: own[key] for key in keys} for own in to_device(outputs, cpu)]
        self.inner.update(found, [_plain(own) for own in to_device(target, cpu)])

    def by_class(self) -> list[float]:
        """Mean average precision of every class up to the largest that occurs; NaN for others."""
        self.inner.class_metrics = True  # COCO's code once more for each class
        self.inner._computed = None
        found = self.inner.compute()
        numbers = found["classes"].flatten().tolist()
        values = dict(zip(numbers, found["map_per_class"].flatten().tolist(), strict=True))
        known = [values.get(number, -1.0) for number in range(max(numbers, default=-1) + 1)]
        return [value if value >= 0 else math.nan for value in known]

    def compute(self) -> dict[str, float]:
        found = self.inner.compute()
        # COCO's code gives -1 where there is nothing to find
        return {name: max(float(found[key]), 0.0) for name, key in
                (("map", "map"), ("map50", "map_50"))}  # fmt: skip


def _plain(target: Mapping[str, Any]) -> dict[str, Tensor]:
    return {key: target[key] for key in ("boxes", "labels", "iscrowd") if key in target}


def _require_boxes(targets: list[Any], images: int) -> None:
    if len(targets) == images and all(
        isinstance(own, Mapping) and {"boxes", "labels"} <= set(own) for own in targets
    ):
        return
    raise InputError(
        "the targets of a batch are no boxes",
        why="detection takes one dict an image, with boxes (N, 4) and labels (N,)",
        fix="give such dicts, or name the task that fits, such as --task segmentation",
    )


def _keep(seen: list[Any], _module: nn.Module, _inputs: Any, output: Any) -> None:
    seen.append(output)


def _proposals(counts: list[int], _module: nn.Module, inputs: Any) -> None:
    counts.extend(len(own) for own in inputs[1])


def _rows(seen: Mapping[str, list[Any]], counts: list[int], size: int) -> list[Tensor]:
    """One table (B, K) for each head that ran."""
    tables = []
    for name, outputs in seen.items():
        if name.startswith("roi_heads"):
            for tensor in leaves(outputs):
                own = [rows.flatten() for rows in torch.split(tensor, counts)]
                longest = max(len(row) for row in own)
                tables.append(torch.stack([F.pad(row, (0, longest - len(row))) for row in own]))
        elif outputs:
            tables.append(flatten_outputs(outputs, size))
    return tables


@contextmanager
def _losing(model: nn.Module) -> Iterator[None]:
    """In training mode but for norms and dropout, with samples drawn from a fixed seed."""
    modes = [(module, module.training) for module in model.modules()]
    devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    try:
        for module, _ in modes:
            module.training = not isinstance(module, _FIXED)
        with torch.random.fork_rng(devices):
            torch.manual_seed(0)
            yield
    finally:
        for module, mode in modes:
            module.training = mode
