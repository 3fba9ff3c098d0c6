"""Gates and blocks that a latency budget may take out, with what each would lose."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from seprune.graph.removable import Removable, find_removable
from seprune.pipeline.context import Context
from seprune.pipeline.settings import CutSettings
from seprune.pruning.removals import FrozenGate, Part
from seprune.recipe.budget import Budget
from seprune.statistics.removal_losses import RemovalLosses, removal_losses

IMAGES = 512  # of the calibration set


def removable_parts(context: Context, settings: CutSettings, budget: Budget) -> tuple[Part, ...]:
    """The parts that this budget may take out: none without a budget in time.

    Their losses add up with scores that are made of derivatives of the outputs; where the criterion
    has others, parts stay.
    """
    wanted = {"gate": settings.plan.gates, "block": settings.plan.blocks}
    if budget.latency is None or settings.gradients != "logits" or not any(wanted.values()):
        return ()
    network = context.network
    found = find_removable(network.model, context.structure, network.example())
    found = tuple(part for part in found if wanted[part.kind])
    images = min(IMAGES, settings.collect.images)
    loader = context.images(settings.needs_images_for).calibration(images, seed=settings.seed)
    return with_losses(found, context, loader)


def with_losses(
    found: Sequence[Removable], context: Context, loader: Iterable[Any]
) -> tuple[Part, ...]:
    """What taking each of these out would lose, over the images of `loader`."""
    names = {part.module for part in found if part.kind == "gate"}
    losses = removal_losses(
        context.network.model,
        loader,
        gates=[g for g in context.structure.gates if g.name in names],
        blocks=[part.module for part in found if part.kind == "block"],
        device=context.runtime.device,
    )
    return tuple(_part(part, losses) for part in found)


def _part(part: Removable, losses: RemovalLosses) -> Part:
    name = f"{part.kind} {part.module}"
    if part.kind == "block":
        return Part(name, part.module, losses.blocks[part.module])
    mean = tuple(losses.means[part.module].tolist())
    held = FrozenGate(part.module, part.layer, part.side, mean)
    return Part(name, part.module, losses.gates[part.module], held)
