"""How statistics are collected."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch

from seprune.statistics.gate_gradients import Couplings
from seprune.tasks import Task


@dataclass(frozen=True)
class CollectOptions:
    """How to collect.

    Attributes:
        device: `auto`, `cpu`, `cuda`, ...; the model goes there and comes back.
        precision: `no`, `bf16`, `fp16` autocast; None is bf16 on GPU, no on CPU.
        channels_last: memory format of the images; None is True on GPU, False on CPU.
        units: modules whose output channels get a unit gate (needs gradients).
        couplings: dependency groups whose members' u are added before squaring: group ->
            (gate or unit, index); index[i] is the group's unit that channel i belongs to, -1 for
            none, None where channel i is unit i.
        per_class: keep class means (classes x channels numbers per gate).
        seed: of `sampled` labels and `logits` directions.
        per_sample: .npy file for the gates of every image, float32 (images, channels of all
            running gates in order); process r of n writes `NAME-RofN.npy`.
        folder: where an unfinished collection keeps its state, so that the same call goes on.
        every: batches between two states in `folder`.
        memory: bytes that a pass over some images may take; larger batches are taken in parts.
            `auto` is a share of what the machine, the cgroup or the GPU has free.
        meta: hashes of `data` and `preprocessing`, kept with the statistics.
        task: by default what the batches look like.
    """

    device: str | torch.device = "auto"
    precision: str | None = None
    channels_last: bool | None = None
    units: Sequence[str] = ()
    couplings: Couplings = field(default_factory=dict)
    per_class: bool = True
    seed: int = 0
    per_sample: Path | None = None
    folder: Path | None = None
    every: int = 200
    memory: int | Literal["auto"] = "auto"
    meta: Mapping[str, str] = field(default_factory=dict)
    task: Task | None = None
