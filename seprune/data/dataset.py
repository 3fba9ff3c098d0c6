"""Images and labels: what they are, how they are split, and the loaders that the stages iterate."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from seprune.data.augment import Augment, generator
from seprune.data.decode import sniff
from seprune.data.encoded import Encoded
from seprune.data.folders import Files
from seprune.data.joint import FEW, TargetLoader, TargetStore
from seprune.data.loaders import Batching, Cached, Decoded, Images, Loader, Store, in_threads
from seprune.data.preprocessing import SMALL, choose_preprocessing
from seprune.data.source import Source, Targets, stratified
from seprune.data.sources import open_source
from seprune.errors import InputError, UsageError
from seprune.models.preprocessing import ChannelOrder, Interpolation, Preprocessing
from seprune.runtime.progress import Track, silent
from seprune.runtime.threads import usable_cores
from seprune.tasks import task_by_name

CACHE_LIMIT = 2 << 30
SKIP_LIMIT = 0.001
Part = Literal["train", "val"]


@dataclass(frozen=True)
class DataSettings:
    """How images become batches.

    `preprocessing`: that the weights ask for; None: what is usual for such images. `input`
    (C, H, W), `mean` and `std` of pixels in [0, 1], `crop` (the part of the scaled image that
    evaluation looks at), `interpolation` and `channel_order` go before it. `validation`: the
    fraction of the training images, per class, that chooses epochs; `split_seed` chooses them.
    `cache`: decoded images are kept nowhere, in memory, or on the device. `workers`: None is one
    per core.
    `task`: of the targets, as `--task` takes it; None: as the source says.
    """

    input: tuple[int, int, int] | None = None
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    batch_size: int = 128
    validation: float = 0.1
    split_seed: int = 0
    cache: Literal["auto", "none", "memory", "device"] = "auto"
    augment: Literal["auto", "none", "shift", "crop", "resized_crop"] = "auto"
    cutout: int = 0
    crop: float | None = None
    interpolation: Interpolation | None = None
    channel_order: ChannelOrder | None = None
    preprocessing: Preprocessing | None = None
    workers: int | None = None
    on_bad_image: Literal["error", "skip"] = "error"
    task: str | None = None


@dataclass(frozen=True)
class DataInfo:
    """What the report says about the data; `fingerprint`: SHA-256 of the bytes or the file list."""

    source: str
    classes: tuple[str, ...]
    preprocessing: Preprocessing
    training: int
    validation: int
    reporting: int
    cache: str
    skipped: tuple[str, ...]
    fingerprint: str
    notes: tuple[str, ...] = ()
    task: str = "classification"


class Data:
    """The splits of one data set. `training` and `validation` are parts of the train images."""

    def __init__(
        self,
        info: DataInfo,
        settings: DataSettings,
        *,
        parts: dict[str, tuple[Store | TargetStore, Tensor]],
        augment: Augment,
    ):
        self.info, self.settings, self.task = info, settings, task_by_name(info.task)
        self._parts, self._augment = parts, augment

    def training(
        self, batch_size: int | None = None, *, seed: int = 0, randaugment: bool = False
    ) -> Loader:
        """Shuffled and augmented; the last incomplete batch is left out."""
        augment = Augment(**{**vars(self._augment), "randaugment": randaugment})
        batching = Batching(self._size(batch_size), seed, shuffle=True, drop_last=True)
        return self._loader("training", batching, augment)

    def validation(self, batch_size: int | None = None) -> Loader:
        """The part of the train images that chooses epochs; evaluation transform.

        Raises:
            UsageError: the settings set no part aside.
        """
        if not self.info.validation:
            raise UsageError(
                f"{self.info.source}: there is no validation split",
                why=f"data.validation={self.settings.validation:g}",
                fix="set data.validation=0.1",
            )
        return self._loader("validation", Batching(self._size(batch_size)))

    def reporting(self, batch_size: int | None = None) -> Loader:
        """The val images, for the final numbers only; evaluation transform."""
        return self._loader("reporting", Batching(self._size(batch_size)))

    def calibration(
        self, images: int = 2048, *, batch_size: int | None = None, seed: int = 0
    ) -> Loader:
        """The first `images` training images, classes in turn, or all; evaluation transform."""
        loader = self._loader("training", Batching(self._size(batch_size)))
        loader.rows = in_turn(loader.store.labels, loader.rows, seed=seed)[:images]
        return loader

    def decode(self) -> None:
        """Decode now what is kept decoded, so that damage shows before any work.

        Raises:
            InputError: a damaged image; names it.
        """
        for store, _ in self._parts.values():
            if isinstance(store, Cached):
                store.decode()

    def _size(self, batch_size: int | None) -> int:
        return self.settings.batch_size if batch_size is None else batch_size

    def _loader(self, part: str, batching: Batching, augment: Augment | None = None) -> Loader:
        store, rows = self._parts[part]
        known: dict[str, Any] = {"preprocessing": self.info.preprocessing, "task": self.task}
        known |= {"batching": batching, "augment": augment}
        if isinstance(store, TargetStore):
            return TargetLoader(store, rows, **known)
        return Loader(store, rows, **known)


def open_data(
    source: str,
    settings: DataSettings | None = None,
    *,
    glance: Collection[Part] = ("train", "val"),
    track: Track = silent,
) -> Data:
    """Find the images of `source`, check them, and split them.

    Args:
        source: `digits`, `shapes`, a folder with train/CLASS/IMAGE and val/CLASS/IMAGE, or with
            masks, boxes or a table (docs/tasks.md), `torchvision/NAME:FOLDER`, `hf:NAME[:SPLIT]` or
            `wds:SHARDS`.
        glance: parts whose every file is looked at now, so that an empty or a foreign one stops
            the work before it begins. What is read of the others is named when it is read.

    Raises:
        InputError: no such source, an unusable layout, damaged images.
        UsageError: settings that contradict each other.
    """
    settings = settings or DataSettings()
    modes = {None: None, 1: "L", 3: "RGB", 4: "RGBA"}
    channels = settings.input[0] if settings.input else None
    if channels not in modes:
        raise UsageError(
            f"input {settings.input}: images have 1, 3 or 4 channels",
            why="they are read as grey, as RGB or as RGBA",
            fix="--input 3xHxW, or model.input=[3, H, W]",
        )
    found = open_source(source, mode=modes[channels], task=settings.task)
    train, skipped = _usable(found.train, settings, track)
    preprocessing, notes = choose_preprocessing(found, settings)
    cache = _cache(settings, preprocessing, len(train.labels) + len(found.val.labels))
    everything = torch.arange(len(train.labels))
    training, validation = everything, everything[:0]
    if settings.validation:
        training, validation = stratified(
            train.labels, everything, fraction=settings.validation, seed=settings.split_seed
        )
    info = DataInfo(
        source=found.name,
        classes=found.classes,
        preprocessing=preprocessing,
        training=len(training),
        validation=len(validation),
        reporting=len(found.val.labels),
        cache=cache,
        skipped=skipped,
        fingerprint=found.fingerprint,
        notes=(*found.notes, *notes),
        task=settings.task or found.task,
    )
    _glance([i for n, i in (("train", train), ("val", found.val)) if n in glance], track)
    trained, reported = (_store(i, info, settings, track) for i in (train, found.val))
    parts: dict[str, tuple[Store | TargetStore, Tensor]] = {
        "training": (trained, training),
        "validation": (trained, validation),
        "reporting": (reported, torch.arange(len(found.val.labels))),
    }
    augment = _augment(found, settings, preprocessing)
    return Data(info, settings, parts=parts, augment=augment)


def in_turn(labels: Tensor, rows: Tensor, *, seed: int) -> Tensor:
    """`rows` shuffled within each class, one of every class after the other."""
    rank = torch.empty(len(rows), dtype=torch.int64)
    for label in torch.unique(labels[rows]).tolist():
        members = (labels[rows] == label).nonzero().flatten()
        rank[members] = torch.randperm(len(members), generator=generator(seed, label))
    return rows[torch.argsort(rank * (int(labels.max()) + 1) + labels[rows])]


def _augment(found: Source, settings: DataSettings, preprocessing: Preprocessing) -> Augment:
    side = max(preprocessing.shape[1:])
    kind = settings.augment
    if kind == "auto":
        kind = "resized_crop" if side >= SMALL else "crop" if found.mirror else "shift"
        if found.task == "detection":
            kind = "crop"
    pads = {"shift": max(side // 8, 1), "crop": max(side // 8, 1)}
    return Augment(
        pad=pads.get(kind, 0),
        flip=kind in ("crop", "resized_crop") and found.mirror,
        cutout=settings.cutout,
        resized_crop=kind == "resized_crop",
    )


def _cache(settings: DataSettings, preprocessing: Preprocessing, count: int) -> str:
    if settings.cache == "auto":
        channels, height, width = preprocessing.shape
        small = max(height, width) < SMALL and count * channels * height * width < CACHE_LIMIT
        return "memory" if small else "none"
    if settings.cache != "none" and settings.augment == "resized_crop":
        raise UsageError(
            f"data.cache={settings.cache} and data.augment=resized_crop exclude each other",
            why="the cache holds images at their final size",
            fix="set data.cache=none, or data.augment=crop",
        )
    return settings.cache


def _store(
    images: Images, info: DataInfo, settings: DataSettings, track: Track
) -> Store | TargetStore:
    cores = usable_cores()
    if isinstance(images, Targets):
        workers = settings.workers
        if workers is None:
            workers = 0 if len(images.labels) < FEW else cores
        return TargetStore(images, workers)
    if info.cache == "none":
        workers = cores if settings.workers is None else settings.workers
        return Decoded(images, info.preprocessing, workers=workers)
    return Cached(images, info.preprocessing, on_device=info.cache == "device", track=track)


def _usable(images: Images, settings: DataSettings, track: Track) -> tuple[Images, tuple[str, ...]]:
    """The training images without damaged ones, and the messages about those."""
    if settings.on_bad_image == "error" or not isinstance(images, (Files, Encoded)):
        return images, ()
    bad: dict[int, InputError] = {}

    def check(row: int) -> None:
        try:
            images(row)
        except InputError as error:
            bad[row] = error

    count = len(images.labels)
    in_threads(check, count, label="checking images", track=track)
    reasons = [bad[row] for row in sorted(bad)]
    if len(bad) > SKIP_LIMIT * count:
        raise InputError(
            f"{len(bad)} of {count} training images are damaged, more than the {SKIP_LIMIT:.1%} "
            "that may be skipped",
            why="; ".join(e.what for e in reasons[:3]),
            fix="restore or delete these files",
        )
    return images.without(set(bad)), tuple(e.what for e in reasons)


def _glance(parts: Iterable[Images], track: Track) -> None:
    """Look at the start of every file, so that an empty or a foreign one stops the run now."""
    for images in parts:
        if isinstance(images, Files):
            paths = images.paths

            def check(row: int, paths: list = paths) -> None:  # type: ignore[type-arg]
                if error := sniff(paths[row]):
                    raise error

            in_threads(check, len(paths), label="checking files", track=track)
