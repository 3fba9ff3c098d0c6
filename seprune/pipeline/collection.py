"""The statistics of a run, with the options that its recipe amounts to; of probes if it says so."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from torch import Tensor, nn

from seprune.data import in_turn
from seprune.errors import InputError
from seprune.importance import criterion
from seprune.importance.probes import PROBE, probed, train_probes
from seprune.pipeline.context import Bench
from seprune.pipeline.inputs import data_digests
from seprune.runtime.distributed import first
from seprune.statistics import CollectOptions, GateStatistics, collect_statistics, fingerprint

NO_GATES = "no channel gates in this network: unit gates stand in for them everywhere"


def collect(
    bench: Bench, folder: Path | None = None, *, per_sample: Path | None = None
) -> GateStatistics:
    """Statistics for the recipe's criterion over the calibration set.

    Args:
        folder: where an interrupted collection keeps its state.
        per_sample: .npy file for the gates of every image; such a collection starts anew.

    Raises:
        InputError: the criterion looks at gates and there are none.
    """
    recipe, section, data = bench.recipe, bench.recipe.collect, bench.images()
    rule = criterion(recipe.importance.criterion)
    gateless = not bench.scored.gates and rule.family != "moments"
    if gateless and (rule.family == "gate" or recipe.importance.ungated != "unit"):
        raise InputError(
            f"{bench.subject.architecture.name}: no channel gates",
            why=f"criterion '{recipe.importance.criterion}' scores channels by their gates",
            fix="importance.criterion=gate_logit works without gates; importance.probe.epochs=1 "
            "trains gates to look at",
            code="no-gates",
        )
    plain = CollectOptions(
        device=recipe.device,
        seed=recipe.seed,
        folder=None if per_sample else folder,
        per_sample=per_sample,
        meta=data_digests(data),
    )
    found = collect_statistics(
        _probed(bench),
        data.calibration(section.images, batch_size=section.batch_size, seed=recipe.seed),
        structure=bench.scored,
        gradients=bench.gradients,
        options=plain,
        track=bench.track,
    )
    own = {"model": fingerprint(bench.subject.model)}  # probes are no part of it
    said = (NO_GATES,) if gateless else ()
    return replace(found, meta={**found.meta, **own}, warnings=(*found.warnings, *said))


def _probed(bench: Bench) -> nn.Module:
    """A copy of the network with trained probes, or the network where none are wanted."""
    said, probes = bench.recipe.importance.probe, bench.probes
    if said is None or probes is None:
        return bench.subject.model
    model = probed(bench.subject.model, bench.structure, probes)
    loader = bench.images().training(seed=bench.recipe.seed)
    if said.images is not None:
        rows = in_turn(loader.store.labels, loader.rows, seed=bench.recipe.seed)
        loader.rows = rows[: said.images]

    def train() -> dict[str, Tensor]:
        train_probes(model, loader, probes, track=bench.track)
        return {n: t for n, t in model.state_dict().items() if f".{PROBE}." in f".{n}"}

    model.load_state_dict(first(train), strict=False)
    return model
