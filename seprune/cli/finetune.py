"""`seprune finetune`: train a (pruned) network on."""

from __future__ import annotations

from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from seprune.cli import console, options
from seprune.runtime.checksums import REPORT
from seprune.runtime.text import shell_word

if TYPE_CHECKING:
    from seprune.pipeline.step_report import Step
    from seprune.recovery.finetune import FineTuneSettings, Teacher


def finetune(
    network: options.NetworkOptions,
    data: options.DataSource,
    out: options.Out,
    epochs: Annotated[int, typer.Option(help="0: recalibrate BatchNorm only.")] = 10,
    lr: Annotated[
        str, typer.Option(metavar="RATE", help="Highest learning rate; auto: by short trials.")
    ] = "auto",
    teacher: Annotated[
        str | None, typer.Option(metavar="MODEL", help="A dense parent to distil from.")
    ] = None,
    teacher_checkpoint: Annotated[
        str | None, typer.Option(metavar="F", help="The teacher's weights.")
    ] = None,
    allow_teacher_code: Annotated[
        bool, typer.Option(help="Run the file that --teacher names, too.")
    ] = False,
    *,
    work: options.WorkOptions,
) -> None:
    """Train a (pruned) network on.

    The same command goes on where it was stopped.

    Example:
      seprune finetune small --data D --epochs 10 --out tuned
    """
    section: dict[str, Any] = {"epochs": epochs, "lr": options.number_or_auto(lr)}
    if teacher is None:
        section["distill"] = None
    recipe = options.recipe(network, work, data, finetune=section)
    from seprune.cli import next_step, open_inputs
    from seprune.pipeline.settings import finetune_settings
    from seprune.pipeline.step_report import Step
    from seprune.recovery.finetune import Teacher

    context = open_inputs.context(recipe, loader=open_inputs.permission(network))
    parent = None
    if teacher is not None:
        zoo = teacher.startswith(("timm/", "torchvision/")) and teacher_checkpoint is None
        other = options.NetworkOptions(teacher, checkpoint=teacher_checkpoint, pretrained=zoo)
        asked = options.recipe(other)
        dense = open_inputs.network(
            asked,
            loader=open_inputs.loader(allow_teacher_code, asked.model),
            like=context.network,
        )
        plans = context.network.architecture.plans[len(dense.architecture.plans) :]
        parent = Teacher(dense.model, plans)
    settings = finetune_settings(recipe.finetune, context.runtime, seed=recipe.seed)
    step = Step(recipe, context, out, next_step.typed())
    result = _locked(step, settings, parent)
    exports = context.images().info.task != "detection"
    next_step.show(next_step.after_finetune(network, data, out, exports=exports))
    if work.json:
        console.give(result)


def _locked(step: Step, settings: FineTuneSettings, teacher: Teacher | None) -> dict[str, Any]:
    """Train, save, score; nobody else works in the same folder meanwhile."""
    from seprune.runtime.distributed import first
    from seprune.runtime.lock import hold

    with ExitStack() as stack:
        first(lambda: stack.enter_context(hold(step.out)))
        return _tune(step, settings, teacher)


def _tune(step: Step, settings: FineTuneSettings, teacher: Teacher | None) -> dict[str, Any]:
    from seprune.export import pruned_model
    from seprune.pipeline import stages, step_report
    from seprune.recovery.finetune import finetune as train
    from seprune.report import terminal, words
    from seprune.runtime.distributed import first

    context, out = step.context, step.out
    network = context.network
    before = step_report.before_tuning(step)
    if before.command == step.command and (Path(network.checkpoint or "") / REPORT).is_file():
        console.tell(f"note: {network.checkpoint} has a report on other images or other weights, "
                     "so this one does not go on with it")  # fmt: skip
    tuned = train(
        network.model,
        context.images(),
        settings,
        teacher=teacher,
        folder=out,
        track=console.track,
    )
    result, numbers = stages.measured(context, tuned.model), tuned.numbers()
    report = first(lambda: step_report.of_tuning(step, before, result, numbers))
    about = {"metrics": words.finite(result["metrics"])}
    beside = step_report.beside(report)
    save = partial(pruned_model.save, tuned.model.cpu(), out, about=about, beside=beside)
    first(lambda: save(architecture=network.architecture))
    report = first(lambda: step_report.write(report, out))
    for line in words.tuning(numbers):
        console.tell(line)
    console.stderr().print(terminal.results(report))
    console.tell(f"tuned network: {out}")
    console.tell(f"report: seprune report {shell_word(out)}")
    return {**result, **numbers}
