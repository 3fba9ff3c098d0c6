"""Label-free recovery by gradients: the pruned network learns to give what its parent gives.

The squared error of the outputs and of the layers in between, relative to the variance of the
parent's values, is minimised on unlabelled images, norms in eval mode. Unlike the closed-form refit
it reaches what lies behind SiLU, hard-swish, norms and gates. Measured: docs/reconstruct.md.
"""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from seprune.errors import InputError
from seprune.pruning.plan import PruningPlan
from seprune.recovery.reconstruct.matching import Matching
from seprune.recovery.reconstruct.options import Reconstructed, ReconstructOptions
from seprune.recovery.reconstruct.state import load_state, save_state
from seprune.recovery.reconstruct.training import Training
from seprune.recovery.refit.targets import Target, TargetFinder
from seprune.runtime.distributed import resolve_device, same_as_first, united
from seprune.runtime.inference import device_of
from seprune.runtime.memory import memory_budget
from seprune.runtime.progress import Track, silent
from seprune.statistics import fingerprint
from seprune.statistics.calibration_inputs import take_inputs

_ANYWHERE = ("device", "memory", "folder", "task")  # options that do not change the result


def reconstruct(
    parent: nn.Module,
    pruned: nn.Module,
    plan: PruningPlan,
    loader: Iterable[Any],
    *,
    options: ReconstructOptions | None = None,
    track: Track = silent,
) -> Reconstructed:
    """Train a copy of `pruned` to give what `parent` gives, on images without labels.

    The weights are those of the epoch with the smallest error of the outputs on held-out images;
    the network given is a candidate. Every random number is a function of (seed, epoch, step).
    Under `torchrun` every process calls it and takes its share of each step.

    Args:
        pruned: what `prune(parent, plan)` returned, refitted or not.
        loader: batches of images, of (images, labels), or as the task splits them; targets are
            not used.

    Raises:
        InputError: too few images, outputs that cannot be compared, or an `options.folder` that
            belongs to another reconstruction.
        UsageError: not even one image fits into `memory`.
    """
    options = options or ReconstructOptions()
    device = resolve_device(options.device)
    memory = memory_budget(torch.device("cpu")) // 8
    images = take_inputs(loader, options.images, memory=memory, task=options.task)
    if len(images) < 2:
        raise InputError(
            "one image is too few to reconstruct from",
            why="an eighth of the images, at least one, is held out to judge by",
            fix="give a loader with more calibration images",
        )
    model, teacher = copy.deepcopy(pruned), copy.deepcopy(parent)
    modes, home = {m: m.training for m in model.modules()}, device_of(model)
    model.to(device).eval()
    teacher.to(device).eval().requires_grad_(False)
    task = images.task
    with task.comparable(teacher), task.comparable(model), united(), torch.enable_grad():
        targets, _ = TargetFinder(teacher, images.example(teacher)).find(plan)
        matching = Matching(teacher, model, _inner(targets), images.forward)
        training = Training(matching, images, options)
        _train(training, options.folder, _identity(parent, pruned, options, len(images)), track)
        model.load_state_dict(training.best)
        same_as_first(model)
    for module, mode in modes.items():
        module.training = mode
    for parameter in model.parameters():
        parameter.grad = None
    state = training.at
    names = [target.layer for target in training.matching.targets]
    layers = dict(zip(names, zip(state.before, state.after, strict=True), strict=True))
    return Reconstructed(
        model.to(home), tuple(state.errors), state.best, layers, len(training.judging)
    )


def _train(training: Training, folder: Path | None, identity: str, track: Track) -> None:
    """All epochs that are left."""
    training.start()
    saved = None
    if folder is not None:
        saved = load_state(
            folder,
            identity,
            layers=len(training.matching.targets),
            model=training.model,
            optimizer=training.optimizer,
        )
    if saved is None:
        training.first_error()
    else:
        training.at, training.best = saved
    left = range(training.at.epoch, training.options.epochs)
    for _ in track(
        left, label="reconstructing", total=len(left), unit="epochs", live=training.live
    ):
        training.epoch()
        if folder is not None:
            save_state(
                folder,
                identity,
                training.at,
                model=training.model,
                best=training.best,
                optimizer=training.optimizer,
            )


def _inner(targets: Sequence[Target]) -> list[Target]:
    """The layers in between: all but the last, which gives the outputs."""
    return list(targets[:-1])


def _identity(
    parent: nn.Module, pruned: nn.Module, options: ReconstructOptions, images: int
) -> str:
    """A digest of all that the result depends on."""
    numbers = {n: v for n, v in vars(options).items() if n not in _ANYWHERE}
    about = json.dumps([fingerprint(parent), fingerprint(pruned), numbers, images])
    return hashlib.sha256(about.encode()).hexdigest()
