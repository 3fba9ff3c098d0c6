"""Commands that do the work: `run`, and each of its stages alone, on files."""

from __future__ import annotations

import shlex
import sys
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer

from seprune.cli import console, options


def register(app: typer.Typer) -> None:
    """Add the commands, in the order of the story."""
    for command in (run, collect, rank, prune, finetune, evaluate):
        app.command()(options.spread(command))


def run(
    recipe: options.RecipeName,
    overrides: options.Overrides = None,
    out: options.Out = Path("runs/seprune"),
    allow_code: options.AllowCode = False,
    json: options.Json = False,
) -> None:
    """Everything, from training to the report.

    Train if need be, collect, rank, prune, fine-tune, report. The same command goes on where
    a stopped run ended.

    Example:
      seprune run quickstart --out runs/quickstart plan.macs=0.4
    """
    from seprune.recipe import load_recipe

    loaded = load_recipe(recipe, overrides or [], allow_code=allow_code)
    from seprune.cli import opening
    from seprune.pipeline.run import run as carry_out
    from seprune.report import measurement, terminal

    opening.tell_device(loaded)
    command = shlex.join(["seprune", *sys.argv[1:]])
    report = carry_out(
        loaded, out, track=console.track, loader=opening.loader(allow_code), command=command
    )
    console.stderr().print(terminal.results(report))
    for note in (*report.model.get("notes", ()), *report.warnings):
        console.tell(f"note: {note}")
    console.tell(f"report: {out / ('report.html' if loaded.report.html else 'report.json')}")
    if json:
        console.give(measurement.to_json(report))


def collect(
    network: options.Network,
    data: options.DataSource,
    out: Annotated[Path, typer.Option("--out", metavar="FILE", help="statistics.safetensors")],
    images: Annotated[int, typer.Option(help="Of the training images.")] = 2048,
    gradients: Annotated[
        str,
        typer.Option(
            help="none, labels, smoothed, sampled, logits, weights; auto: what --importance needs."
        ),
    ] = "auto",
    importance: options.Criterion = "gate_logit",
    probe: options.Probe = None,
    per_sample: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Also the gates of every image, as .npy.")
    ] = None,
    *,
    work: options.Work,
) -> None:
    """Run the calibration set once; keep what every gate does.

    Example:
      seprune collect seprune/se_resnet20 --checkpoint F.pth --data D \\
        --out stats.safetensors
    """
    recipe = options.recipe(
        network, work, data,
        collect={"images": images, "gradients": gradients},
        importance={"criterion": importance, "probe": probe and {"epochs": probe}},
    )  # fmt: skip
    from seprune.cli import opening
    from seprune.pipeline.collection import collect
    from seprune.pipeline.context import Bench
    from seprune.runtime.distributed import first

    both = opening.network_and_data(recipe, loader=opening.loader(network.allow_code))
    bench = Bench(recipe, *both, console.track)
    folder = out.with_name(f".{out.name}.collecting")
    statistics = collect(bench, folder, per_sample=per_sample)
    first(lambda: statistics.save(out))
    for warning in statistics.warnings:
        console.tell(f"note: {warning}")
    console.tell(f"{len(statistics.values)} gates over {statistics.samples:,} images: {out}")
    if work.json:
        console.give({"gates": len(statistics.values), "images": statistics.samples,
                      "gradients": statistics.gradients, "warnings": list(statistics.warnings),
                      "file": str(out)})  # fmt: skip


def rank(
    network: options.Network,
    statistics: options.Statistics = None,
    importance: options.Criterion = "gate_logit",
    out: Annotated[Path | None, typer.Option("--out", metavar="FILE", help="A CSV.")] = None,
    *,
    work: options.Work,
) -> None:
    """Score every unit of every dependency group. Higher means keep.

    Example:
      seprune rank seprune/se_resnet20 --checkpoint F.pth \\
        --statistics stats.safetensors --out importance.csv
    """
    recipe = options.recipe(network, work, importance={"criterion": importance})
    from seprune.cli import opening
    from seprune.pipeline import stages
    from seprune.pipeline.context import Bench

    subject = opening.network(recipe, loader=opening.loader(network.allow_code))
    made = stages.rank(Bench(recipe, subject, None), opening.statistics(statistics, subject))
    if out is not None:
        from seprune.runtime.files import write_text

        lines = [f"{name},{unit},{float(s)!r}" for name, scores in made.scores.items()
                 for unit, s in enumerate(scores)]  # fmt: skip
        write_text(out, "group,unit,score\n" + "\n".join(lines) + "\n")
    if work.json:
        scores = {name: s.tolist() for name, s in made.scores.items()}
        console.give({"criterion": importance, "scores": scores})
    else:
        from seprune.cli.tables import ranking

        console.stderr().print(ranking(made))


def prune(
    network: options.Network,
    out: options.Out,
    data: options.Calibration = None,
    macs: Annotated[str | None, typer.Option(help="Kept: 0.5, or an amount like 20M.")] = None,
    params: Annotated[str | None, typer.Option(help="Kept: 0.4, or an amount like 1.5M.")] = None,
    latency: Annotated[str | None, typer.Option(help="Kept: 0.6, measured here.")] = None,
    importance: options.Criterion = "gate_logit",
    probe: options.Probe = None,
    recover: Annotated[str, typer.Option(help="none, bn, refit or scratch.")] = "none",
    round_to: Annotated[
        int | None, typer.Option(help="Widths are multiples of this; 8 on a GPU, else 1.")
    ] = None,
    statistics: options.Statistics = None,
    plan: Annotated[
        Path | None, typer.Option(metavar="F", help="Carry out this plan.json, edited or not.")
    ] = None,
    dry_run: Annotated[bool, typer.Option(help="Write the plan and nothing else.")] = False,
    *,
    work: options.Work,
) -> None:
    """Cut a network to a budget and save it.

    Writes config.json, model.safetensors, plan.json and the statistics that were needed.

    Examples:
      seprune prune seprune/se_resnet20 --checkpoint F.pth --data D \\
        --macs 0.5 --recover refit --out small
      seprune prune timm/seresnet50 --macs 0.5 --importance l2 \\
        --dry-run --out plan
      seprune prune timm/seresnet50 --plan plan/plan.json --out small
    """
    given = {"macs": macs, "params": params, "latency": latency}
    budget = {k: options.budget_of(k, v) for k, v in given.items() if v is not None}
    recipe = options.recipe(
        network, work, data, plan={**budget, "round_to": round_to},
        prune={"recover": recover},
        importance={"criterion": importance, "probe": probe and {"epochs": probe}},
    )  # fmt: skip
    from seprune.cli import opening, pruning
    from seprune.pipeline.context import Bench

    if data is None:
        subject, found = opening.network(recipe, loader=opening.loader(network.allow_code)), None
    else:
        subject, found = opening.network_and_data(recipe, loader=opening.loader(network.allow_code))
    bench = Bench(recipe, subject, found, console.track)
    if plan is not None:
        pruning.refuse_beside_plan({**budget, "dry-run": dry_run})
        result = pruning.replay(bench, plan, out)
    else:
        job = pruning.Job(bench, opening.statistics(statistics, subject), out)
        result = job.plan_only() if dry_run else job.prune()
    if work.json:
        console.give(result)


def finetune(
    network: options.Network,
    data: options.DataSource,
    out: options.Out,
    epochs: Annotated[int, typer.Option(help="0: recalibrate BatchNorm only.")] = 10,
    lr: Annotated[float, typer.Option(help="Highest learning rate.")] = 0.05,
    teacher: Annotated[
        str | None, typer.Option(metavar="MODEL", help="A dense parent to distil from.")
    ] = None,
    teacher_checkpoint: Annotated[
        str | None, typer.Option(metavar="F", help="The teacher's weights.")
    ] = None,
    *,
    work: options.Work,
) -> None:
    """Train a (pruned) network on.

    The same command goes on where it was stopped.

    Example:
      seprune finetune small --data D --epochs 10 --out tuned
    """
    section: dict[str, Any] = {"epochs": epochs, "lr": lr}
    if teacher is None:
        section["distill"] = None
    recipe = options.recipe(network, work, data, finetune=section)
    from seprune.cli import opening, pruning
    from seprune.pipeline.context import Bench
    from seprune.recovery.finetune import Teacher

    subject, found = opening.network_and_data(recipe, loader=opening.loader(network.allow_code))
    parent = None
    if teacher is not None:
        other = replace(network, model=teacher, checkpoint=teacher_checkpoint, weights="auto")
        dense = opening.network(
            options.recipe(other), loader=opening.loader(network.allow_code), like=subject
        )
        plans = subject.architecture.plans[len(dense.architecture.plans) :]
        parent = Teacher(dense.model, plans)
    result = pruning.tune(Bench(recipe, subject, found, console.track), parent, out)
    if work.json:
        console.give(result)


def evaluate(network: options.Network, data: options.DataSource, *, work: options.Work) -> None:
    """Score a network on the reporting images (val).

    Example:
      seprune evaluate small --data D --json
    """
    recipe = options.recipe(network, work, data)
    from dataclasses import asdict

    from seprune.cli import opening
    from seprune.measure.metrics import evaluate as score

    subject, found = opening.network_and_data(recipe, loader=opening.loader(network.allow_code))
    images = found.reporting()
    result = asdict(score(subject.model, images, device=recipe.device, track=console.track))
    if work.json:
        console.give(result)
        return
    console.tell(f"top-1 {result['top1']:.4f}  top-5 {result['top5']:.4f}  "
                 f"loss {result['loss']:.4f}  on {result['count']:,} images")  # fmt: skip
    if result["nonfinite"]:
        console.tell(f"note: {result['nonfinite']:,} images gave NaN or infinity")
