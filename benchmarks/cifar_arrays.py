"""CIFAR-10 in memory for benchmarks: decoded once from train/ and val/, or read from an .npz file.

An .npz file holds uint8 `train_images`, `val_images` (N, H, W, 3) and int `train_labels`,
`val_labels`; `python benchmarks/cifar_arrays.py FOLDER FILE.npz` makes one.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from seprune.data import Augment, Data, DataInfo, DataSettings, in_turn
from seprune.data.loaders import Cached
from seprune.data.source import stratified
from seprune.data.sources import open_source
from seprune.models.preprocessing import Preprocessing
from seprune.runtime.files import write_with

MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)
Arrays = dict[str, Tensor]  # images (N, 3, H, W) uint8 and labels (N,), of `train` and `val`


class Pixels(Cached):
    """Images that are decoded already, uint8 (N, C, H, W)."""

    def __init__(self, pixels: Tensor, labels: Tensor, preprocessing: Preprocessing) -> None:
        self.labels, self._preprocessing, self._on_device = labels, preprocessing, True
        self._pixels = {torch.device("cpu"): pixels}

    def decode(self) -> Tensor:
        """The pixels on the CPU."""
        return self._pixels[torch.device("cpu")]


def load_arrays(path: Path) -> Arrays:
    """Both splits of a folder or of an .npz file."""
    if path.is_dir():
        source = open_source(str(path), mode="RGB")
        return {
            f"{name}_{kind}": value
            for name, images in (("train", source.train), ("val", source.val))
            for kind, value in (("images", _decoded(images)), ("labels", images.labels))
        }
    with np.load(path) as file:
        arrays = {name: torch.from_numpy(file[name]) for name in file.files}
    for name in ("train_images", "val_images"):
        arrays[name] = arrays[name].permute(0, 3, 1, 2).contiguous()
    return {n: t.long() if n.endswith("labels") else t for n, t in arrays.items()}


def _decoded(images: object) -> Tensor:
    count = len(images.labels)  # type: ignore[attr-defined]
    pixels = [np.asarray(images(row)) for row in range(count)]  # type: ignore[operator]
    return torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2).contiguous()


def open_arrays(
    arrays: Arrays, *, images: int = 0, reporting: int = 0, validation: float = 0.1, seed: int = 0
) -> Data:
    """A `Data` over some training images, classes in turn (0: all), and the first of `val`.

    A fraction `validation` of them chooses; the rest trains and calibrates.
    """
    labels = arrays["train_labels"]
    rows = in_turn(labels, torch.arange(len(labels)), seed=seed)[: images or None]
    training, split = stratified(labels, rows, fraction=validation, seed=0)
    shown = in_turn(arrays["val_labels"], torch.arange(len(arrays["val_labels"])), seed=0)
    shown = shown[: reporting or None]
    shape = tuple(arrays["train_images"].shape[1:])
    preprocessing = Preprocessing(shape, MEAN, STD, resize=shape[1:])  # type: ignore[arg-type]
    train = Pixels(arrays["train_images"], labels, preprocessing)
    val = Pixels(arrays["val_images"], arrays["val_labels"], preprocessing)
    info = DataInfo(
        source="CIFAR-10 in memory",
        classes=tuple(map(str, range(10))),
        preprocessing=preprocessing,
        training=len(training),
        validation=len(split),
        reporting=len(shown),
        cache="device",
        skipped=(),
        fingerprint=f"{images}-{seed}",
    )
    parts = {"training": (train, training), "validation": (train, split), "reporting": (val, shown)}
    return Data(info, DataSettings(), parts=parts, augment=Augment(pad=4, flip=True))


def _save(folder: str, path: str) -> None:
    arrays = {
        name: value.permute(0, 2, 3, 1).numpy() if value.dim() == 4 else value.numpy()
        for name, value in load_arrays(Path(folder)).items()
    }

    def fill(target: Path) -> None:
        with target.open("wb") as file:
            np.savez(file, **arrays)

    write_with(Path(path), fill, need=sum(a.nbytes for a in arrays.values()))


if __name__ == "__main__":
    _save(*sys.argv[1:])
