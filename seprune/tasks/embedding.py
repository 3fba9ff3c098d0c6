"""Vectors that are near each other where images belong together; no classifier is needed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from seprune.errors import InputError
from seprune.runtime.distributed import gather_rows
from seprune.tasks.batches import primary
from seprune.tasks.protocol import BaseTask, Meter, require_same_shape
from seprune.tasks.torchmetrics import torch_metric

_CHUNK = 1024  # queries compared with everything at once


@dataclass(frozen=True)
class Embedding(BaseTask):
    """Outputs (B, D), targets the number of the thing or person in each image (B,).

    Attributes:
        inputs: leading elements of a tuple batch that are arguments of the model.
        temperature: of the supervised contrastive loss.
    """

    inputs: int = 1
    temperature: float = 0.1
    name: ClassVar[str] = "embedding"
    metric: ClassVar[str] = "recall@1"

    def losses(self, outputs: Any, target: Any) -> Tensor:
        """Supervised contrastive loss (arXiv:2004.11362), 0 for an image without a partner.

        Its partners are the other images of the batch with the same number.
        """
        vectors, labels = _pair(outputs, target)
        own = F.normalize(vectors, dim=1)
        alone = torch.eye(len(own), dtype=torch.bool, device=own.device)
        similar = (own @ own.t() / self.temperature).masked_fill(alone, -1e9)
        share = similar.log_softmax(1)
        partners = (labels[:, None] == labels[None]) & ~alone
        return -(share * partners).sum(1) / partners.sum(1).clamp(min=1)

    def distillation(self, outputs: Any, teacher: Any, *, temperature: float) -> Tensor:
        """One minus the cosine with the teacher's vector, mean over the batch."""
        own, taught = primary(outputs).float(), primary(teacher).float()
        require_same_shape(own, taught)
        return (1 - F.cosine_similarity(own.flatten(1), taught.flatten(1))).mean()

    def meter(self) -> Meter:
        """Recall at 1: of how many images the nearest other one has the same number."""
        return _Recall()


class _Recall:
    def __init__(self) -> None:
        self.vectors: list[Tensor] = []
        self.labels: list[Tensor] = []

    def update(self, outputs: Any, target: Any) -> None:
        vectors, labels = _pair(outputs, target)
        self.vectors.append(F.normalize(vectors, dim=1))
        self.labels.append(labels)

    def compute(self) -> dict[str, float]:
        vectors, labels = gather_rows(torch.cat(self.vectors)), gather_rows(torch.cat(self.labels))
        metric = torch_metric(
            "retrieval.RetrievalHitRate", top_k=1, empty_target_action="neg", sync_on_compute=False
        )
        for start in range(0, len(vectors), _CHUNK):
            rows = torch.arange(start, min(start + _CHUNK, len(vectors)), device=vectors.device)
            similar = vectors[rows] @ vectors.t()
            similar[torch.arange(len(rows)), rows] = -torch.inf
            nearest, which = similar.max(1)
            metric.update(nearest.cpu(), (labels[which] == labels[rows]).cpu(), indexes=rows.cpu())
        return {"recall@1": float(metric.compute())}


def _pair(outputs: Any, target: Any) -> tuple[Tensor, Tensor]:
    vectors = primary(outputs).float().flatten(1)
    if (
        not isinstance(target, Tensor)
        or target.is_floating_point()
        or target.shape != vectors.shape[:1]
    ):
        shape = tuple(target.shape) if isinstance(target, Tensor) else type(target).__name__
        raise InputError(
            f"targets {shape} name nothing for embeddings {tuple(vectors.shape)}",
            why="embedding takes one whole number an image; equal numbers belong together",
            fix="give integers (B,), or name the task that fits, such as --task regression",
        )
    return vectors, target.long()
