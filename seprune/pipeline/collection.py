"""The statistics of a run, with the options that its recipe amounts to; of probes if it says so."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from torch import Tensor, nn

from seprune.data import in_turn
from seprune.errors import InputError
from seprune.graph.groups import NetworkStructure, find_structure
from seprune.importance import criterion
from seprune.importance.probes import PROBE, probed, train_probes
from seprune.pipeline.context import Context
from seprune.pipeline.inputs import data_digests
from seprune.pipeline.settings import CutSettings
from seprune.runtime.distributed import first
from seprune.statistics import CollectOptions, GateStatistics, collect_statistics, fingerprint

NO_GATES = "no channel gates in this network: unit gates stand in for them everywhere"


def collect(
    context: Context,
    settings: CutSettings,
    folder: Path | None = None,
    *,
    per_sample: Path | None = None,
) -> GateStatistics:
    """Statistics for the recipe's criterion over the calibration set.

    Args:
        folder: where an interrupted collection keeps its state.
        per_sample: .npy file for the gates of every image; such a collection starts anew.

    Raises:
        InputError: the criterion looks at gates and there are none.
    """
    section, importance = settings.collect, settings.importance
    network, runtime, data = (
        context.network,
        context.runtime,
        context.images(settings.needs_images_for),
    )
    rule, scored = criterion(importance.criterion), scored_structure(context, settings)
    gateless = not scored.gates and rule.family != "moments"
    if gateless and (rule.family == "gate" or importance.ungated != "unit"):
        raise InputError(
            f"{network.architecture.name}: no channel gates",
            why=f"criterion '{importance.criterion}' scores channels by their gates",
            fix="importance.criterion=gate_logit works without gates; importance.probe.epochs=1 "
            "trains gates to look at",
            code="no-gates",
        )
    plain = CollectOptions(
        device=runtime.device,
        seed=settings.seed,
        folder=None if per_sample else folder,
        per_sample=per_sample,
        memory=runtime.memory,
        meta=data_digests(data),
    )
    found = collect_statistics(
        _with_probes(context, settings),
        data.calibration(section.images, batch_size=section.batch_size, seed=settings.seed),
        structure=scored,
        gradients=settings.gradients,
        options=plain,
        track=runtime.track,
    )
    if folder is not None:
        with suppress(OSError):  # never made, gone with another process, or something else in it
            folder.rmdir()
    own = {"model": fingerprint(network.model)}  # probes are no part of it
    notes = (NO_GATES,) if gateless else ()
    return replace(found, meta={**found.meta, **own}, warnings=(*found.warnings, *notes))


def scored_structure(context: Context, settings: CutSettings) -> NetworkStructure:
    """The structure that statistics are of: with probes, where the recipe wants them."""
    probes = settings.probes(context.runtime)
    if probes is None:
        return context.structure
    network = context.network
    return find_structure(probed(network.model, context.structure, probes), network.example())


def _with_probes(context: Context, settings: CutSettings) -> nn.Module:
    """A copy of the network with trained probes, or the network where none are wanted."""
    section, probes = settings.importance.probe, settings.probes(context.runtime)
    if section is None or probes is None:
        return context.network.model
    model = probed(context.network.model, context.structure, probes)
    loader = context.images().training(seed=settings.seed)
    if section.images is not None:
        rows = in_turn(loader.store.labels, loader.rows, seed=settings.seed)
        loader.rows = rows[: section.images]

    def train() -> dict[str, Tensor]:
        train_probes(model, loader, probes, track=context.runtime.track)
        return {n: t for n, t in model.state_dict().items() if f".{PROBE}." in f".{n}"}

    model.load_state_dict(first(train), strict=False)
    return model
