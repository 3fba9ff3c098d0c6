"""What trackers were given, read back by something else than the adapter, offline."""

from __future__ import annotations

import json
import sqlite3
import struct
import subprocess
import sys
import time
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import get_args

import pytest
import torch
from torch import nn

from seprune import FineTuneSettings, finetune
from seprune.errors import EnvironmentFault
from seprune.recipe.fields import Trackers as Names
from seprune.recovery.finetune import trackers
from seprune.recovery.finetune.trackers import Subject, Trackers


class Batches(list):
    """Batches of noise that fail once, at the start of the second epoch."""

    def __init__(self, *, fails: bool = False) -> None:
        generator = torch.Generator().manual_seed(0)
        images = torch.rand(4, 8, 3, 4, 4, generator=generator)
        super().__init__((part, torch.arange(8) % 2) for part in images)
        self.passes, self.fails = 0, fails

    def __iter__(self):
        self.passes += 1
        if self.fails and self.passes == 2:
            raise RuntimeError("the power went")
        return super().__iter__()


def tiny() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(16, 2))


def trained(folder, *names: str, fails: bool = False) -> list[dict]:
    """The lines of metrics.jsonl after two epochs, of which the second is begun twice."""
    settings = FineTuneSettings(
        epochs=2, recalibrate=0, lr=0.01, optimizer="sgd", norms="eval", trackers=names
    )
    if fails:
        with pytest.raises(RuntimeError, match="the power went"):
            finetune(tiny(), Batches(fails=True), settings, folder=folder)
    finetune(tiny(), Batches(), settings, folder=folder)
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_tensorboard_has_every_epoch(tmp_path):
    pytest.importorskip("tensorboard", reason="the extra tensorboard is not installed")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    rows = trained(tmp_path, "tensorboard")
    found = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    for name in ("loss", "lr", "images_per_second"):
        events = found.Scalars(name)
        assert [e.step for e in events] == [0, 1]
        assert [e.value for e in events] == pytest.approx([row[name] for row in rows])


def records(content: bytes) -> Iterator[bytes]:
    """Those of a log in LevelDB's format: blocks of 32 KiB, and a header of 7 bytes each."""
    place, whole = 7, b""  # after the mark of the file
    while place + 7 <= len(content):
        length, kind = struct.unpack_from("<HB", content, place + 4)
        if kind == 0:  # filled up to the end of the block
            place = (place // 32768 + 1) * 32768
            continue
        whole += content[place + 7 : place + 7 + length]
        if kind in (1, 4):  # alone, or the last part
            yield whole
            whole = b""
        place += 7 + length
        if 32768 - place % 32768 < 7:
            place = (place // 32768 + 1) * 32768


def logged(path: Path, kind: type) -> list[dict]:
    """The rows of numbers in a file of wandb's."""
    found = []
    for data in records(path.read_bytes()):
        record = kind()
        record.ParseFromString(data)
        if record.WhichOneof("record_type") == "history":
            items = record.history.item
            found.append({i.key or "/".join(i.nested_key): json.loads(i.value_json) for i in items})
    return found


def test_wandb_offline_has_every_epoch(tmp_path, monkeypatch):
    pytest.importorskip("wandb", reason="the extra wandb is not installed")
    from wandb.proto.wandb_internal_pb2 import Record

    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    rows = trained(tmp_path, "wandb")
    (path,) = tmp_path.glob("wandb/offline-run-*/*.wandb")
    patience = time.monotonic() + 60
    while len(history := logged(path, Record)) < 2 and time.monotonic() < patience:
        time.sleep(0.2)  # its own process writes
    assert [h["_step"] for h in history] == [0, 1]
    assert [h["loss"] for h in history] == pytest.approx([row["loss"] for row in rows])


def test_mlflow_has_every_epoch_once_in_one_run_though_the_training_was_resumed(
    tmp_path, monkeypatch
):
    mlflow = pytest.importorskip("mlflow", reason="the extra mlflow is not installed")
    uri = f"sqlite:///{tmp_path / 'mlflow.db'}"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    monkeypatch.chdir(tmp_path)
    mlflow.set_tracking_uri(uri)
    rows = trained(tmp_path / "net", "mlflow", fails=True)
    client = mlflow.MlflowClient(uri)
    [run] = client.search_runs([client.get_experiment_by_name("seprune").experiment_id])
    assert (run.info.status, run.data.params["lr"]) == ("FINISHED", "0.01")
    losses = client.get_metric_history(run.info.run_id, "loss")
    assert [(m.step, m.value) for m in losses] == [(n, row["loss"]) for n, row in enumerate(rows)]


TRACKED = """
import faulthandler, sys
from pathlib import Path
faulthandler.dump_traceback_later(120, exit=True)
sys.path.insert(0, sys.argv[1])
import test_trackers
test_trackers.trained(Path(sys.argv[2]), "trackio", fails=True)
"""


def test_trackio_has_every_epoch_once_in_one_run_though_the_training_was_resumed(
    tmp_path, monkeypatch
):
    """In a process of its own: trackio takes its folder when it is imported."""
    pytest.importorskip("trackio", reason="the extra trackio is not installed")
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    here, folder = __file__.rpartition("/")[0], tmp_path / "net"
    done = subprocess.run([sys.executable, "-c", TRACKED, here, folder], capture_output=True)
    assert done.returncode == 0, done.stderr.decode()
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    (path,) = (tmp_path / "trackio").glob("seprune*.db")
    with sqlite3.connect(path) as base:
        found = base.execute("SELECT run_name, step, metrics FROM metrics ORDER BY step").fetchall()
    assert len({name for name, _, _ in found}) == 1
    assert [step for _, step, _ in found] == [0, 1]
    losses = [json.loads(text)["loss"] for _, _, text in found]
    assert losses == pytest.approx([row["loss"] for row in rows])


def test_a_tracker_that_fails_warns_and_the_training_ends(tmp_path, monkeypatch):
    class Broken:
        def __init__(self, module: object, subject: Subject) -> None:
            raise ConnectionError("no route to host")

    monkeypatch.setitem(trackers._KINDS, "wandb", ("json", Broken))
    with pytest.warns(UserWarning, match="wandb did not take this epoch's numbers.*no route"):
        rows = trained(tmp_path, "wandb")
    assert len(rows) == 2


def test_every_tracker_is_an_extra():
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
    assert set(trackers._KINDS) <= set(project["optional-dependencies"])
    assert set(trackers._KINDS) == set(get_args(Names))


def test_a_tracker_that_is_not_installed_is_named_before_the_first_epoch(monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(EnvironmentFault, match=r"finetune\.trackers=wandb") as caught:
        Trackers.of(["wandb"])
    assert "seprune[wandb]" in caught.value.fix
