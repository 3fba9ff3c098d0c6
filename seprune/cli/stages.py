"""Commands that do the work: `run`, and each of its stages alone, on files."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from seprune.cli import console, options

if TYPE_CHECKING:
    from seprune.pipeline.subject import Subject
    from seprune.recipe import Recipe


def register(app: typer.Typer) -> None:
    """Add the commands, in the order of the story."""
    for command in (run, collect, rank, prune, finetune, evaluate):
        app.command()(command)


def run(
    recipe: Annotated[str, typer.Argument(help="A YAML file, or the name of a shipped recipe.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="As in plan.macs=0.5.")
    ] = None,
    out: options.Out = Path("runs/seprune"),
    allow_code: options.AllowCode = False,
    json: options.Json = False,
) -> None:
    """Everything: train if need be, collect, rank, prune, fine-tune, report.

    The same command goes on where a stopped run ended.

    Example: seprune run quickstart --out runs/quickstart plan.macs=0.4
    """
    from seprune.recipe import load_recipe

    loaded = load_recipe(recipe, overrides or [], allow_code=allow_code)
    from seprune.pipeline import run as carry_out
    from seprune.report import measurement, terminal

    command = shlex.join(["seprune", *sys.argv[1:]])
    report = carry_out(loaded, out, track=console.track, allow_code=allow_code, command=command)
    console.stderr().print(terminal.results(report))
    for warning in report.warnings:
        console.tell(f"note: {warning}")
    console.tell(f"report: {out / 'report.html'}")
    if json:
        console.give(measurement.to_json(report))


def collect(
    model: options.Model,
    data: options.DataSource,
    out: Annotated[Path, typer.Option("--out", metavar="FILE", help="statistics.safetensors")],
    checkpoint: options.Checkpoint = None,
    classes: options.Classes = None,
    input: options.Input = None,
    images: Annotated[int, typer.Option(help="Of the training images.")] = 2048,
    gradients: Annotated[
        str,
        typer.Option(
            help="none, labels, smoothed, sampled, logits; auto: what --importance needs."
        ),
    ] = "auto",
    importance: options.Criterion = "gate_logit",
    per_sample: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Also the gates of every image, as .npy.")
    ] = None,
    device: options.Device = "auto",
    seed: options.Seed = 0,
    allow_code: options.AllowCode = False,
    set: options.Set = None,
    json: options.Json = False,
) -> None:
    """Run the calibration set once and keep the statistics of every gate.

    Example: seprune collect seprune/se_resnet20 --checkpoint F.pth --data D --out stats.safetensors
    """
    from seprune.pipeline import steps

    recipe = options.recipe_for(
        _model(model, checkpoint, classes, input), data,
        {"collect": {"images": images, "gradients": gradients},
         "importance": {"criterion": importance}, "device": device, "seed": seed}, set,
    )  # fmt: skip
    bench = steps.Bench(recipe, *_open(recipe, allow_code), console.track)
    folder = out.with_name(f".{out.name}.collecting")
    statistics = bench.collect(folder, per_sample=per_sample)
    statistics.save(out)
    for warning in statistics.warnings:
        console.tell(f"note: {warning}")
    console.tell(f"{len(statistics.values)} gates over {statistics.samples:,} images: {out}")
    if json:
        console.give({"gates": len(statistics.values), "images": statistics.samples,
                      "gradients": statistics.gradients, "warnings": list(statistics.warnings),
                      "file": str(out)})  # fmt: skip


def rank(
    model: options.Model,
    checkpoint: options.Checkpoint = None,
    statistics: Annotated[
        Path | None, typer.Option(metavar="F", help="What `seprune collect` wrote.")
    ] = None,
    classes: options.Classes = None,
    input: options.Input = None,
    importance: options.Criterion = "gate_logit",
    out: Annotated[Path | None, typer.Option("--out", metavar="FILE", help="A CSV.")] = None,
    allow_code: options.AllowCode = False,
    set: options.Set = None,
    json: options.Json = False,
) -> None:
    """Score every unit of every dependency group; higher means keep.

    Example: seprune rank seprune/se_resnet20 --checkpoint F.pth --statistics stats.safetensors
    """
    from seprune.pipeline import steps

    recipe = options.recipe_for(
        _model(model, checkpoint, classes, input), None,
        {"importance": {"criterion": importance}}, set,
    )  # fmt: skip
    subject = _subject(recipe, allow_code)
    bench = steps.Bench(recipe, subject, None)
    made = bench.rank(_statistics(statistics, subject))
    rows = [(name, unit, float(s)) for name, scores in made.scores.items()
            for unit, s in enumerate(scores)]  # fmt: skip
    if out is not None:
        from seprune.files import write_text

        lines = [f"{name},{unit},{s!r}" for name, unit, s in rows]
        write_text(out, "group,unit,score\n" + "\n".join(lines) + "\n")
    if json:
        scores = {name: s.tolist() for name, s in made.scores.items()}
        console.give({"criterion": importance, "scores": scores})
    else:
        from seprune.cli.tables import ranking

        console.stderr().print(ranking(made))


def prune(
    model: options.Model,
    out: options.Out,
    data: Annotated[
        str | None, typer.Option("--data", metavar="D", help="Calibration images (training part).")
    ] = None,
    checkpoint: options.Checkpoint = None,
    macs: Annotated[str | None, typer.Option(help="Kept: 0.5, or an amount like 20M.")] = None,
    params: Annotated[str | None, typer.Option(help="Kept: 0.4, or an amount like 1.5M.")] = None,
    latency: Annotated[float | None, typer.Option(help="Kept, measured on this device.")] = None,
    importance: options.Criterion = "gate_logit",
    recover: Annotated[str, typer.Option(help="none, bn or refit.")] = "none",
    round_to: Annotated[
        int | None, typer.Option(help="Widths are multiples of this; 8 on a GPU, else 1.")
    ] = None,
    statistics: Annotated[
        Path | None, typer.Option(metavar="F", help="What `seprune collect` wrote.")
    ] = None,
    dry_run: Annotated[bool, typer.Option(help="Write the plan and nothing else.")] = False,
    classes: options.Classes = None,
    input: options.Input = None,
    device: options.Device = "auto",
    seed: options.Seed = 0,
    allow_code: options.AllowCode = False,
    set: options.Set = None,
    json: options.Json = False,
) -> None:
    """Cut a network to a budget and save it: config.json, model.safetensors, plan.json.

    Example: seprune prune seprune/se_resnet20 --checkpoint F.pth --data D --macs 0.5 --out small
    """
    budget = {"macs": macs, "params": params}
    plan = {k: options.budget_of(v) for k, v in budget.items() if v is not None}
    plan |= {"latency": latency} if latency is not None else {}
    recipe = options.recipe_for(
        _model(model, checkpoint, classes, input), data,
        {"plan": {**plan, "round_to": round_to}, "prune": {"recover": recover},
         "importance": {"criterion": importance}, "device": device, "seed": seed}, set,
    )  # fmt: skip
    from seprune.cli import pruning
    from seprune.pipeline import steps

    subject, found = _open(recipe, allow_code) if data else (_subject(recipe, allow_code), None)
    bench = steps.Bench(recipe, subject, found, console.track)
    job = pruning.Job(bench, _statistics(statistics, subject), out)
    result = job.plan_only() if dry_run else job.prune()
    if json:
        console.give(result)


def finetune(
    model: options.Model,
    data: options.DataSource,
    out: options.Out,
    checkpoint: options.Checkpoint = None,
    epochs: Annotated[int, typer.Option(help="0: recalibrate BatchNorm only.")] = 10,
    lr: Annotated[float, typer.Option(help="Highest learning rate.")] = 0.05,
    teacher: Annotated[
        str | None, typer.Option(metavar="MODEL", help="A dense parent to distil from.")
    ] = None,
    teacher_checkpoint: Annotated[
        str | None, typer.Option(metavar="F", help="The teacher's weights.")
    ] = None,
    classes: options.Classes = None,
    input: options.Input = None,
    device: options.Device = "auto",
    seed: options.Seed = 0,
    allow_code: options.AllowCode = False,
    set: options.Set = None,
    json: options.Json = False,
) -> None:
    """Train a (pruned) network on; the same command goes on where it was stopped.

    Example: seprune finetune small --data D --epochs 10 --out tuned
    """
    section: dict[str, Any] = {"epochs": epochs, "lr": lr}
    if teacher is None:
        section["distill"] = None
    recipe = options.recipe_for(
        _model(model, checkpoint, classes, input), data,
        {"finetune": section, "device": device, "seed": seed}, set,
    )  # fmt: skip
    subject, found = _open(recipe, allow_code)
    parent = None
    if teacher is not None:
        other = options.recipe_for(
            _model(teacher, teacher_checkpoint, classes, input), data, {}, None
        )
        parent = _subject(other, allow_code, like=subject).model
    from seprune.cli import pruning
    from seprune.pipeline import steps

    result = pruning.tune(steps.Bench(recipe, subject, found, console.track), parent, out)
    if json:
        console.give(result)


def evaluate(
    model: options.Model,
    data: options.DataSource,
    checkpoint: options.Checkpoint = None,
    weights: options.Weights = "auto",
    classes: options.Classes = None,
    input: options.Input = None,
    device: options.Device = "auto",
    allow_code: options.AllowCode = False,
    set: options.Set = None,
    json: options.Json = False,
) -> None:
    """Score a network on the reporting images (val).

    Example: seprune evaluate small --data D --json
    """
    recipe = options.recipe_for(
        {**_model(model, checkpoint, classes, input), "weights": weights}, data,
        {"device": device}, set,
    )  # fmt: skip
    subject, found = _open(recipe, allow_code)
    from dataclasses import asdict

    from seprune.evaluation import evaluate as score

    result = asdict(score(subject.model, found.reporting(), device=device, track=console.track))
    if json:
        console.give(result)
    else:
        console.tell(f"top-1 {result['top1']:.4f}  top-5 {result['top5']:.4f}  "
                     f"loss {result['loss']:.4f}  on {result['count']:,} images")  # fmt: skip
        if result["nonfinite"]:
            console.tell(f"note: {result['nonfinite']:,} images gave NaN or infinity")


def _model(
    name: str, checkpoint: str | None, classes: int | None, input: str | None
) -> dict[str, Any]:
    return {"name": name, "checkpoint": checkpoint, "classes": classes, "input": input}


def _open(recipe: Recipe, allow_code: bool) -> tuple[Subject, Any]:
    from seprune.pipeline.subject import open_both

    subject, found = open_both(recipe, allow_code=allow_code, track=console.track)
    _say(subject)
    return subject, found


def _subject(recipe: Recipe, allow_code: bool, like: Subject | None = None) -> Subject:
    from seprune.pipeline.subject import open_subject

    subject = open_subject(
        recipe.model,
        shape=like.shape if like else None,
        classes=like.architecture.classes if like else None,
        seed=recipe.seed,
        allow_code=allow_code,
    )
    _say(subject)
    return subject


def _say(subject: Subject) -> None:
    for note in subject.notes:
        console.tell(f"note: {note}")
    if subject.checkpoint is None:
        console.tell("note: no checkpoint is given, so the weights are random")


def _statistics(path: Path | None, subject: Subject) -> Any:
    if path is None:
        return None
    from seprune.statistics import GateStatistics, fingerprint

    held = GateStatistics.load(path)
    held.require(model=fingerprint(subject.model))
    return held
