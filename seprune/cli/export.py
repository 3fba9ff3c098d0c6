"""`seprune export`: ONNX and torch.export files, checked."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from seprune.cli import console, options
from seprune.errors import UsageError

if TYPE_CHECKING:
    from seprune.models import ModelLoader


def export(
    run: Annotated[
        str, typer.Argument(metavar="RUN", help="A run folder, or a network that seprune wrote.")
    ],
    onnx: Annotated[Path | None, typer.Option(metavar="F", help="Write ONNX here.")] = None,
    pt2: Annotated[Path | None, typer.Option(metavar="F", help="Write torch.export here.")] = None,
    data: Annotated[
        str | None, typer.Option("--data", metavar="D", help="Images to compare on; else noise.")
    ] = None,
    opset: Annotated[int | None, typer.Option(help="Of ONNX.")] = None,
    allow_code: options.AllowCode = False,
    json: options.Json = False,
) -> None:
    """Write ONNX and torch.export files, checked.

    With a free batch size; they answer as the eager model does, or no file is written.

    Example:
      seprune export runs/quickstart --onnx small.onnx --pt2 small.pt2
    """
    if onnx is None and pt2 is None:
        raise UsageError("nothing to export to", why="neither --onnx nor --pt2 is given",
                         fix="--onnx FILE or --pt2 FILE")  # fmt: skip
    from seprune.cli import open_inputs

    network = open_inputs.network_of_run(run, "export")
    made = _write(
        network,
        {"onnx": onnx, "pt2": pt2},
        data,
        opset=opset,
        loader=open_inputs.loader(allow_code, str(network)),
    )
    if json:
        console.give(made)


def _write(
    folder: Path,
    paths: Mapping[str, Path | None],
    data: str | None,
    *,
    opset: int | None = None,
    loader: ModelLoader,
) -> dict[str, Any]:
    """Export a saved network to the given paths, by format; sizes, errors and latencies."""
    from seprune.export.onnx import export_model, side_by_side
    from seprune.pipeline.inputs import open_section
    from seprune.pipeline.network import open_network

    recipe = options.recipe(options.NetworkOptions(str(folder)), data=data)
    network = open_network(recipe.model, loader=loader)
    images = None
    if recipe.data is not None:
        known = network.trained_for
        found = open_section(
            recipe.data, network.shape, task=known.task, known=known, track=console.track
        )
        images = next(iter(found.reporting(32)))[0]
    written: dict[str, Any] = {}
    for form, path in paths.items():
        if path is None:
            continue
        made = export_model(
            network.model,
            network.shape,
            path,
            format="onnx" if form == "onnx" else "pt2",
            opset=opset if form == "onnx" else None,
            images=images,
        )
        times = side_by_side(network.model, made, network.shape)
        written[form] = {
            "file": str(path),
            "bytes": made.bytes,
            "max_error": made.max_error,
            "opset": made.opset,
            "latency": [
                {"name": t.name, "batch": t.batch, "median_ms": t.median_ms} for t in times
            ],
        }
        speeds = ", ".join(
            f"{t.name} {t.median_ms:.2f} ms at batch {t.batch}" for t in times if t.median_ms
        )
        console.tell(
            f"{path}: {made.bytes:,} bytes, largest difference {made.max_error:.1e}; {speeds}"
        )
    return written
