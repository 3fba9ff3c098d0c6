"""What the leaderboard compares: networks, ways to choose channels, budgets, ways to recover."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from seprune.recipe import Recipe, load_recipe

NETWORKS = {
    "se_resnet20": "cifar10-seresnet20",
    "se_resnet56": "cifar10-seresnet56",
    "mobilenet_v3_small": "cifar10-mobilenetv3",
    "regnety": "cifar10-regnety",
}
_PLAIN = (
    "gate_logit", "gate_fisher", "gate_fisher_sampled", "gate_fisher_smoothed", "gate_taylor",
    "gate_mean", "gate_max", "gate_std", "gate_class", "gate_between", "gate_bn", "gate_energy",
    "l1", "l2", "bn_scale", "lamp", "fpgm", "taylor", "hessian", "random", "uniform",
)  # fmt: skip


def way(
    criterion: str,
    combine: str = "mean",
    allocation: str = "global",
    *,
    least: int = 8,
    steps: int = 1,
    normalize: str = "auto",
) -> tuple[str, ...]:
    """Overrides that pin all that chooses channels, whatever the defaults will be."""
    return (
        f"importance.criterion={criterion}",
        f"importance.combine={combine}",
        f"importance.normalize={normalize}",
        f"plan.allocation={allocation}",
        f"plan.min_channels={least}",
        f"plan.steps={steps}",
    )


METHODS: dict[str, tuple[str, ...]] = {
    **{name: way(name) for name in _PLAIN},
    **{f"{n} coupled": way(n, "coupled") for n in ("gate_logit", "gate_fisher", "gate_taylor")},
    "gate_logit joint": way("gate_logit", "joint"),
    "gate_logit cost_aware": way("gate_logit", "mean", "cost_aware"),
    **{
        f"gate_logit {combine} cost_aware{suffix}": way(
            "gate_logit", combine, "cost_aware", least=least
        )
        for combine in ("coupled", "joint")
        for least, suffix in ((8, ""), (4, ", least 4"), (2, ", least 2"))
    },
    "gate_mean_measured": way("gate_mean_measured", "coupled", "cost_aware", least=2),
    "l2, least 2": way("l2", least=2),
    "l2 cost_aware": way("l2", "mean", "cost_aware"),
    "hessian cost_aware, least 2": way("hessian", "mean", "cost_aware", least=2, normalize="none"),
    "l2 uniform": way("l2", "mean", "uniform"),
    "gate_logit uniform": way("gate_logit", "mean", "uniform"),
    "gate_logit isomorphic": way("gate_logit", "mean", "isomorphic"),
    "gate_logit 4 cuts": way("gate_logit", steps=4),
    "gate_logit joint cost_aware, least 2, 4 cuts": way(
        "gate_logit", "joint", "cost_aware", least=2, steps=4
    ),
    "l2 4 cuts": way("l2", steps=4),
}


@dataclass(frozen=True)
class Grid:
    """What is compared with what.

    `paths`: how a cut is recovered, how long it is tuned, and which of the methods go this way
    (first, behind the last). `dense`: epochs of training by network, if not those of its recipe.
    """

    name: str
    networks: tuple[str, ...]
    methods: tuple[str, ...]
    budgets: tuple[float, ...]
    paths: tuple[tuple[str, str, int, int | None], ...]
    epochs: Mapping[str, int]
    common: tuple[str, ...]
    seeds: tuple[int, ...] = (0, 1, 2)
    calibration: tuple[int, ...] = (2048,)
    train: int | None = None  # images that are looked at; None: all
    val: int | None = None
    skip: int = 0  # images of val/ that are left to the others: those choose, these report
    dense: Mapping[str, int] = field(default_factory=dict)


# `uniform` is the width-scaled dense sibling; the first three are trained from scratch, too
_FIRST = ("gate_logit joint cost_aware, least 2", "l2", "uniform", "gate_logit", "hessian")
_SCRATCH = ("finetune.lr=0.1", "finetune.warmup_epochs=5")
QUIET = (
    "report.latency=false",
    "report.html=false",
    "plan.round_to=1",
    "plan.candidates=false",
)
_SMALL = (
    *QUIET, "device=cpu", "data.workers=0", "data.validation=0", "finetune.recalibrate=0",
    "finetune.distill=null", "finetune.lr=0.02", "finetune.warmup_epochs=0.1",
)  # fmt: skip
_CPU = Grid(
    name="cpu",
    networks=("se_resnet20",),
    methods=(
        "gate_logit joint cost_aware, least 2", "gate_logit coupled cost_aware, least 2",
        "gate_logit", "l2",
        "hessian", "lamp", "taylor", "gate_fisher", "gate_mean", "l1", "bn_scale", "fpgm",
        "gate_logit coupled", "random", "gate_energy", "uniform",
    ),
    budgets=(0.5, 0.3),
    paths=(("bn", "short", 0, None), ("refit", "none", 0, 5)),
    epochs={"none": 0, "short": 1},
    common=_SMALL,
    calibration=(1000,),
    train=3000,
    val=3000,
)  # fmt: skip
_DENSE = {"mobilenet_v3_small": 15, "regnety": 10}
GRIDS = {
    "cpu": _CPU,
    "inner": replace(
        _CPU,
        name="inner",
        networks=("mobilenet_v3_small", "regnety"),
        methods=(
            "gate_logit joint cost_aware, least 2", "gate_logit coupled cost_aware, least 2",
            "gate_logit",
            "l2", "hessian", "lamp", "taylor", "gate_mean", "l1", "bn_scale", "fpgm", "random",
            "uniform",
        ),
        common=(*_SMALL, "finetune.channels_last=true"),
        dense=_DENSE,
    ),
    "budgets": replace(
        _CPU,
        name="budgets",
        methods=(
            "gate_logit joint cost_aware, least 2", "gate_logit coupled cost_aware, least 2",
            "gate_logit",
            "l2", "hessian", "lamp", "taylor", "l1", "bn_scale", "fpgm",
        ),
        budgets=(0.7, 0.15),
    ),
    "iterative": replace(
        _CPU,
        name="iterative",
        methods=(
            "gate_logit joint cost_aware, least 2", "gate_logit joint cost_aware, least 2, 4 cuts",
            "l2", "l2 4 cuts",
        ),
        paths=(("bn", "short", 0, None), ("refit", "none", 0, None)),
    ),
    "choice": replace(
        _CPU,
        name="choice",
        networks=("se_resnet20", "mobilenet_v3_small"),
        methods=(
            "gate_logit joint cost_aware, least 2", "gate_logit coupled cost_aware, least 2",
            "gate_logit joint cost_aware, least 4", "gate_logit joint cost_aware",
            "gate_logit joint",
            "gate_logit coupled", "gate_logit", "l2", "hessian",
        ),
        paths=(("bn", "short", 0, None),),
        seeds=(0,),
        val=2000,
        skip=3000,
        dense=_DENSE,
    ),
    "calibration": Grid(
        name="calibration",
        networks=("se_resnet20",),
        methods=("gate_logit", "gate_fisher", "gate_mean"),
        budgets=(0.5,),
        paths=(("none", "bn", 0, None),),
        epochs={"bn": 0},
        common=(*_SMALL, "finetune.recalibrate=1000"),
        calibration=(100, 300, 1000, 3000, 10000),
        train=30000,
        val=3000,
    ),
    "full": Grid(
        name="full",
        networks=tuple(NETWORKS),
        methods=_FIRST + tuple(m for m in METHODS if m not in _FIRST),
        budgets=(0.7, 0.5, 0.3, 0.15),
        paths=(
            ("bn", "short", 0, None),
            ("refit", "short", 0, None),
            ("refit", "full", 0, None),
            ("scratch", "total", 0, 3),
        ),
        epochs={"short": 3, "full": 40, "total": 140},
        common=(
            *QUIET, "report.last_epoch=true", "data.cache=device", "finetune.recalibrate=0",
            "finetune.lr=0.02",
        ),
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Cell:
    """One run: a network, a way to choose channels, a way to recover; all budgets of the grid."""

    grid: Grid
    network: str
    method: str
    seed: int
    recover: str
    tuning: str
    images: int

    @property
    def name(self) -> str:
        """The folder of its run."""
        budgets = " ".join(map(str, self.grid.budgets))
        words = f"{self.network} {self.method} {self.recover} {self.tuning} {budgets}"
        return f"{words} images {self.images} seed {self.seed}".replace(", ", "-").replace(" ", "-")

    def recipe(self, data: Path, checkpoint: Path | None) -> Recipe:
        """The recipe that this cell is."""
        budgets = ", ".join(map(str, self.grid.budgets))
        given = (
            f"name='{self.network}: {self.method}, {self.recover}, {self.tuning}'",
            f"data.source={data}",
            f"model.checkpoint={checkpoint or 'null'}",
            f"seed={self.seed}",
            f"plan.macs=[{budgets}]",
            f"collect.images={self.images}",
            f"prune.recover={self.recover}",
            *self.grid.common,
            f"finetune.epochs={self.grid.epochs[self.tuning]}",
            *(_SCRATCH if self.recover == "scratch" else ()),
            *METHODS[self.method],
        )
        return load_recipe(NETWORKS[self.network], given)

    def column(self, stage: str) -> str | None:
        """What the leaderboard calls a measurement of this run; None for what it leaves out."""
        tuned = f"{self.recover} {self.tuning}" if self.tuning != "bn" else "bn"
        return {
            "pruned": "cut",
            "recalibrated": "bn",
            "refitted": "refit",
            "fine-tuned": tuned,
            "last epoch": f"{tuned} last",
        }.get(stage)


def cells(grid: Grid) -> Iterator[Cell]:
    """Every run of a grid; the first ways to recover and the first criteria come first."""
    for network, (recover, tuning, *some) in itertools.product(grid.networks, grid.paths):
        for method, seed in itertools.product(grid.methods[slice(*some)], grid.seeds):
            for images in grid.calibration:
                yield Cell(grid, network, method, seed, recover, tuning, images)
