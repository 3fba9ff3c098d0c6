"""`collect_statistics`: the calibration set through the model, once."""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from seprune.errors import InputError
from seprune.graph.gates import Gate, gates_in
from seprune.graph.groups import NetworkStructure
from seprune.graph.trace import Trace, record
from seprune.runtime.distributed import join, resolve_device, united
from seprune.runtime.inference import evaluating
from seprune.runtime.progress import Track, silent
from seprune.statistics.accumulate import all_reduce
from seprune.statistics.batch_limit import most_images
from seprune.statistics.batches import class_labels, count_images, open_batches
from seprune.statistics.caveats import caveats
from seprune.statistics.columns import ColumnLayout
from seprune.statistics.for_structure import units_and_couplings
from seprune.statistics.gate_gradients import (
    Gradients,
    UnitGate,
    inspect_units,
    resolve_couplings,
)
from seprune.statistics.observe import Observer, ObserverSettings
from seprune.statistics.options import CollectOptions
from seprune.statistics.result import GateStatistics, described, fingerprint
from seprune.statistics.rows import open_rows
from seprune.statistics.states import require_autograd, require_eager
from seprune.statistics.unfinished import Unfinished
from seprune.tasks import Classification, Sample, Task
from seprune.tasks.batches import leaves, positional, primary

_CHECK = 50  # batches between two looks at the device


def collect_statistics(
    model: nn.Module,
    loader: Iterable[Any],
    *,
    structure: NetworkStructure | None = None,
    gradients: Gradients | None = None,
    options: CollectOptions | None = None,
    track: Track = silent,
) -> GateStatistics:
    """Statistics of every gate over all images of `loader`; the model is left as found.

    Under `torchrun` every process calls it and gets the statistics of all images; a `Loader` or a
    `DataLoader` is shared among the processes, anything else gives each process its own part.

    Args:
        loader: batches of images (B, C, H, W), of (images, labels), or as the task splits them.
        structure: what `analyse` found; the statistics then hold a derivative for every
            dependency group, gated or not. Without it, gates alone, found on the first batch.
        gradients: by default `logits` with a structure, `none` without. The z of u = gate *
            dz/dgate: cross-entropy of the true `labels`, of `smoothed` labels, of labels
            `sampled` from the model, or a random projection of the `logits`; `weights`: no u, but
            moments of the derivatives by the weights. Where targets are no classes, `labels` and
            `weights` take the loss of the task, and `logits` all tensors that the model returns.

    Raises:
        InputError: no gates, no images, NaN in a gate, labels that do not fit, a model that takes
            more than images, or an unfinished collection of something else in `folder`.
        EnvironmentFault: no such device, a single image does not fit into memory, a full disk.
    """
    gradients = gradients or ("none" if structure is None else "logits")
    options, taps = _complete(options or CollectOptions(), structure, gradients)
    require_eager(model)
    if gradients != "none":
        require_autograd(model)
    device = resolve_device(options.device)
    rank, world = join(device)
    meta = {"model": fingerprint(model)} | dict(options.meta)
    with united(), evaluating(model, device), _frozen(model):
        labelled = gradients in ("labels", "smoothed", "weights")
        task, first, batches = open_batches(
            loader, device, rank, world, task=options.task, labelled=labelled
        )
        two = task.split(task.part(first, slice(0, 2)))
        _require_arguments(model, two)
        example = positional(model, two.args, two.kwargs)
        trace = record(model, example)
        found = tuple(structure.gates) if structure else gates_in(trace, model)
        shown = _Example(task, first, example, trace)
        settings = _observer_settings(model, found, options, _Derivatives(gradients, taps), shown)
        unfinished = _unfinished(settings, options, meta, rank, world)
        with open_rows(options.per_sample, settings.layout.width) as rows:
            observer = Observer(settings, rows)
            unfinished.restore(observer)
            work = _work(observer, batches, unfinished)
            with observer.attached():
                for _ in track(work, label="collecting", total=count_images(loader) // world):
                    pass
            observer.check()
            if rows is not None and options.per_sample is not None:
                rows.write(_of_process(options.per_sample, rank, world))
        statistics = _finish(observer, found, meta, loader)
    unfinished.done()
    return statistics


def _complete(
    options: CollectOptions, structure: NetworkStructure | None, gradients: Gradients
) -> tuple[CollectOptions, Mapping[str, UnitGate]]:
    """The options with the couplings of every group of `structure`, and its unit gates."""
    if structure is None or gradients in ("none", "weights"):
        return options, {}
    units, couplings = units_and_couplings(structure)
    taps = {name: unit for name, unit in units.items() if name not in options.units}
    return replace(options, couplings={**couplings, **options.couplings}), taps


def _finish(
    observer: Observer, found: tuple[Gate, ...], meta: dict[str, str], loader: Any
) -> GateStatistics:
    samples = observer.samples
    if dist.is_initialized():
        observer.gates, observer.u = all_reduce(observer.gates), all_reduce(observer.u)
        observer.w = all_reduce(observer.w)
        count = torch.tensor(samples, device=observer.settings.layout.device)
        dist.all_reduce(count)
        samples = int(count)
    kinds = observer.tables()
    warnings = caveats(found, kinds["values"], samples, getattr(loader, "batch_size", None))
    return GateStatistics(
        gates=tuple(map(described, found)),
        values=kinds["values"],
        samples=samples,
        classes=observer.settings.layout.classes,
        gradients=observer.settings.gradients,
        units=kinds["units"],
        groups=kinds["groups"],
        weights=kinds["weights"],
        warnings=(*warnings, *observer.remarks()),
        meta=meta,
    )


def _work(observer: Observer, batches: Iterator[Any], unfinished: Unfinished) -> Iterator[None]:
    """Observe every batch that is left; yields once per image, for whoever shows progress."""
    skip, task = observer.samples, observer.settings.task
    for batch in batches:
        size = task.size(batch)
        if skip >= size:
            skip -= size
            continue
        observer.observe(task.part(batch, slice(skip, None)) if skip else batch)
        if observer.batches % _CHECK == 0 and not dist.is_initialized():
            observer.check()
        unfinished.maybe_save(observer)
        yield from itertools.repeat(None, size - skip)
        skip = 0


@dataclass(frozen=True)
class _Derivatives:
    """Which derivatives are taken, and the unit gates of a structure."""

    gradients: Gradients
    units: Mapping[str, UnitGate]


@dataclass(frozen=True)
class _Example:
    """The task, the first batch, the model's arguments for two samples of it, and their pass."""

    task: Task
    batch: Any
    inputs: Any
    trace: Trace


def _observer_settings(
    model: nn.Module,
    found: tuple[Gate, ...],
    options: CollectOptions,
    derivatives: _Derivatives,
    example: _Example,
) -> ObserverSettings:
    task, labels = example.task, class_labels(example.task, example.batch)
    device = next(leaves(example.batch)).device
    gradients, taps = derivatives.gradients, derivatives.units
    running = tuple(gate for gate in found if gate.runs)
    if not running and not options.units and not taps and gradients != "weights":
        raise InputError(
            f"no gates: {len(found)} gate modules, none of which runs" if found else "no gates",
            why="no squeezed tensor multiplies the channels of a feature map in this model",
            fix="see: seprune inspect MODEL; or choose an importance that needs no gates, such as "
            "importance.criterion=l2",
        )
    _require_gradients(gradients, options, example)
    sizes, copied = inspect_units(model, options.units, example.inputs, taps=taps)
    sizes_of_all = sizes | {gate.name: gate.channels for gate in running}
    gpu = device.type == "cuda"
    return ObserverSettings(
        model=model,
        gates=running,
        layout=ColumnLayout(
            names=tuple(gate.name for gate in running),
            channels=tuple(gate.channels for gate in running),
            activations=tuple(gate.activation for gate in running),
            classes=_classes(model, example) if labels is not None and options.per_class else 0,
            device=device,
        ),
        gradients=gradients,
        units=sizes,
        taps=taps,
        copied=copied,
        couplings=resolve_couplings(options.couplings, sizes_of_all, device),
        precision=options.precision or ("bf16" if gpu else "no"),
        channels_last=gpu if options.channels_last is None else options.channels_last,
        seed=options.seed,
        task=task,
        most=most_images(
            example.trace, device, memory=options.memory, derivatives=gradients != "none"
        ),
    )


def _unfinished(
    how: ObserverSettings, options: CollectOptions, meta: Mapping[str, str], rank: int, world: int
) -> Unfinished:
    if options.folder is None:
        return Unfinished(None, options.every, {})
    if options.per_sample is not None:
        raise InputError(
            "gates of every image cannot be taken up again",
            why="per_sample and folder are both set, and an interruption loses the rows",
            fix="leave out one of them",
        )
    facts = dict(meta) | {
        "gates": ", ".join(how.layout.names),
        "gradients": how.gradients,
        "units and couplings": ", ".join(name for kind, name in how.widths if kind != "values"),
        "precision": how.precision,
        "classes": str(how.layout.classes),
        "seed": str(how.seed),
    }
    name = f"collecting-{rank}of{world}.safetensors"
    return Unfinished(options.folder / name, options.every, facts)


def _require_gradients(gradients: str, options: CollectOptions, example: _Example) -> None:
    if gradients in ("none", "weights") and (options.units or options.couplings):
        raise InputError(
            "units and couplings need derivatives",
            why=f"gradients is {gradients}, and a unit gate is always 1",
            fix="set gradients to logits, sampled, smoothed or labels",
        )
    task = example.task
    classifies = isinstance(task, Classification)
    if gradients in ("smoothed", "sampled") and not classifies:
        raise InputError(
            f"gradients {gradients!r} need classes",
            why=f"the task is {task.name}",
            fix="use gradients logits, which need no targets, or labels",
        )
    target = task.split(example.batch).target
    labels = class_labels(task, example.batch) if classifies else target
    if gradients in ("labels", "smoothed", "weights") and labels is None:
        raise InputError(
            f"gradients {gradients!r} need labels",
            why="the batches hold images alone, or labels that are no class numbers",
            fix="use gradients logits or sampled, which need none",
        )


def _classes(model: nn.Module, example: _Example) -> int:
    """How many classes the model tells apart; 0 where its output is no table of logits."""
    with torch.no_grad():
        output = primary(example.task.forward(model, example.task.part(example.batch, slice(0, 2))))
    return output.shape[1] if output.dim() == 2 else 0


@contextmanager
def _frozen(model: nn.Module) -> Iterator[None]:
    """No parameter asks for a derivative while the context is open."""
    wanted = {p: p.requires_grad for p in model.parameters()}
    try:
        for parameter in wanted:
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter, want in wanted.items():
            parameter.requires_grad_(want)


def _require_arguments(model: nn.Module, sample: Sample) -> None:
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    needed = [
        p.name
        for p in inspect.signature(model.forward).parameters.values()
        if p.default is inspect.Parameter.empty
        and (p.kind in kinds or p.kind is inspect.Parameter.KEYWORD_ONLY)
    ]
    if len(needed) > len(sample.args) + len(sample.kwargs):
        raise InputError(
            f"{type(model).__name__}.forward takes more than an image: {', '.join(needed)}",
            why="a batch holds fewer inputs",
            fix="give batches ((input, ...), target) or dicts, or wrap the model in a module whose "
            "forward takes the image and fills in the rest",
        )


def _of_process(path: Path, rank: int, world: int) -> Path:
    return path if world == 1 else path.with_stem(f"{path.stem}-{rank}of{world}")
