"""`seprune export`: ONNX and torch.export files, checked; int8."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from seprune.cli import console, options
from seprune.errors import UsageError

if TYPE_CHECKING:
    from seprune.data import Data
    from seprune.export.artefacts import Artefact
    from seprune.models import ModelLoader
    from seprune.pipeline.network import LoadedNetwork


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
    int8: Annotated[
        bool, typer.Option("--int8", help="Also an int8 file beside --onnx; needs --data.")
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

    With a free batch size; they answer as the eager model does, or no file is written. With
    --int8 the files are measured beside each other: size, accuracy, latency.

    Examples:
      seprune export runs/quickstart --onnx small.onnx --pt2 small.pt2
      seprune export small --onnx small.onnx --int8 --data D
    """
    if onnx is None and pt2 is None:
        raise UsageError("nothing to export to", why="neither --onnx nor --pt2 is given",
                         fix="--onnx FILE or --pt2 FILE")  # fmt: skip
    if int8 and (onnx is None or data is None):
        raise UsageError("--int8 needs --onnx and --data",
                         why="an ONNX file is quantised, by the activations on calibration images",
                         fix="--onnx FILE --int8 --data FOLDER")  # fmt: skip
    from seprune.cli import open_inputs

    folder = open_inputs.network_of_run(run, "export")
    loader = open_inputs.loader(allow_code, str(folder))
    job = _opened(folder, data, opset, loader)
    made = {
        form: _write(job, form, path)
        for form, path in (("onnx", onnx), ("pt2", pt2))
        if path is not None
    }
    if int8 and onnx is not None:
        dense = None
        if parent is not None:
            zoo = parent.startswith(("timm/", "torchvision/")) and parent_checkpoint is None
            given = options.NetworkOptions(parent, checkpoint=parent_checkpoint, pretrained=zoo)
            dense = open_inputs.network(options.recipe(given), loader=loader, like=job.network)
        made["int8"] = _quantized(job, onnx, dense)
    if json:
        console.give(made)


def _opened(folder: Path, data: str | None, opset: int | None, loader: ModelLoader) -> _Job:
    from seprune.pipeline.inputs import open_section
    from seprune.pipeline.network import open_network

    recipe = options.recipe(options.NetworkOptions(str(folder)), data=data)
    network = open_network(recipe.model, loader=loader)
    if recipe.data is None:
        return _Job(network, None, opset)
    known = network.trained_for
    found = open_section(
        recipe.data, network.shape, task=known.task, known=known, track=console.track
    )
    return _Job(network, found, opset)


def _write(job: _Job, form: str, path: Path) -> dict[str, Any]:
    """Export a saved network to a path: its size, error and latencies."""
    from seprune.export.onnx import export_model, side_by_side

    images = None if job.data is None else next(iter(job.data.reporting(32)))[0]
    network, shape = job.network.model, job.network.shape
    made = export_model(
        network,
        shape,
        path,
        format="onnx" if form == "onnx" else "pt2",
        opset=job.opset if form == "onnx" else None,
        images=images,
    )
    times = side_by_side(network, made, shape)
    speeds = ", ".join(
        f"{t.name} {t.median_ms:.2f} ms at batch {t.batch}" for t in times if t.median_ms
    )
    console.tell(f"{path}: {made.bytes:,} bytes, largest difference {made.max_error:.1e}; {speeds}")
    return {
        "file": str(path),
        "bytes": made.bytes,
        "max_error": made.max_error,
        "opset": made.opset,
        "latency": [{"name": t.name, "batch": t.batch, "median_ms": t.median_ms} for t in times],
    }


def _quantized(job: _Job, onnx: Path, dense: LoadedNetwork | None) -> dict[str, Any]:
    """An int8 file beside an ONNX file, measured with it, and with the dense parent as both."""
    from seprune.export import int8
    from seprune.export.artefacts import measure_artefacts, run_alone
    from seprune.export.onnx import export_model

    data, shape = job.data, job.network.shape
    assert data is not None  # `export` has asked for it
    target = int8.int8_path(onnx)
    files = {"pruned fp32": onnx, "pruned int8": target}
    with tempfile.TemporaryDirectory() as place:
        pairs = [(onnx, target)]
        if dense is not None:
            full = Path(place) / "dense.onnx"
            export_model(dense.model, shape, full, opset=job.opset)
            pairs.append((full, int8.int8_path(full)))
            files = {"dense fp32": full, "dense int8": pairs[1][1], **files}
        for source, made in pairs:
            calibration = data.calibration(int8.IMAGES, batch_size=32)
            int8.quantize(source, made, (images for images, _ in calibration))
        run_alone(target, next(iter(data.reporting(3)))[0])
        labelled = job.network.trained_for.labels == data.info.classes
        found = measure_artefacts(
            files,
            shape,
            data.reporting() if labelled else None,
            task=data.task,
            track=console.track,
        )
    _show(found, target)
    return {
        "file": str(target),
        "calibration": int8.IMAGES,
        "artefacts": [a.plain() for a in found],
    }


def _show(found: list[Artefact], target: Path) -> None:
    from seprune.cli import tables

    console.stderr().print(tables.artefacts(found))
    console.tell(f"{target}: int8, runs by itself in a process without seprune")
