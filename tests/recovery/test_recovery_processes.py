"""Candidates, refit and reconstruction by several processes: what one process gives."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

ROOT = Path(__file__).parents[2]


def run(world: int, folder: Path) -> dict[str, object]:
    """The worker alone (`world` 0), or by torchrun over gloo."""
    folder.mkdir()
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    several = ["-m", "torch.distributed.run", "--nproc-per-node", str(world),
               "--master-port", str(port)] if world else []  # fmt: skip
    worker = Path(__file__).parent / "recovery_worker.py"
    done = subprocess.run(
        [sys.executable, *several, str(worker), str(folder)],
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found: dict[str, object] = json.loads((folder / "found.json").read_text())
    return found


@pytest.mark.slow
@pytest.mark.timeout(1300)
def test_several_processes_choose_and_reconstruct_as_one(tmp_path: Path) -> None:
    alone = run(0, tmp_path / "alone")
    assert alone["best"], "something was learned"
    weights = load_file(tmp_path / "alone" / "model.safetensors")
    for world in (2, 3):
        found = run(world, tmp_path / str(world))
        assert found["chosen"] == alone["chosen"]
        assert found["best"] == alone["best"]
        # sums are float64, but losses are scaled by variances in float32
        assert found["errors"] == pytest.approx(alone["errors"], rel=1e-5)
        for mine, other in zip(found["refit"], alone["refit"], strict=True):
            assert mine[0] == other[0]
            assert mine[1] == pytest.approx(other[1], rel=1e-8)
        for mine, other in zip(found["trials"], alone["trials"], strict=True):
            assert (mine[0], mine[2]) == (other[0], other[2])
            assert mine[1] == pytest.approx(other[1], rel=1e-8)
        own = load_file(tmp_path / str(world) / "model.safetensors")
        for name, tensor in weights.items():
            torch.testing.assert_close(own[name], tensor, rtol=1e-4, atol=1e-6)
