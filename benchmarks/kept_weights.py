"""Trained networks of the benchmarks, kept in benchmarks/weights so that nobody trains them again.

Safetensors files, NETWORK-cifar10.safetensors, in half precision; where that is too much, kernels
and matrices are int8 with one scale for every output channel. benchmarks/weights/README.md says how
each was trained and what exactly these weights reach. Benchmarks load them where no checkpoint is
given.

    python benchmarks/kept_weights.py mobilenet_v3_small RUN/trained    # keep what a run trained
"""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from seprune.runtime.files import write_with
from seprune.runtime.paths import cache_folder

FOLDER = Path(__file__).parent / "weights"
MOST = 5_000_000  # bytes of a file
NETWORKS = {  # name in file names -> model, pixels of a side
    "se_resnet20": ("seprune/se_resnet20", 32),
    "mobilenet_v3_small": ("torchvision/mobilenet_v3_small", 64),
    "regnety": ("timm/regnety_002", 64),
}
_SCALE = "@scale"


def kept(network: str) -> Path | None:
    """A checkpoint of a network, the same file in every process; None where nothing is kept."""
    path = FOLDER / f"{network}-cifar10.safetensors"
    if not path.is_file():
        return None
    tensors = load_file(path)
    if not any(name.endswith(_SCALE) for name in tensors):
        return path
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    whole = cache_folder("weights") / f"{digest}.safetensors"
    whole.parent.mkdir(parents=True, exist_ok=True)
    write_with(whole, lambda target: save_file(unpacked(tensors), target), need=MOST)
    return whole


def keep(network: str, trained: Path) -> Path:
    """Write the weights of a folder that a run has trained, as small as they have to be."""
    tensors = load_file(trained / "model.safetensors")
    made = halved(tensors)
    if _bytes(made) > MOST:
        made = rounded(tensors)
    if _bytes(made) > MOST:
        raise SystemExit(f"{_bytes(made):,} bytes are more than {MOST:,}")
    path = FOLDER / f"{network}-cifar10.safetensors"
    write_with(path, lambda target: save_file(made, target), need=_bytes(made))
    return path


def halved(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Half precision for all numbers with a point."""
    return {n: t.half() if t.is_floating_point() else t for n, t in tensors.items()}


def rounded(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Kernels and matrices as int8, with a scale for each of their first dimension."""
    made = halved(tensors)
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and tensor.dim() > 1:
            most = tensor.float().flatten(1).abs().amax(1)
            scale = torch.where(most > 0, most / 127, torch.ones_like(most))
            made[name] = (tensor / _beside(scale, tensor)).round().to(torch.int8)
            made[name + _SCALE] = scale
    return made


def unpacked(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What `halved` and `rounded` have kept, as float32."""
    made = {}
    for name, tensor in tensors.items():
        scale = tensors.get(name + _SCALE)
        if scale is not None:
            made[name] = tensor.float() * _beside(scale, tensor)
        elif not name.endswith(_SCALE):
            made[name] = tensor.float() if tensor.is_floating_point() else tensor
    return made


def _beside(scale: Tensor, tensor: Tensor) -> Tensor:
    return scale.reshape(-1, *[1] * (tensor.dim() - 1))


def _bytes(tensors: Mapping[str, Tensor]) -> int:
    return sum(t.numel() * t.element_size() for t in tensors.values())


if __name__ == "__main__":
    made = keep(sys.argv[1], Path(sys.argv[2]))
    print(f"{made.name}: {hashlib.sha256(made.read_bytes()).hexdigest()}")
