"""The closed forms of training: loss, learning rate, weight-decay groups, mixed images."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.transforms import v2

Schedule = Callable[[float], float]


def _onecycle(part: float) -> float:
    """Up from 1/25 in the first 30 %, down to 1/250,000: torch's OneCycleLR (arXiv:1708.07120)."""
    if part < 0.3:
        return _between(1 / 25, 1.0, part / 0.3)
    return _between(1.0, 1 / 25e4, (part - 0.3) / 0.7)


def _between(start: float, end: float, part: float) -> float:
    return end + (start - end) * (1 + math.cos(math.pi * part)) / 2


# name -> factor on the learning rate at a part of the steps in [0, 1)
SCHEDULES: dict[str, Schedule] = {
    "cosine": lambda part: (1 + math.cos(math.pi * part)) / 2,
    "step": lambda part: 1.0 if part < 0.5 else 0.1 if part < 0.75 else 0.01,
    "onecycle": _onecycle,
    "constant": lambda part: 1.0,
}


def rate(step: int, *, steps: int, warmup: int, schedule: str) -> float:
    """The factor on the learning rate in `step` of `steps`: a linear warm-up first."""
    if step < warmup:
        return (step + 1) / warmup
    return SCHEDULES[schedule]((step - warmup) / max(steps - warmup, 1))


def loss_of(
    logits: Tensor,
    labels: Tensor,
    *,
    smoothing: float = 0.0,
    teacher: Tensor | None = None,
    alpha: float = 0.5,
    temperature: float = 4.0,
) -> Tensor:
    """Mean cross-entropy; with teacher logits, (1 - alpha) of it plus alpha of the distillation.

    Distillation is T^2 KL(softmax(teacher / T) || softmax(logits / T)) (arXiv:1503.02531).
    `labels`: class numbers (B,) or probabilities (B, C).
    """
    logits = logits.float()
    loss = F.cross_entropy(logits, labels, label_smoothing=smoothing)
    if teacher is None:
        return loss
    soft = F.kl_div(
        F.log_softmax(logits / temperature, 1),
        F.log_softmax(teacher.float() / temperature, 1),
        reduction="batchmean",
        log_target=True,
    )
    return (1 - alpha) * loss + alpha * temperature**2 * soft


def decay_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Trainable parameters in two groups: weights decay, vectors (norms and biases) do not."""
    trainable = [p for p in model.parameters() if p.requires_grad]
    return [
        {"params": [p for p in trainable if p.ndim > 1], "weight_decay": weight_decay},
        {"params": [p for p in trainable if p.ndim <= 1], "weight_decay": 0.0},
    ]


def mix(
    images: Tensor, labels: Tensor, *, classes: int, mixup: float, cutmix: float
) -> tuple[Tensor, Tensor]:
    """One of mixup and CutMix with these Beta parameters, 0 = never; labels become (B, C)."""
    kinds = [v2.MixUp(alpha=mixup, num_classes=classes)] if mixup else []
    kinds += [v2.CutMix(alpha=cutmix, num_classes=classes)] if cutmix else []
    if not kinds:
        return images, labels
    chosen = kinds[int(torch.randint(len(kinds), ()))]
    mixed: tuple[Tensor, Tensor] = chosen(images, labels)
    return mixed
