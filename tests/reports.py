"""A made-up report with the shape and the habits of a real run."""

import numpy as np

from seprune.measure.latency import Latency
from seprune.report import (
    BudgetReport,
    GateSummary,
    GroupCut,
    Measurement,
    Report,
    TrainedEpoch,
    TrainingCurve,
)

CIFAR = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
SE_RESNET_20 = ((16, 3), (32, 3), (64, 3))
SE_RESNET_50 = ((256, 3), (512, 4), (1024, 6), (2048, 3))
SENET_154 = ((256, 3), (512, 8), (1024, 36), (2048, 3))


def make_report(
    stages=SE_RESNET_20, *, budgets=(0.7, 0.5, 0.3), criterion="gate_logit", seed=0
) -> Report:
    """Gates as in the SE paper: early ones shared by classes, the last stage saturated."""
    chance = np.random.default_rng(seed)
    gates = [
        make_gate(chance, f"layer{s + 1}.{b}.se", width, depth=(s + b / blocks) / len(stages))
        for s, (width, blocks) in enumerate(stages)
        for b in range(blocks)
    ]
    return Report(
        name=f"se_resnet-{criterion}-s{seed}",
        created="2026-07-01T12:34:56+00:00",
        command="seprune run recipes/cifar10-seresnet20.yaml --out 'runs/my run'",
        seed=seed,
        model={
            "name": "seprune/se_resnet20",
            "input": [3, 32, 32],
            "classes": 10,
            "checkpoint": "se_resnet20_cifar10.pth",
            "sha256": "ab" * 32,
        },
        data={
            "source": "cifar10",
            "counts": {"train": 45000, "validation": 5000, "report": 10000},
            "classes": CIFAR,
            "skipped": {"train": ["train/cat/0001.png"], "report": []},
        },
        environment={
            "python": "3.11.2",
            "torch": "2.15.0",
            "device": "AMD EPYC 9V74",
            "threads": 2,
        },
        hashes={"recipe.yaml": "01" * 32, "statistics.safetensors": "23" * 32},
        recipe="model:\n  name: seprune/se_resnet20\nplan:\n  macs: [0.7, 0.5, 0.3]\nseed: 0\n",
        measurements=make_measurements(chance, budgets, worse=0.01 * (criterion != "gate_logit")),
        budgets=[make_budget(chance, stages, gates, target, criterion) for target in budgets],
        gates=gates,
        warnings=[
            "fine-tuned: 1.10x faster at batch 1 on AMD EPYC 9V74 (eager), where the MACs "
            "promise 2.00x; the time goes to layer1.0.bn1 12%, (between layers) 10%"
        ],
        not_pruned=[{"group": "fc", "reason": "classifier output"}],
        seconds={"collect": 6.1, "rank": 0.4, "prune": 2.2, "finetune": 183.0, "report": 1.0},
        training=[
            make_training("baseline", None, 30),
            *(make_training("fine-tuned", f"macs {target:g}", 10) for target in budgets),
        ],
        not_counted=["aten.mul", "aten.relu_", "aten.sigmoid"],
    )


def make_training(stage: str, budget: str | None, epochs: int) -> TrainingCurve:
    """Losses that fall by a quarter an epoch, and a top-1 that rises as they fall."""
    losses = [2.3 * 0.75**n for n in range(epochs)]
    rows = [
        TrainedEpoch(n, loss, 1.1 * loss + 0.1, 0.95 - 0.3 * loss, 0.05 * (1 - n / epochs))
        for n, loss in enumerate(losses, 1)
    ]
    return TrainingCurve(stage, budget, "top1", rows)


def make_gate(chance, name: str, width: int, *, depth: float) -> GateSummary:
    centre = 0.25 + 0.7 * depth**3
    mean = np.clip(chance.normal(centre, 0.12 * (1.2 - depth), width), 0.01, 0.995)
    share = 0.01 + 0.09 * np.sin(np.pi * min(1.0, 1.3 * depth))
    classes = np.clip(mean + chance.normal(0, share, (10, width)), 0, 1)
    within = 0.03 * chance.random(width) + 0.01
    above = np.clip((mean - 0.8) * 4, 0, 1)
    statistics = {
        "mean": mean,
        "variance": within**2 + classes.var(0),
        "minimum": np.clip(mean - 0.3, 0, 1),
        "maximum": np.clip(mean + 0.3, 0, 1),
        "low": np.clip((0.15 - mean) * 5, 0, 1),
        "high": above,
        "within_class": within**2,
    }
    stage = name.split(".")[0]
    return GateSummary(
        name=name,
        channels=width,
        squeeze="mean",
        activation="sigmoid",
        placement="residual",
        groups=[f"{stage}.residual"],
        scales=[name.replace(".se", ".conv2")],
        statistics={key: value.tolist() for key, value in statistics.items()},
        class_mean=classes.tolist(),
        rank_agreement=float(0.95 - 0.6 * depth),
        saturated=float(above.mean()),
    )


def make_budget(chance, stages, gates, target: float, criterion: str) -> BudgetReport:
    groups = []
    for s, (width, blocks) in enumerate(stages):
        stage = f"layer{s + 1}"
        convs = [f"{stage}.{b}.conv2" for b in range(blocks)]
        mean = np.mean([g.statistics["mean"] for g in gates if g.name.startswith(stage)], axis=0)
        groups.append(cut(chance, f"{stage}.residual", mean**3, target, layers=convs))
        for b in range(blocks):
            name = f"{stage}.{b}.conv1"
            groups.append(cut(chance, name, chance.lognormal(-3, 1, width), target, layers=[name]))
    whole = GroupCut("fc", 10, 10, False, "classifier output", ["fc"], [], list(range(10)))
    return BudgetReport(
        label=f"macs {target:g}",
        target=target,
        reached=target - 0.004,
        criterion=criterion,
        allocation="global",
        seconds={"plan": 0.41, "prune": 1.2},
        groups=[*groups, whole],
        history=[{"step": 0, "macs": 1.0}, {"step": 1, "macs": target - 0.004}],
    )


def cut(chance, name: str, scores, target: float, *, layers: list[str]) -> GroupCut:
    width = len(scores)
    left = max(2, int(width * np.clip(chance.normal(target**0.5, 0.12), 0.1, 1)))
    keep = np.sort(np.argsort(-scores)[:left])
    return GroupCut(name, width, left, True, None, layers, scores.tolist(), keep.tolist())


def make_measurements(chance, budgets, *, worse: float = 0.0) -> list[Measurement]:
    macs, params = 40_813_184, 274_490
    rows = [measured("baseline", None, 0.8735, macs, params, 1.0)]
    for target in budgets:
        lost = worse + 0.02 * (1 - target) ** 2 + chance.normal(0, 0.001)
        stages = {"pruned": 0.25 * (1 - target) + lost, "recalibrated": 0.2 * (1 - target) + lost}
        for stage, loss in (stages | {"fine-tuned": lost}).items():
            kept = target - 0.004
            rows.append(
                measured(
                    stage,
                    f"macs {target:g}",
                    0.8735 - loss,
                    int(macs * kept),
                    int(params * kept),
                    kept**0.6,
                )
            )
    return rows


def measured(stage, budget, top1: float, macs: int, params: int, slow: float) -> Measurement:
    latency = [
        Latency(stage, batch, ms * slow, 0.05 * ms, "AMD EPYC 9V74", 2, runtime)
        for runtime, factor in (("eager", 1.0), ("onnxruntime", 0.6))
        for batch, ms in ((1, 5.1 * factor), (64, 80.2 * factor))
    ]
    latency.append(Latency(stage, 512, None, None, "AMD EPYC 9V74", 2, "eager", "out of memory"))
    return Measurement(
        stage,
        budget,
        {"top1": top1, "top5": 0.99},
        1.2 - top1,
        10000,
        0,
        macs,
        params,
        params * 4 + 20480,
        latency,
    )


def unfinished_report() -> Report:
    """A run that was stopped before it measured anything."""
    return Report(
        name="stopped",
        created="2026-07-01T12:34:56+00:00",
        command="seprune run recipe.yaml",
        seed=0,
        model={"name": "timm/seresnet18"},
        data={"source": "digits"},
    )
