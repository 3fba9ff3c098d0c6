"""Batches of one split: which images, in which order, changed how, on which device."""

from __future__ import annotations

import copy
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import v2

from seprune.data.augment import Augment, crop_and_flip, cutout, draw, generator, seed_of
from seprune.data.preprocessing import fit, normalise, to_pixels
from seprune.errors import EnvironmentFault, first_line
from seprune.models.preprocessing import Preprocessing
from seprune.runtime.interrupts import unbroken
from seprune.runtime.progress import Track, silent
from seprune.runtime.random_state import cpu_random
from seprune.tasks import Task

CPU = torch.device("cpu")
PART = 1024  # images between two chances to stop


def _moved(batches: list[Tensor], device: torch.device) -> Sequence[Tensor]:
    """The batches on `device`, in one copy for all of them."""
    if not batches:
        return []
    return torch.split(torch.cat(batches).to(device), [len(rows) for rows in batches])


@dataclass(frozen=True)
class Batching:
    """Which rows form which batch: a pure function of (seed, epoch), the same on any machine."""

    batch_size: int
    seed: int = 0
    shuffle: bool = False
    drop_last: bool = False

    def batches(self, rows: Tensor, epoch: int) -> list[Tensor]:
        """The rows of every batch of `epoch`, over all processes."""
        if self.shuffle:
            rows = rows[torch.randperm(len(rows), generator=generator(self.seed, epoch, 0))]
        batches = list(torch.split(rows, self.batch_size))
        full = len(batches) == 1 or len(batches[-1]) == self.batch_size
        return batches if full or not self.drop_last else batches[:-1]


class Images(Protocol):
    """A split's images: one PIL image and one label (N,) per row.

    Those of tasks with other targets have `targets` (N, K) beside.
    """

    labels: Tensor

    def __call__(self, row: int) -> Image.Image: ...


class Store(Protocol):
    """Gives the pixels of batches of rows, augmented but for cutout."""

    labels: Tensor

    def stream(
        self, batches: list[Tensor], augment: Augment, key: tuple[int, int], device: torch.device
    ) -> Iterator[Tensor]: ...


def targets_of(images: Images) -> Tensor:
    """What the rows of a split are labelled with."""
    targets: Tensor = getattr(images, "targets", images.labels)
    return targets


class Cached:
    """Every image decoded once, at its evaluation size, into one uint8 tensor (N, C, H, W).

    While no more than half of them are asked for, as for calibration, only those are decoded.
    """

    def __init__(
        self,
        images: Images,
        preprocessing: Preprocessing,
        *,
        on_device: bool,
        track: Track = silent,
    ):
        self.labels, self.targets = images.labels, targets_of(images)
        self._images, self._preprocessing, self._track = images, preprocessing, track
        self._on_device = on_device
        self._pixels: dict[torch.device, Tensor] = {}
        self._begun: tuple[Tensor, Tensor] | None = None  # pixels, and which rows of them are there

    def stream(
        self, batches: list[Tensor], augment: Augment, key: tuple[int, int], device: torch.device
    ) -> Iterator[Tensor]:
        home = device if self._on_device else CPU
        needed = torch.unique(torch.cat(batches)) if batches else torch.empty(0, dtype=torch.int64)
        few = CPU not in self._pixels and 2 * len(needed) <= len(self.labels)
        home = CPU if few else home
        pixels = self._decoded(needed) if few else self._at(home)
        draws = None
        if augment.pad or augment.flip:
            size = self._preprocessing.shape[1:]
            draws = draw(augment, len(self.labels), size, key=(*key, 1)).to(home)
        for rows in _moved(batches, home):
            batch = pixels[rows]
            if augment.randaugment:
                batch = _randaugment(batch, rows, key)
            if draws is not None:
                batch = crop_and_flip(batch, draws.take(rows), pad=augment.pad)
            yield batch.to(device, non_blocking=True)

    def decode(self) -> Tensor:
        """The pixels on the CPU, decoded the first time."""
        if CPU not in self._pixels:
            self._pixels[CPU] = self._decoded(torch.arange(len(self.labels)))
        return self._pixels[CPU]

    def _decoded(self, rows: Tensor) -> Tensor:
        """The pixels on the CPU, of which at least `rows` are decoded: Pillow frees the GIL."""
        if self._begun is None:
            shape = (len(self.labels), *self._preprocessing.shape)
            there = torch.zeros(len(self.labels), dtype=torch.bool)
            self._begun = torch.empty(shape, dtype=torch.uint8), there
        pixels, done = self._begun
        missing = rows[~done[rows]].tolist()

        def decode(number: int) -> None:
            row = missing[number]
            pixels[row] = to_pixels(fit(self._images(row), self._preprocessing))

        if missing:
            in_threads(decode, len(missing), label="decoding images", track=self._track)
            done[missing] = True
        return pixels

    def _at(self, device: torch.device) -> Tensor:
        pixels = self.decode()
        if device not in self._pixels:
            self._pixels[device] = pixels.to(device)
        return self._pixels[device]


def in_threads(work: Callable[[int], None], count: int, *, label: str, track: Track) -> None:
    """`work(0)` to `work(count - 1)` by threads; the first failure ends it and is raised."""
    for _ in track(_parts(work, count), label=label, total=count):
        pass


def _parts(work: Callable[[int], None], count: int) -> Iterator[int]:
    for start in range(0, count, PART):
        rows = range(start, min(start + PART, count))
        # An exception that a signal raises inside of a pool leaves its locks taken for good.
        with unbroken(), ThreadPoolExecutor(os.cpu_count()) as pool:
            list(pool.map(work, rows))
        yield from rows


class Decoded:
    """Images decoded whenever they are needed, by worker processes."""

    def __init__(self, images: Images, preprocessing: Preprocessing, *, workers: int):
        self.labels, self.targets = images.labels, targets_of(images)
        self._images, self._preprocessing, self._workers = images, preprocessing, workers

    def stream(
        self, batches: list[Tensor], augment: Augment, key: tuple[int, int], device: torch.device
    ) -> Iterator[Tensor]:
        loader = DataLoader(
            _Augmented(self._images, self._preprocessing, augment, key),
            batch_sampler=[rows.tolist() for rows in batches],
            num_workers=self._workers,
            pin_memory=device.type == "cuda",
            generator=torch.Generator(),  # else it draws from the caller's
        )
        try:
            for batch in quietly(loader):
                yield batch.to(device, non_blocking=True)
        except RuntimeError as error:
            if "exited unexpectedly" not in str(error):
                raise
            raise EnvironmentFault(
                "a data loading worker process died",
                why=f"{first_line(error)}; most often the machine ran out of memory or of "
                "shared memory (/dev/shm)",
                fix="set data.workers=0 or a smaller batch size and run the same command again",
            ) from error


def quietly(loader: DataLoader[Any]) -> Iterator[Any]:
    """The loader's batches; a worker that dies is noticed here alone, within seconds.

    torch's own handler of SIGCHLD raises wherever the main thread happens to be.
    """
    if threading.current_thread() is not threading.main_thread():
        return iter(loader)
    before = signal.getsignal(signal.SIGCHLD)
    try:
        return iter(loader)
    finally:
        signal.signal(signal.SIGCHLD, before)


class _Augmented(Dataset[Tensor]):
    def __init__(
        self, images: Images, preprocessing: Preprocessing, augment: Augment, key: tuple[int, int]
    ):
        self._images, self._preprocessing, self._key = images, preprocessing, key
        self._random = _transform(augment, preprocessing)

    def __getitem__(self, row: int) -> Tensor:
        image = self._images(row)
        if self._random is None:
            image = fit(image, self._preprocessing)
        else:
            # v2 draws from the global generator: seeded by row, it gives every image the same draws
            # whichever worker, process or resumed run decodes it.
            with cpu_random(seed_of(*self._key, 1, row)):
                image = self._random(image)
        return to_pixels(image)


def _transform(
    augment: Augment, preprocessing: Preprocessing
) -> Callable[[Image.Image], Image.Image] | None:
    """Random changes to a training image, to the size of the input; None where there are none."""
    size = preprocessing.shape[1:]
    steps: list[object] = []
    if augment.resized_crop:
        way = v2.InterpolationMode(preprocessing.interpolation)
        steps.append(v2.RandomResizedCrop(size, interpolation=way, antialias=True))
    elif augment.pad:
        filling = replace(preprocessing, resize=size)
        steps += [v2.Lambda(lambda image: fit(image, filling))]
        steps += [v2.RandomCrop(size, padding=augment.pad)]
    elif augment.flip or augment.randaugment:
        steps += [v2.Lambda(lambda image: fit(image, preprocessing))]
    if augment.flip:
        steps.append(v2.RandomHorizontalFlip())
    if augment.randaugment:
        steps.append(v2.RandAugment())
    return v2.Compose(steps) if steps else None


def _randaugment(batch: Tensor, rows: Tensor, key: tuple[int, int]) -> Tensor:
    change = v2.RandAugment()
    images = []
    for image, row in zip(batch, rows.tolist(), strict=True):
        with cpu_random(seed_of(*key, 2, row)):
            images.append(change(image))
    return torch.stack(images)


class Loader:
    """Iterates (images float32 (B, C, H, W) normalised, labels int64 (B,) or float32 (B, K)).

    `task` says what the labels are; None: class numbers.

    `set_epoch` chooses the epoch whose order and random changes the next iteration shows, from the
    batch `first` on. `on` gives the loader of one process among several: its part of every batch.
    """

    def __init__(
        self,
        store: Store,
        rows: Tensor,
        *,
        preprocessing: Preprocessing,
        batching: Batching,
        augment: Augment | None = None,
        task: Task | None = None,
    ):
        self.task = task
        self.store, self.rows, self.batching = store, rows, batching
        self.preprocessing = preprocessing
        self.augment = augment or Augment()
        self.device = torch.device("cpu")
        self.rank, self.world = 0, 1
        self._epoch, self._first = 0, 0

    @property
    def count(self) -> int:
        """How many images one epoch draws from."""
        return len(self.rows)

    @property
    def batch_size(self) -> int:
        """Images per batch over all processes."""
        return min(self.batching.batch_size, self.count)

    def set_epoch(self, epoch: int, first: int = 0) -> None:
        """The next iterations show `epoch`, starting at its batch `first`."""
        self._epoch, self._first = epoch, first

    def on(self, device: torch.device, rank: int = 0, world: int = 1) -> Loader:
        """The same batches on `device`; process `rank` of `world` gets its share of each."""
        loader = copy.copy(self)
        loader.device, loader.rank, loader.world = device, rank, world
        return loader

    def resized(self, batch_size: int) -> Loader:
        """The same loader with batches of `batch_size`."""
        loader = copy.copy(self)
        loader.batching = replace(self.batching, batch_size=batch_size)
        return loader

    def __len__(self) -> int:
        return len(self.batching.batches(self.rows, 0))

    def pixels(self) -> Iterator[Tensor]:
        """The batches as uint8 pixels, before `normalise` and without cutout."""
        key = (self.batching.seed, self._epoch)
        yield from self.store.stream(self.own_rows(), self.augment, key, self.device)

    def own_rows(self) -> list[Tensor]:
        """The rows of this process in every batch of the epoch, where it has any."""
        batches = self.batching.batches(self.rows, self._epoch)[self._first :]
        mine = [rows[self.rank :: self.world] for rows in batches]
        return [rows for rows in mine if len(rows)]

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        mine = self.own_rows()
        key = (self.batching.seed, self._epoch)
        labels = getattr(self.store, "targets", self.store.labels).to(self.device)
        side, where = self.augment.cutout, torch.empty(0)
        if side:
            size = self.preprocessing.shape[1:]
            where = draw(self.augment, len(labels), size, key=(*key, 1)).centres.to(self.device)
        pixels = self.store.stream(mine, self.augment, key, self.device)
        for rows, batch in zip(_moved(mine, self.device), pixels, strict=True):
            images = normalise(batch, self.preprocessing)
            if side:
                images = cutout(images, where[rows], side=side)
            yield images, labels[rows]
