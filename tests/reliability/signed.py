"""Every file that seprune reads, changed with its checksums made right, and read by what reads it.

As a script it is a child process: `[SUBJECT, SEED]` on stdin, one JSON line for each: what reading
the changed file came to, and the CPU seconds that it took. Anything that is no SepruneError ends it
with a traceback.
"""

from __future__ import annotations

import io
import json
import random
import resource
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import repositories
import torch
from harness import TINY, tiny_images
from mutations import (
    HEADER,
    JOURNAL,
    JSON,
    JSON_LINES,
    LINES,
    PICTURE,
    SHARD,
    TABLE,
    TENSORS,
    Form,
    mutated,
)
from PIL import Image
from rich.console import Console

import seprune
from seprune.checkpoint import load_weights
from seprune.errors import SepruneError
from seprune.export.hub import _contents as hub_contents
from seprune.graph.trace import record
from seprune.importance.ablation import Sensitivity, weighed
from seprune.measure.latency_table import LatencyTable, TableKey
from seprune.models.hub import HubRepo
from seprune.models.preprocessing import preprocessing_in
from seprune.models.published import card_metrics
from seprune.pipeline import run_folder
from seprune.pipeline.budget_result import read_importance
from seprune.pipeline.network import open_network
from seprune.recipe.sections import ModelSection
from seprune.recovery.reconstruct import ReconstructOptions, reconstruct
from seprune.report import compare, measurement, table
from seprune.report.artefacts import keep_artefacts
from seprune.report.card import model_card
from seprune.report.html import write_html
from seprune.report.terminal import show
from seprune.report.training import read_training
from seprune.runtime.checksums import ARTEFACTS, CARD
from seprune.runtime.files import write_json, write_sums
from seprune.runtime.threads import choose_threads
from seprune.runtime.transaction import RECORD, settle

OVERRIDES = (
    *TINY,
    "train.epochs=1",
    "model.input=[3,12,12]",
    "sensitivity.images=4",
    "prune.recover=bn",
    "threads=1",
)
CRITERIA = ("gate_logit", "gate_mean", "gate_class", "gate_std", "gate_mean_measured")
STATUSES = (2, 3, 4, 6)


class World:
    """A folder with one good file of every kind, made once."""

    def __init__(self, home: Path) -> None:
        torch.set_num_threads(1)
        self.home = home
        self.images = tiny_images(home / "images")
        self.recipe = seprune.load_recipe("quickstart", [*OVERRIDES, f"data.source={self.images}"])
        self.run = home / "run"
        seprune.run(self.recipe, self.run)
        (home / "recipe.json").write_text(json.dumps(self.recipe.model_dump(mode="json")))
        key = TableKey("cpu", "eager", "1", 1, 1)
        LatencyTable(key, {"conv 3 4": 0.5, "linear 2 2": 1.0}).save(home / "latency.json")
        hub = {"size": {"shortest_edge": 20}, "crop_size": 16, "crop_pct": 0.8, "resample": 3}
        hub |= dict.fromkeys(("do_resize", "do_center_crop", "do_normalize"), True)
        hub |= {"image_mean": [0.5] * 3, "image_std": [0.2] * 3, "rescale_factor": 1 / 255}
        write_json(home / "preprocessor_config.json", hub)
        self._data_sets()

    def _data_sets(self) -> None:
        pixels = np.random.default_rng(0)
        for name in ("masks", "boxes", "columns"):
            (self.home / name).mkdir()
        for part in ("images", "masks"):
            (self.home / "masks" / part).mkdir()
        (self.home / "masks" / "classes.txt").write_text("a\nb\nc\n")
        boxes: dict[str, list[Any]] = {"images": [], "annotations": [], "categories": []}
        boxes["categories"] = [{"id": 7, "name": "cat"}, {"id": 9, "name": "dog"}]
        rows = ["image,split,a,b"]
        for n in range(8):
            image = Image.fromarray(pixels.integers(0, 256, (12, 16, 3), dtype=np.uint8))
            for place in ("masks/images", "boxes", "columns"):
                image.save(self.home / place / f"{n}.png")
            mask = pixels.integers(0, 3, (12, 16), dtype=np.uint8)
            Image.fromarray(mask).save(self.home / "masks" / "masks" / f"{n}.png")
            boxes["images"].append({"id": n, "file_name": f"{n}.png"})
            box = {"id": n, "image_id": n, "category_id": 7 + 2 * (n % 2), "bbox": [1, 2, 5.5, 6]}
            boxes["annotations"].append(box)
            rows.append(f"{n}.png,{'val' if n < 2 else 'train'},{n % 2},{n // 2 % 2}")
        write_json(self.home / "boxes" / "boxes.json", boxes)
        (self.home / "columns" / "rows.csv").write_text("\n".join(rows) + "\n")

    @cached_property
    def parent(self) -> torch.nn.Module:
        return seprune.load(self.run / "trained")

    @cached_property
    def example(self) -> torch.Tensor:
        return torch.rand(2, 3, 12, 12, generator=torch.Generator().manual_seed(0))

    @cached_property
    def structure(self) -> Any:
        return seprune.analyse(self.parent, self.example)

    @cached_property
    def plan(self) -> Any:
        return seprune.PruningPlan.load(self.run / "plan.json")

    @cached_property
    def batches(self) -> Any:
        return [(self.example, torch.tensor([0, 1]))] * 3

    def scored(self, statistics: Any, criterion: str) -> Any:
        scoring = seprune.Scoring(criterion)
        return seprune.score(self.structure, statistics, model=self.parent, scoring=scoring)


# -- readers: what commands do with the file ------------------------------------------------------


def _epochs(_: World, path: Path) -> None:
    read_training(path, stage="fine-tuned", budget=None, metric="top1")


def _report(world: World, path: Path) -> None:
    found = measurement.read(path)
    console = Console(file=io.StringIO(), width=100)
    show(found, console)
    for gate in found.gates[:1]:
        show(found, console, gate=gate.name)
    table.write_csv(found, world.home / "out.csv")
    compare.write_csv(compare.compare([found, found]), world.home / "out.csv")
    for one in found.measurements:
        model_card(found, one)


def _page(world: World, path: Path) -> None:
    write_html(measurement.read(path), world.home / "out.html")


def _again(world: World, path: Path) -> None:
    seprune.run(world.recipe, path.parent)


def _looked_at(world: World, path: Path) -> None:
    run_folder.verify(path.parent)
    run_folder.RunFolder(path.parent).records()


def _plan(world: World, path: Path) -> None:
    plan = seprune.PruningPlan.load(path)
    repr(plan)
    plan.widths()
    seprune.prune(world.parent, plan, world.example)


def _statistics(world: World, path: Path) -> None:
    found = seprune.GateStatistics.load(path)
    repr(found)
    for name in CRITERIA:
        outcome(partial(world.scored, found, name))


def _saved(world: World, path: Path) -> None:
    write_sums(path.parent)
    _sums(world, path)


def _sums(world: World, path: Path) -> None:
    record(seprune.load(path.parent), world.example)  # as every command does first


def _collecting(world: World, path: Path) -> None:
    _collect(world, path.parent)


def _collect(world: World, folder: Path, stop: int | None = None) -> None:

    def batches() -> Any:
        for number, batch in enumerate(world.batches):
            if number == stop:
                raise KeyboardInterrupt
            yield batch

    options = seprune.CollectOptions(device="cpu", folder=folder, every=1)
    seprune.collect_statistics(
        world.parent,
        batches() if stop else world.batches,
        structure=world.structure,
        options=options,
    )


def _make_collecting(world: World, folder: Path) -> Path:
    with suppress(KeyboardInterrupt):
        _collect(world, folder, stop=2)
    return next(folder.glob("collecting-*"))


TUNING = seprune.FineTuneSettings(epochs=1, batch_size=8, lr=0.01, device="cpu", recalibrate=0)


def _finetune(world: World, path: Path) -> None:
    seprune.finetune(world.parent, (world.batches, world.batches), TUNING, folder=path.parents[1])


def _make_finetune(world: World, folder: Path) -> Path:
    seprune.finetune(world.parent, (world.batches, world.batches), TUNING, folder=folder)
    return max((folder / "state").glob("*.safetensors"))


def _reconstruct(world: World, path: Path) -> None:
    options = ReconstructOptions(epochs=1, batch_size=8, device="cpu", folder=path.parent)
    pruned = seprune.load(world.run / "pruned")
    reconstruct(world.parent, pruned, world.plan, [world.example] * 4, options=options)


def _make_reconstruct(world: World, folder: Path) -> Path:
    _reconstruct(world, folder / "x")
    return max(folder.glob("*.safetensors"))


def _sensitivity(world: World, path: Path) -> None:
    weighed(world.scored(None, "l2"), Sensitivity.load(path))


def _hub(_: World, path: Path) -> None:
    open_network(ModelSection(name="hf-hub:a/b", checkpoint=str(path.parent)))


def _pushed(_: World, path: Path) -> None:
    write_sums(path.parent)
    hub_contents(path.parent, HubRepo.of("hf-hub:a/b"))


def _make_pushed(world: World, folder: Path) -> Path:
    shutil.copytree(world.run / "pruned", folder, dirs_exist_ok=True)
    (folder / CARD).unlink(missing_ok=True)
    config = json.loads((folder / "config.json").read_text())
    write_json(folder / "config.json", config | {"metrics": {"top1": 0.5}, "base_model": "a/b"})
    return folder / "config.json"


def _card(_: World, path: Path) -> None:
    card_metrics(HubRepo.of("hf-hub:timm/x", path.parent), 224)


def _make_card(_: World, folder: Path) -> Path:
    results = "model-index:\n- name: x\n  results:\n  - task:\n      type: image-classification"
    results += "\n    dataset:\n      name: a\n      type: a\n    metrics:\n    - type: accuracy"
    table = "|model  |img_size|top1|\n|---|---|---|\n|[x](y)|224|80.5|"
    (folder / CARD).write_text(f"---\n{results}\n      value: 0.5\n---\n{table}\n")
    return folder / CARD


def _exported(world: World, path: Path) -> None:
    _report(world, path.parent / "report.json")


def _make_exported(world: World, folder: Path) -> Path:
    shutil.copytree(world.run, folder, dirs_exist_ok=True)
    row = {"name": "ONNX", "file": "a.onnx", "bytes": 10, "metrics": {"top1": 0.5}, "count": 4}
    keep_artefacts([row | {"median_ms": {"1": 0.5}}], folder, data="images")
    return folder / ARTEFACTS


def _make_shard(world: World, folder: Path) -> Path:
    files = []
    for n in range(6):
        files.append((f"{n}.png", (world.home / "boxes" / f"{n}.png").read_bytes()))
        label = ("json", json.dumps({"label": n % 2})) if n % 3 else ("cls", str(n % 2))
        files.append((f"{n}.{label[0]}", label[1].encode()))
    SHARD.store(folder / "a.tar", [[name, content.decode("latin1")] for name, content in files])
    return folder / "a.tar"


def _shard(_: World, path: Path) -> None:
    data = seprune.open_data(f"wds:{path.parent}", seprune.DataSettings(workers=0, batch_size=2))
    for loader in (data.reporting(), data.training(seed=0)):
        next(iter(loader))


def _threads(world: World, path: Path) -> None:
    choose_threads("auto", kept=run_folder.kept_threads(path.parent))


def _make_record(world: World, folder: Path) -> Path:
    staged = folder / ".x.seprune.part"
    staged.mkdir()
    for name in ("a", "b"):
        (staged / name).write_text("new")
        (folder / name).write_text("old")
    write_json(folder / RECORD, {name: f"{staged.name}/{name}" for name in ("a", "b")})
    return folder / RECORD


def _of_run(name: str) -> Callable[[World, Path], Path]:
    def make(world: World, folder: Path) -> Path:
        shutil.copytree(world.run, folder, dirs_exist_ok=True)
        return folder / name

    return make


def _of_home(name: str) -> Callable[[World, Path], Path]:
    def make(world: World, folder: Path) -> Path:
        place = (world.home / name).parent
        if place == world.home:
            shutil.copy(world.home / name, folder)
            return folder / name
        root = world.home / name.partition("/")[0]
        shutil.copytree(root, folder, dirs_exist_ok=True)
        return folder / name.partition("/")[2]

    return make


def _open(depth: int) -> Callable[[World, Path], None]:
    def read(world: World, path: Path) -> None:
        root = path.parents[depth]
        data = seprune.open_data(str(root), seprune.DataSettings(workers=0, batch_size=2))
        for loader in (data.reporting(), data.training(seed=0)):
            next(iter(loader))

    return read


@dataclass(frozen=True)
class Subject:
    """One kind of file.

    Attributes:
        form: how it is changed and signed.
        make: a folder with good files; the path of the one that is changed.
        read: what a command does with it.
        writes: reading may replace the file: it goes on with what the file holds.
        slow: seconds, not milliseconds.
    """

    form: Form
    make: Callable[[World, Path], Path]
    read: Callable[[World, Path], None]
    writes: bool = False
    slow: bool = field(default=False)


SUBJECTS: dict[str, Subject] = {
    "report": Subject(JSON, _of_run("report.json"), _report),
    "report, as a page": Subject(JSON, _of_run("report.json"), _page, slow=True),
    "journal": Subject(JOURNAL, _of_run("journal.jsonl"), _looked_at),
    "journal, gone on with": Subject(
        JOURNAL, _of_run("journal.jsonl"), _again, writes=True, slow=True
    ),
    "plan": Subject(JSON, _of_run("plan.json"), _plan),
    "statistics": Subject(TENSORS, _of_run("statistics.safetensors"), _statistics),
    "sensitivities": Subject(JSON, _of_run("sensitivity.json"), _sensitivity),
    "scores": Subject(
        TABLE, _of_run("importance.csv"), lambda _, path: read_importance(path, "x") and None
    ),
    "environment": Subject(JSON, _of_run("environment.json"), _threads),
    "config of a network": Subject(JSON, _of_run("pruned/config.json"), _saved),
    "plan of a network": Subject(JSON, _of_run("pruned/plan.json"), _saved),
    "weights of a network": Subject(TENSORS, _of_run("pruned/model.safetensors"), _saved),
    "hashes": Subject(LINES, _of_run("pruned/SHA256SUMS"), _sums),
    "checkpoint header": Subject(
        HEADER, _of_run("trained/model.safetensors"), lambda _, path: load_weights(path) and None
    ),
    "recipe": Subject(
        JSON, _of_home("recipe.json"), lambda _, path: seprune.load_recipe(path) and None
    ),
    "preprocessing": Subject(
        JSON,
        _of_home("preprocessor_config.json"),
        lambda _, path: str(preprocessing_in(path.parent)) and None,
    ),
    "config of timm": Subject(JSON, repositories.of_timm, _hub, slow=True),
    "config of transformers": Subject(JSON, repositories.of_transformers, _hub, slow=True),
    "epochs": Subject(JSON_LINES, _of_run("finetuned/metrics.jsonl"), _epochs),
    "config that is pushed": Subject(JSON, _make_pushed, _pushed),
    "card of a Hub": Subject(LINES, _make_card, _card),
    "exported files": Subject(JSON, _make_exported, _exported),
    "shard": Subject(SHARD, _make_shard, _shard),
    "latency table": Subject(
        JSON, _of_home("latency.json"), lambda _, path: LatencyTable.load(path) and None
    ),
    "unfinished statistics": Subject(TENSORS, _make_collecting, _collecting, writes=True),
    "fine-tuning state": Subject(TENSORS, _make_finetune, _finetune, writes=True, slow=True),
    "reconstruction state": Subject(
        TENSORS, _make_reconstruct, _reconstruct, writes=True, slow=True
    ),
    "record of a save": Subject(
        JSON, _make_record, lambda _, path: settle(path.parent), writes=True
    ),
    "image": Subject(PICTURE, _of_home("columns/3.png"), _open(0)),
    "mask": Subject(PICTURE, _of_home("masks/masks/3.png"), _open(1)),
    "classes": Subject(LINES, _of_home("masks/classes.txt"), _open(0)),
    "annotations": Subject(JSON, _of_home("boxes/boxes.json"), _open(0)),
    "table of numbers": Subject(TABLE, _of_home("columns/rows.csv"), _open(0)),
}


def outcome(read: Callable[[], Any]) -> str:
    """`read`, or the code of a documented error."""
    try:
        read()
    except SepruneError as error:
        found = error
    else:
        return "read"
    assert found.exit_status in STATUSES, found
    assert found.what, found
    assert found.why, found
    return found.code


class Shooter:
    """One kind of file, changed over and over."""

    def __init__(self, world: World, subject: Subject, folder: Path) -> None:
        self.world, self.subject, self.good, self.try_ = (
            world,
            subject,
            folder / "good",
            folder / "x",
        )
        self.good.mkdir(parents=True)
        path = subject.make(world, self.good)
        self.name = path.relative_to(self.good)
        self.tree = subject.form.load(path)
        self.copied = False
        assert self.shoot(None) == "read", "the unchanged file is refused"

    def shoot(self, seed: int | None) -> str:
        """The outcome of one change; None changes nothing but how the file is spelled."""
        if self.subject.writes or not self.copied:
            shutil.rmtree(self.try_, ignore_errors=True)
            shutil.copytree(self.good, self.try_)
            self.copied = True
        path = self.try_ / self.name
        shutil.copy(self.good / self.name, path)
        source = random.Random(f"{self.name} {seed}")
        self.subject.form.store(path, self.tree if seed is None else mutated(self.tree, source))
        before = path.read_bytes()
        found = outcome(lambda: self.subject.read(self.world, path))
        assert self.subject.writes or path.read_bytes() == before, "the input was changed"
        return found


def answer(limit_mib: int) -> None:
    """Answer requests until stdin ends."""
    with tempfile.TemporaryDirectory() as folder:
        world = World(Path(folder) / "world")
        shooters: dict[str, Shooter] = {}
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        room = pages * resource.getpagesize() + (limit_mib << 20)
        for line in sys.stdin:
            name, seed = json.loads(line)
            if name not in shooters:
                place = Path(folder) / str(len(shooters))
                shooters[name] = Shooter(world, SUBJECTS[name], place)
            resource.setrlimit(resource.RLIMIT_AS, (room, resource.RLIM_INFINITY))
            start = time.process_time()
            found = shooters[name].shoot(seed)
            print(json.dumps([found, time.process_time() - start]), flush=True)
            resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))


if __name__ == "__main__":
    answer(int(sys.argv[1]) if len(sys.argv) > 1 else 2048)
