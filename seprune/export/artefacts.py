"""Exported files measured beside each other: size, quality, latency, and a run by itself."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from seprune.errors import InputError
from seprune.export.onnx import difference, open_exported
from seprune.measure.latency import latency
from seprune.measure.metrics import evaluate
from seprune.runtime.checksums import sha256
from seprune.runtime.child_process import child_environment
from seprune.runtime.progress import Track, silent
from seprune.tasks import Task

BATCHES = (1, 8)
CLOSE = 1e-4  # of the largest output, between two processes with the same file and threads
ALONE = """
import sys
import numpy as np
import onnxruntime as ort

shape = tuple(map(int, sys.argv[2].split(",")))
images = np.frombuffer(sys.stdin.buffer.read(), np.float32).reshape(shape)
session = ort.InferenceSession(sys.argv[1], providers=["CPUExecutionProvider"])
for part in (images[:1], images):
    made = session.run(None, {session.get_inputs()[0].name: part})[0]
    sys.stdout.buffer.write(np.ascontiguousarray(made, np.float32).tobytes())
assert not {"seprune", "torch"} & set(sys.modules)
"""
ALONE_PT2 = """
import sys
import torch
import torch.ao.quantization.fx._decomposed
from torch.utils._pytree import tree_leaves

shape = tuple(map(int, sys.argv[2].split(",")))
images = torch.frombuffer(bytearray(sys.stdin.buffer.read()), dtype=torch.float32).reshape(shape)
torch.set_num_threads(int(sys.argv[3]))
network = torch.export.load(sys.argv[1]).module()
for part in (images[:1], images):
    made = tree_leaves(network(part))[0]
    sys.stdout.buffer.write(made.detach().float().contiguous().numpy().tobytes())
assert not {"seprune", "torchao"} & set(sys.modules)
"""


@dataclass(frozen=True)
class Artefact:
    """A file, and what was measured of it.

    Attributes:
        bytes: of the file, or of the weights.
        metrics: as fractions, by our names; None without images that have its labels.
        milliseconds: medians by batch size.
        count: images that the metrics are of.
        path: None: the network itself, as PyTorch runs it.
        sha256: of the file.
    """

    name: str
    bytes: int
    metrics: Mapping[str, float] | None
    milliseconds: Mapping[int, float | None]
    path: Path | None = None
    count: int = 0
    sha256: str | None = None

    def plain(self) -> dict[str, Any]:
        """JSON types."""
        times = {str(batch): value for batch, value in self.milliseconds.items()}
        metrics = None if self.metrics is None else dict(self.metrics)
        kept = self.path is not None and self.path.is_file()  # a dense parent's is not
        file = self.path.name if self.path is not None and kept else None
        return {"name": self.name, "file": file, "bytes": self.bytes, "metrics": metrics,
                "median_ms": times, "count": self.count, "sha256": self.sha256}  # fmt: skip


class FileNetwork(nn.Module):
    """An exported file as a module, so that it is evaluated as any network is."""

    def __init__(self, path: Path, form: str = "onnx") -> None:
        super().__init__()
        self.path = path
        self.run = open_exported(path, form)

    def forward(self, images: Tensor) -> Tensor:
        return self.run(images)[0]


def measure_artefacts(
    files: Mapping[str, Path | nn.Module],
    shape: Sequence[int],
    loader: Iterable[Any] | None,
    *,
    task: Task | None = None,
    track: Track = silent,
) -> list[Artefact]:
    """Every file evaluated on the same images, and timed in turns with the others.

    Args:
        files: by the names that people see: ONNX files, `FileNetwork`s, and networks themselves.
        loader: of images with labels; None: nothing is evaluated.
    """
    networks = {
        name: FileNetwork(given) if isinstance(given, Path) else given.eval()
        for name, given in files.items()
    }
    times = latency(networks, shape, batch_sizes=BATCHES)
    made = []
    for name, network in networks.items():
        metrics, count = None, 0
        if loader is not None:
            found = evaluate(network, loader, task=task, device="cpu", track=track)
            metrics, count = found.metrics, found.count
        own = {t.batch: t.median_ms for t in times if t.name == name}
        path = network.path if isinstance(network, FileNetwork) else None
        digest = None if path is None else sha256(path)
        made.append(Artefact(name, _size(network, path), metrics, own, path, count, digest))
    return made


def _size(network: nn.Module, path: Path | None) -> int:
    """Bytes of a file; of a network those of its weights."""
    if path is not None:
        return path.stat().st_size
    return sum(t.numel() * t.element_size() for t in network.state_dict().values())


def run_alone(path: Path, images: Tensor, form: str = "onnx") -> None:
    """Run a file in a new process without seprune, one image and several.

    An ONNX file runs without torch, a torch.export file without torchao.

    Raises:
        InputError: it does not run there, or answers differently.
    """
    own, script = open_exported(path, form), ALONE_PT2 if form == "pt2" else ALONE
    given, threads = images.float().contiguous(), str(torch.get_num_threads())
    size = ",".join(map(str, given.shape))
    ended = subprocess.run(
        [sys.executable, "-P", "-c", script, str(path.absolute()), size, threads],
        input=given.numpy().tobytes(),
        env=child_environment(),  # packages may come from PYTHONPATH, or from the user's own folder
        capture_output=True,
        check=False,
    )
    if ended.returncode:
        errors = ended.stderr.decode(errors="replace").strip().splitlines()
        raise _does_not_run(path, form, errors[-1] if errors else f"exit status {ended.returncode}")
    expected = torch.cat([own(part)[0].detach().float().flatten() for part in (given[:1], given)])
    answer = torch.frombuffer(bytearray(ended.stdout), dtype=torch.float32)
    if not (apart := difference([answer], [expected])) <= CLOSE:
        raise _does_not_run(path, form, f"its answer differs by {apart:.1e}")


def _does_not_run(path: Path, form: str, why: str) -> InputError:
    return InputError(
        f"{path}: does not run by itself",
        why=why,
        fix="export again with another --opset"
        if form == "onnx"
        else "import what its operators come from, such as torchvision, before it is loaded",
        code="export-mismatch",
    )
