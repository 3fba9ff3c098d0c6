"""Batches of images with masks or boxes, which are scaled and augmented together."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision import tv_tensors
from torchvision.transforms import v2

from seprune.data.augment import Augment, seed_of
from seprune.data.loaders import Batching, Loader, quietly
from seprune.data.masks import IGNORED
from seprune.data.preprocessing import normalise, to_pixels
from seprune.data.source import Targets
from seprune.models.preprocessing import Preprocessing
from seprune.runtime.random_state import cpu_random
from seprune.tasks import Task
from seprune.tasks.batches import to_device

FEW = 4000  # images, below which worker processes cost more than they save


@dataclass(frozen=True)
class TargetStore:
    """A split whose targets change with their images; `labels` as of `Samples`."""

    samples: Targets
    workers: int

    @property
    def labels(self) -> Tensor:
        """Numbers that spread rows evenly."""
        return self.samples.labels


class TargetLoader(Loader):
    """Iterates (images, masks (B, H, W) int64), or (list of images, list of dicts of boxes)."""

    def __init__(
        self,
        store: TargetStore,
        rows: Tensor,
        *,
        preprocessing: Preprocessing,
        batching: Batching,
        augment: Augment | None = None,
        task: Task,
    ) -> None:
        super().__init__(
            store,  # type: ignore[arg-type]
            rows,
            preprocessing=preprocessing,
            batching=batching,
            augment=augment,
            task=task,
        )
        self.targets = store

    def __iter__(self) -> Iterator[tuple[Any, Any]]:
        key = (self.batching.seed, self._epoch)
        loader = DataLoader(
            _Joint(self.targets.samples, self.preprocessing.shape[1:], self.augment, key),
            batch_sampler=[rows.tolist() for rows in self.own_rows()],
            num_workers=self.targets.workers,
            collate_fn=_collate,
            pin_memory=self.device.type == "cuda",
            generator=torch.Generator(),  # else it draws from the caller's
        )
        for pixels, target in quietly(loader):
            moved = pixels.to(self.device, non_blocking=True)
            images = normalise(moved, self.preprocessing)
            target = to_device(target, self.device)
            yield (list(images), target) if isinstance(target, list) else (images, target)


class _Joint(Dataset[Any]):
    def __init__(
        self, samples: Targets, size: tuple[int, int], augment: Augment, key: tuple[int, int]
    ):
        self.samples, self.key = samples, key
        self.change = transform(augment, size)

    def __getitem__(self, row: int) -> tuple[Tensor, Any]:
        image = tv_tensors.Image(to_pixels(self.samples(row)))
        target = wrapped(self.samples.target(row), image.shape[-2:])
        # v2 draws from the global generator: seeded by row, it gives every image the same draws
        # whichever worker, process or resumed run makes it.
        with cpu_random(seed_of(*self.key, 1, row)):
            image, target = self.change(image, target)
        return image.as_subclass(Tensor), _plain(target)


def transform(augment: Augment, size: tuple[int, int]) -> Callable[[Any, Any], Any]:
    """Scaling to one size, and what training does to an image and its target together."""
    fill = {tv_tensors.Mask: IGNORED, "others": 0}  # of pixels that a crop leaves without an image
    steps: list[Any] = []
    if augment.resized_crop:
        steps.append(v2.RandomResizedCrop(size, scale=(0.5, 1.0), antialias=True))
    else:
        steps.append(v2.Resize(size, antialias=True))
        if augment.pad:
            steps.append(v2.RandomCrop(size, padding=augment.pad, fill=fill))
    if augment.flip:
        steps.append(v2.RandomHorizontalFlip())
    changed: Callable[[Any, Any], Any] = v2.Compose([*steps, _keep_seen])
    return changed


def _keep_seen(image: Any, target: Any) -> tuple[Any, Any]:
    """Without the boxes that a crop left less than a pixel of."""
    if isinstance(target, Mapping):
        return tuple(v2.SanitizeBoundingBoxes(min_size=1)(image, target))
    return image, target


def wrapped(target: Any, size: Any) -> Any:
    """A mask or boxes as torchvision's transforms know them."""
    if isinstance(target, Mapping):
        boxes = torch.from_numpy(target["boxes"]).float()
        return {
            "boxes": tv_tensors.BoundingBoxes(boxes, format="XYXY", canvas_size=tuple(size)),
            "labels": torch.from_numpy(target["labels"]),
        }
    return tv_tensors.Mask(torch.from_numpy(np.asarray(target, np.int64)))


def _plain(target: Any) -> Any:
    if isinstance(target, Mapping):
        return {name: value.as_subclass(Tensor) for name, value in target.items()}
    return target.as_subclass(Tensor)


def _collate(samples: list[tuple[Tensor, Any]]) -> tuple[Tensor, Any]:
    images = torch.stack([image for image, _ in samples])
    targets = [target for _, target in samples]
    return images, targets if isinstance(targets[0], dict) else torch.stack(targets)
