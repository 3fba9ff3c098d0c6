"""`seprune collect`: what every gate does over the calibration set."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from seprune.cli import console, options


def collect(
    network: options.NetworkOptions,
    data: options.DataSource,
    out: Annotated[Path, typer.Option("--out", metavar="FILE", help="statistics.safetensors")],
    images: Annotated[int, typer.Option(help="Of the training images.")] = 2048,
    gradients: Annotated[
        str,
        typer.Option(
            help="none, labels, smoothed, sampled, logits, weights; auto: what --importance needs."
        ),
    ] = "auto",
    importance: options.Criterion = "gate_logit",
    probe: options.Probe = None,
    per_sample: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Also the gates of every image, as .npy.")
    ] = None,
    *,
    work: options.WorkOptions,
) -> None:
    """Run the calibration set once; keep what every gate does.

    Example:
      seprune collect seprune/se_resnet20 --checkpoint F.pth --data D \\
        --out stats.safetensors
    """
    recipe = options.recipe(
        network, work, data,
        collect={"images": images, "gradients": gradients},
        importance={"criterion": importance, "probe": probe and {"epochs": probe}},
    )  # fmt: skip
    from seprune.cli import open_inputs
    from seprune.pipeline.collection import collect
    from seprune.pipeline.settings import CutSettings
    from seprune.runtime.distributed import first

    settings = CutSettings.of(recipe)
    permission = open_inputs.permission(network)
    context = open_inputs.context(
        recipe, loader=permission, labelled=settings.needs_labels, glance=[]
    )
    folder = out.with_name(f".{out.name}.collecting")
    statistics = collect(context, settings, folder, per_sample=per_sample)
    first(lambda: statistics.save(out))
    for warning in statistics.warnings:
        console.tell(f"note: {warning}")
    console.tell(f"{len(statistics.values)} gates over {statistics.samples:,} images: {out}")
    if work.json:
        console.give({"gates": len(statistics.values), "images": statistics.samples,
                      "gradients": statistics.gradients, "warnings": list(statistics.warnings),
                      "file": str(out)})  # fmt: skip
