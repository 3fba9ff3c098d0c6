"""Trained networks of the benchmarks, kept in benchmarks/weights so that nobody trains them again.

Half-precision safetensors files, NETWORK-cifar10.safetensors; benchmarks/weights/README.md says how
each was trained and what it reaches. Benchmarks load them where no checkpoint is given.

    python benchmarks/kept_weights.py mobilenet_v3_small RUN/trained    # keep what a run trained
"""

from __future__ import annotations

import hashlib
import sys
from pathlib import Path

from safetensors.torch import load_file, save_file

from seprune.runtime.files import write_with

FOLDER = Path(__file__).parent / "weights"
MOST = 5_000_000  # bytes of a file


def kept(network: str) -> Path | None:
    """The file of a network, if there is one."""
    path = FOLDER / f"{network}-cifar10.safetensors"
    return path if path.is_file() else None


def keep(network: str, trained: Path) -> Path:
    """Write the weights of a folder that a run has trained, in half precision."""
    tensors = {
        name: tensor.half() if tensor.is_floating_point() else tensor
        for name, tensor in load_file(trained / "model.safetensors").items()
    }
    path = FOLDER / f"{network}-cifar10.safetensors"
    size = sum(t.numel() * t.element_size() for t in tensors.values())
    if size > MOST:
        raise SystemExit(f"{size:,} bytes are more than {MOST:,}")
    write_with(path, lambda target: save_file(tensors, target), need=size)
    return path


if __name__ == "__main__":
    made = keep(sys.argv[1], Path(sys.argv[2]))
    print(f"{made.name}: {hashlib.sha256(made.read_bytes()).hexdigest()}")
