"""Where images come from: digits, shapes, a folder, shards, torchvision or a Hub."""

from __future__ import annotations

import difflib
import hashlib
from dataclasses import replace
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from seprune.data import fingerprint, hub_datasets, shard_names, shards
from seprune.data.decode import as_mode
from seprune.data.encoded import MOST_CLASSES
from seprune.data.folders import Files, find_images
from seprune.data.layouts import find_layout, require_task
from seprune.data.loaders import Images
from seprune.data.shapes import shapes
from seprune.data.source import Source, stratified
from seprune.errors import InputError, first_line
from seprune.runtime.paths import expanded
from seprune.runtime.reading import require_regular
from seprune.runtime.timeout import at_most, memory_at_most

# name: the argument that chooses the part, its value for training, its value for reporting
TORCHVISION: dict[str, tuple[str, Any, Any]] = {
    "CIFAR10": ("train", True, False),
    "CIFAR100": ("train", True, False),
    "MNIST": ("train", True, False),
    "FashionMNIST": ("train", True, False),
    "KMNIST": ("train", True, False),
    "USPS": ("train", True, False),
    "SVHN": ("split", "train", "test"),
    "STL10": ("split", "train", "test"),
    "GTSRB": ("split", "train", "test"),
    "PCAM": ("split", "train", "test"),
    "DTD": ("split", "train", "test"),
    "Food101": ("split", "train", "test"),
    "Flowers102": ("split", "train", "test"),
    "StanfordCars": ("split", "train", "test"),
    "Country211": ("split", "train", "test"),
    "OxfordIIITPet": ("split", "trainval", "test"),
    "FGVCAircraft": ("split", "trainval", "test"),
    "Imagenette": ("split", "train", "val"),
}
# what has the image files, alone or with their labels, where a data set does not hold pixels:
# torchvision would open them by Pillow with all its formats, PostScript among them
FILES = {
    **dict.fromkeys(("DTD", "Food101", "Flowers102", "FGVCAircraft"), "_image_files"),
    **dict.fromkeys(("StanfordCars", "GTSRB", "Imagenette"), "_samples"),
    "Country211": "samples",
    "OxfordIIITPet": "_images",
}
OPEN_SECONDS, OPEN_RATE = 60.0, 1e6  # for opening one of those, and bytes a second of its files
OPEN_MEMORY = 4 << 30  # and four times as much as they are long: some unpack to more
MIRROR_CHANGES_CLASS = {"MNIST", "KMNIST", "USPS", "SVHN", "GTSRB"}


class Arrays:
    """Grey images (N, H, W) in memory."""

    def __init__(self, images: np.ndarray[Any, Any], labels: Tensor):
        self.images, self.labels = images, labels

    def __call__(self, row: int) -> Image.Image:
        return Image.fromarray(self.images[row])


class Foreign:
    """A torchvision data set that gives (PIL image, label)."""

    def __init__(self, source: str, dataset: Any, mode: str):
        self.source, self.dataset, self.mode = source, dataset, mode
        self.labels = torch.as_tensor(_labels(dataset), dtype=torch.int64)

    def __call__(self, row: int) -> Image.Image:
        try:
            return as_mode(self.dataset[row][0], self.mode)
        except Exception as error:  # of whatever its files made of the data set
            raise InputError(
                f"{self.source}: image {row} cannot be decoded",
                why=str(error),
                fix="download the data set again",
            ) from error


def open_source(source: str, *, mode: str | None = None, task: str | None = None) -> Source:
    """Find the images that `source` names, without decoding them.

    Args:
        task: that of the targets, where the source does not say or could be of several.

    Raises:
        InputError: no such source, or one whose layout is not usable.
    """
    return require_task(_found(source, mode, task), task)


# of other targets than classes and masks: how a folder has them
_FOLDERS = {
    "detection": "annotations/instances_train.json and instances_val.json beside the images",
    "multi_label": "train.csv and val.csv beside the images",
    "regression": "train.csv and val.csv beside the images",
}


def _require_kind(source: str, task: str | None) -> None:
    if task in _FOLDERS and source.startswith((hub_datasets.PREFIX, shard_names.PREFIX)):
        raise InputError(
            f"{source}: {task} is not read from there",
            why="hf: and wds: give classes and masks",
            fix=f"write a folder with {_FOLDERS[task]} (docs/tasks.md), and --data FOLDER",
            code="task",
        )


def _found(source: str, mode: str | None, task: str | None) -> Source:
    _require_kind(source, task)
    if source == "digits":
        return _digits()
    if source.startswith("torchvision/"):
        return _torchvision(source, mode)
    if source.startswith(hub_datasets.PREFIX):
        return hub_datasets.hub_dataset(source, mode, task)
    if source.startswith(shard_names.PREFIX):
        return shards.shards(source, mode, task)
    root = expanded(source)
    if source == "shapes" and not root.exists():
        return shapes(task or "classification")
    layout = find_layout(root, mode or "RGB", task)
    if layout is not None:
        return replace(layout, name=source)
    found = find_images(root, mode or "RGB")
    return Source(
        name=source,
        classes=found.classes,
        train=found.train,
        val=found.val,
        fingerprint=found.digest,
        mode=mode or "RGB",
        native=_native(found.train),
        notes=found.notes,
    )


def _digits() -> Source:
    content = resources.files("seprune").joinpath("digits/digits.npz")
    with content.open("rb") as stream, np.load(stream, allow_pickle=False) as file:
        images, labels = file["images"], torch.from_numpy(file["targets"].astype(np.int64))
    images = np.round(images * (255 / 16)).astype(np.uint8)
    # A fifth of every class reports, the same images for everybody.
    train, val = stratified(labels, torch.arange(len(labels)), fraction=0.2, seed=1998)
    return Source(
        name="digits",
        classes=tuple("0123456789"),
        train=Arrays(images[train.numpy()], labels[train]),
        val=Arrays(images[val.numpy()], labels[val]),
        fingerprint=hashlib.sha256(images.tobytes() + labels.numpy().tobytes()).hexdigest(),
        mode="L",
        mirror=False,
        native=(8, 8),
    )


def _native(images: Images) -> tuple[int, int] | None:
    count = len(images.labels)
    sample = [images(row) for row in range(0, count, max(count // 16, 1))]
    sizes = {(image.height, image.width) for image in sample}
    return sizes.pop() if len(sizes) == 1 else None


def _torchvision(source: str, mode: str | None) -> Source:
    from torchvision import datasets

    name, _, folder = source.removeprefix("torchvision/").partition(":")
    if name not in TORCHVISION or not folder:
        close = difflib.get_close_matches(name, TORCHVISION, 1, cutoff=0.4)
        raise InputError(
            f"{source}: cannot be used as a data set",
            why=f"known: {', '.join(TORCHVISION)}"
            if name not in TORCHVISION
            else "no folder named",
            fix=f"write torchvision/{close[0] if close else 'CIFAR10'}:{folder or 'FOLDER'}",
        )
    argument, *parts = TORCHVISION[name]
    kind = getattr(datasets, name)
    size = _size_below(Path(folder))
    seconds = OPEN_SECONDS + size / OPEN_RATE

    def too_slow() -> TimeoutError:
        return TimeoutError(f"no end within {seconds:.0f} s")

    try:
        with at_most(seconds, too_slow), memory_at_most(OPEN_MEMORY + 4 * size):
            train, val = (kind(folder, download=False, **{argument: part}) for part in parts)
        images = [_part(source, name, own, mode) for own in (train, val)]
        labels = torch.cat([part.labels for part in images])
        if not 0 <= int(labels.min()) <= int(labels.max()) < MOST_CLASSES:
            raise ValueError(f"its labels go from {int(labels.min())} to {int(labels.max())}")
    except InputError:
        raise
    except Exception as error:  # torchvision trusts the files that it reads
        raise InputError(
            f"{source}: torchvision cannot open it",
            why=first_line(error),
            fix=f"download it once: torchvision.datasets.{name}({folder!r}, download=True)",
        ) from error
    classes = getattr(train, "classes", None) or range(int(labels.max()) + 1)
    return Source(
        name=source,
        classes=tuple(str(c) for c in classes),
        train=images[0],
        val=images[1],
        fingerprint=_tree_digest(Path(folder)),
        mode=images[0].mode,
        mirror=name not in MIRROR_CHANGES_CLASS,
        native=_native(images[0]),
    )


def _part(source: str, name: str, dataset: Any, mode: str | None) -> Files | Foreign:
    """The images of one part of a data set of torchvision."""
    if name not in FILES:
        grey = dataset[0][0].mode in ("L", "1")
        return Foreign(source, dataset, mode or ("L" if grey else "RGB"))
    rows = list(getattr(dataset, FILES[name]))
    pairs = rows if isinstance(rows[0], tuple) else zip(rows, dataset._labels, strict=True)
    paths, labels = zip(*pairs, strict=True)
    return Files([Path(path) for path in paths], [int(label) for label in labels], mode or "RGB")


def _size_below(folder: Path) -> int:
    """The bytes of all files below a folder.

    Raises:
        InputError: a pipe, a device or a socket, which torchvision would open and wait for.
    """
    size = 0
    for path in folder.rglob("*"):
        if path.is_file():
            size += path.stat().st_size
        elif path.exists() and not path.is_dir():
            require_regular(path)
    return size


def _labels(dataset: Any) -> Any:
    for name in ("targets", "labels"):
        if hasattr(dataset, name):
            return getattr(dataset, name)
    return [dataset[i][1] for i in range(len(dataset))]


def _tree_digest(root: Path) -> str:
    return fingerprint.of_files(root, sorted(p for p in root.rglob("*") if p.is_file()))
