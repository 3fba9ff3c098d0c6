"""`seprune export`: ONNX and torch.export files, checked; int8."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from seprune.cli import console, options
from seprune.errors import EnvironmentFault, UsageError

if TYPE_CHECKING:
    from torch import nn

    from seprune.data import Data
    from seprune.export.artefacts import Artefact
    from seprune.export.onnx import Exported
    from seprune.models import ModelLoader
    from seprune.pipeline.network import LoadedNetwork


Form = Literal["onnx", "pt2"]
_RUNTIMES = {"onnx": "onnxruntime", "pt2": "torch.export"}
_TITLES = {"onnx": "ONNX", "pt2": "torch.export"}


@dataclass(frozen=True)
class _Job:
    """A network, the images to compare and to calibrate on, and what is wanted of them."""

    network: LoadedNetwork
    data: Data | None
    opset: int | None


def export(
    run: Annotated[
        str, typer.Argument(metavar="RUN", help="A run folder, or a network that seprune wrote.")
    ],
    onnx: Annotated[Path | None, typer.Option(metavar="F", help="Write ONNX here.")] = None,
    pt2: Annotated[Path | None, typer.Option(metavar="F", help="Write torch.export here.")] = None,
    timm: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Write what timm alone loads into DIR.")
    ] = None,
    int8: Annotated[
        bool, typer.Option("--int8", help="Also int8 files beside these; needs --data.")
    ] = False,
    data: Annotated[
        str | None, typer.Option("--data", metavar="D", help="Images to compare on; else noise.")
    ] = None,
    parent: Annotated[
        str | None, typer.Option(metavar="MODEL", help="With --int8: measure this dense one, too.")
    ] = None,
    parent_checkpoint: Annotated[
        str | None, typer.Option(metavar="F", help="Its weights; else those of its zoo.")
    ] = None,
    opset: Annotated[int | None, typer.Option(help="Of ONNX.")] = None,
    allow_code: options.AllowCode = False,
    json: options.Json = False,
) -> None:
    """Write ONNX and torch.export files, checked; int8.

    With a free batch size; they answer as the eager model does, or no file is written. The
    network and its files are measured beside each other: size, latency, accuracy on --data.

    Examples:
      seprune export runs/quickstart --onnx small.onnx --pt2 small.pt2
      seprune export small --onnx small.onnx --int8 --data D
    """
    if onnx is None and pt2 is None and (timm is None or int8):
        raise UsageError("nothing to export to", why="neither --onnx nor --pt2 is given",
                         fix="--onnx FILE or --pt2 FILE")  # fmt: skip
    _needs("--int8", int8, "--data FOLDER", data, "scales come from activations on its images")
    _needs("--parent", parent, "--int8", int8, "it is measured beside int8 files")
    _needs("--parent-checkpoint", parent_checkpoint, "--parent MODEL", parent, "it is its file")
    _needs("--opset", opset, "--onnx FILE", onnx, "only ONNX has opsets")
    from seprune.cli import next_step, open_inputs
    from seprune.recipe.sections import ModelSection

    folder = open_inputs.network_of_run(run, "export")
    loader = open_inputs.loader(allow_code, ModelSection(name=str(folder)))
    job = _opened(folder, data, opset, loader)
    given: list[tuple[Form, Path | None]] = [("onnx", onnx), ("pt2", pt2)]
    paths = {form: path for form, path in given if path is not None}
    written = {form: _write(job, form, path) for form, path in paths.items()}
    if timm is not None:
        _write_timm(job, timm)
    dense = None
    if int8 and parent is not None:
        zoo = parent.startswith(("timm/", "torchvision/")) and parent_checkpoint is None
        of = options.NetworkOptions(parent, checkpoint=parent_checkpoint, pretrained=zoo)
        dense = open_inputs.network(options.recipe(of), loader=loader, like=job.network)
    found = _measured(job, paths, int8, dense)
    _keep(found, Path(run), job)
    if Path(run).is_dir():  # else of a Hub: there is no report of it here
        next_step.show(next_step.look(Path(run)))
    if json:
        console.give(_document(written, found, _int8_of(paths) if int8 else {}))


def _needs(option: str, value: object, other: str, there: object, why: str) -> None:
    """Refuse an option that is given without the other one that it needs."""
    if value and not there:
        raise UsageError(f"{option} needs {other.partition(' ')[0]}", why=why, fix=f"add {other}")


def _opened(folder: Path, data: str | None, opset: int | None, loader: ModelLoader) -> _Job:
    from seprune.cli import open_inputs
    from seprune.pipeline.network import open_network
    from seprune.recipe import Recipe

    recipe = options.recipe(options.NetworkOptions(str(folder)), data=data)
    if not isinstance(recipe, Recipe):
        return _Job(open_network(recipe.model, loader=loader), None, opset)
    network, found = open_inputs.network_and_data(
        recipe, loader=loader, labelled=False, glance=["val"]
    )
    return _Job(network, found, opset)


def _write(job: _Job, form: Form, path: Path) -> Exported:
    """Export a saved network to a path."""
    from seprune.export.artefacts import run_alone
    from seprune.export.onnx import export_model

    images = None if job.data is None else next(iter(job.data.reporting(32)))[0]
    made = export_model(
        job.network.model,
        job.network.shape,
        path,
        format=form,
        opset=job.opset if form == "onnx" else None,
        images=images,
    )
    run_alone(path, job.network.example(3) if images is None else images[:3], form)
    console.tell(f"{path}: {made.bytes:,} bytes, largest difference {made.max_error:.1e}, "
                 "runs by itself in a process without seprune")  # fmt: skip
    return made


def _write_timm(job: _Job, folder: Path) -> None:
    """Export a saved network to timm's own format, into a folder."""
    from seprune.export.timm_format import export_timm

    text, weights, code = export_timm(job.network.model, job.network.architecture, folder)
    console.tell(f"{folder}: {text.name}, {weights.name}; timm loads them as {code.name} shows")


def _measured(
    job: _Job, paths: Mapping[Form, Path], int8: bool, dense: LoadedNetwork | None
) -> list[Artefact]:
    """The network and its files side by side, int8 and the dense parent's too if they are wanted.

    Accuracy is measured where there are images with the network's labels.
    """
    from seprune.cli import tables
    from seprune.export.artefacts import FileNetwork, measure_artefacts
    from seprune.export.onnx import export_model

    data = job.data
    files: dict[str, Path | nn.Module] = {}
    with tempfile.TemporaryDirectory() as place:
        if int8 and dense is not None:
            for form in paths:
                full = Path(place) / f"dense.{form}"
                export_model(dense.model, job.network.shape, full, format=form, opset=job.opset)
                files |= _pair(job, "dense", dense.model, form, full)
        for form, path in paths.items():
            if int8:
                files |= _pair(job, "pruned", job.network.model, form, path)
            else:
                files[_TITLES[form]] = FileNetwork(path, form)
        labelled = data and job.network.trained_for.labels == data.info.classes
        found = measure_artefacts(
            {"PyTorch": job.network.model, **files},
            job.network.shape,
            data.reporting() if data and labelled else None,
            task=data.task if data else None,
            track=console.track,
        )
    console.stderr().print(tables.artefacts(found))
    for path in _int8_of(paths).values() if int8 else ():
        console.tell(f"{path}: int8, runs by itself in a process without seprune")
    return found


def _int8_of(paths: Mapping[Form, Path]) -> dict[Form, Path]:
    """Where the int8 file beside each file lies."""
    from seprune.export.int8 import int8_path

    return {form: int8_path(path) for form, path in paths.items()}


def _pair(
    job: _Job, who: str, model: nn.Module, form: Form, path: Path
) -> dict[str, Path | nn.Module]:
    """A file and the int8 file beside it, which has run by itself, by the names people see."""
    from seprune.export import int8
    from seprune.export.artefacts import FileNetwork, run_alone
    from seprune.export.pt2e import quantize_pt2

    assert job.data is not None  # `export` has asked for it
    target = int8.int8_path(path)
    calibration = job.data.calibration(int8.IMAGES, batch_size=32)
    batches = (images for images, _ in calibration)
    if form == "onnx":
        int8.quantize(path, target, batches)
    else:
        quantize_pt2(model, job.network.shape, target, batches)
    run_alone(target, next(iter(job.data.reporting(3)))[0], form)
    behind = "" if form == "onnx" else f", {_TITLES[form]}"
    return {
        f"{who} fp32{behind}": FileNetwork(path, form),
        f"{who} int8{behind}": FileNetwork(target, form),
    }


def _keep(found: list[Artefact], folder: Path, job: _Job) -> None:
    """Leave what was measured in the folder that was exported, for its report."""
    from seprune.report.artefacts import keep_artefacts
    from seprune.report.card import data_name

    if not folder.is_dir():
        return
    try:
        name = None if job.data is None else data_name(job.data.info.source)
        own = {"sha256": job.network.digest}
        rows = [a.plain() | (own if a.path is None else {}) for a in found]
        keep_artefacts(rows, folder, data=name)
    except EnvironmentFault as error:  # the files are there; the folder is somebody else's perhaps
        console.tell(f"note: not kept for the report: {error.what}, {error.why}")


def _document(
    written: Mapping[Form, Exported], found: list[Artefact], int8: Mapping[Form, Path]
) -> dict[str, Any]:
    """What `--json` gives: a file under its format, and int8 with what stands beside it."""
    from seprune.export.int8 import IMAGES

    by_path = {a.path: a for a in found}
    made: dict[str, Any] = {}
    for form, file in written.items():
        pair = [("eager", by_path[None]), (_RUNTIMES[form], by_path[file.path])]
        made[form] = {
            "file": str(file.path),
            "bytes": file.bytes,
            "max_error": file.max_error,
            "opset": file.opset,
            "metrics": pair[1][1].metrics,
            "latency": [
                {"name": name, "batch": batch, "median_ms": time}
                for name, one in pair
                for batch, time in one.milliseconds.items()
            ],
        }
    for form, path in int8.items():
        behind = tuple(f"{n}{'' if form == 'onnx' else ', torch.export'}" for n in ("fp32", "int8"))
        beside = [a.plain() for a in found if a.name.endswith(behind)]
        key = "int8" if form == "onnx" else "int8_pt2"
        made[key] = {"file": str(path), "calibration": IMAGES, "artefacts": beside}
    return made
