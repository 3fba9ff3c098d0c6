"""What `seprune export` writes and says."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from seprune.cli import console
from seprune.export.onnx import export_model as write
from seprune.export.onnx import side_by_side
from seprune.models import ModelLoader
from seprune.pipeline.inputs import open_section, open_subject
from seprune.recipe import recipe_of


def export(
    folder: Path,
    paths: Mapping[str, Path | None],
    data: str | None,
    *,
    opset: int | None = None,
    loader: ModelLoader,
) -> dict[str, Any]:
    """Export a saved network to the given paths, by format; sizes, errors and latencies."""
    values = {
        "name": "export",
        "model": {"name": str(folder)},
        "data": {"source": data or "digits"},
    }
    recipe = recipe_of(values)
    subject = open_subject(recipe.model, loader=loader)
    images = None
    if data is not None:
        batches = open_section(recipe.data, subject.shape, track=console.track).reporting(32)
        images = next(iter(batches))[0]
    said: dict[str, Any] = {}
    for form, path in paths.items():
        if path is None:
            continue
        made = write(
            subject.model,
            subject.shape,
            path,
            format="onnx" if form == "onnx" else "pt2",
            opset=opset if form == "onnx" else None,
            images=images,
        )
        times = side_by_side(subject.model, made, subject.shape)
        said[form] = {
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
    return said
