"""Commands that look and tell: inspect, report, compare, export, models, env, verify, convert."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from seprune.cli import console, options, recipes
from seprune.errors import InputError, UsageError
from seprune.pipeline.journal import JOURNAL


def register(app: typer.Typer) -> None:
    """Add the commands."""
    for command in (inspect, report, compare, export, models, env, verify, convert):
        app.command()(options.spread(command))
    app.add_typer(recipes.app, name="recipes")


def inspect(
    network: options.Network,
    data: options.Calibration = None,
    statistics: options.Statistics = None,
    *,
    work: options.Work,
) -> None:
    """Gates, dependency groups, cost; what cannot be pruned, why.

    With --data or --statistics also what the gates say, before anything is cut.

    Examples:
      seprune inspect timm/seresnet18 --input 3x224x224
      seprune inspect seprune/se_resnet20 --checkpoint F.pth --data D
    """
    recipe = options.recipe(network, work, data, collect={"gradients": "none"})
    from seprune.cli import inspecting, opening
    from seprune.pipeline.collection import collect
    from seprune.pipeline.context import Bench

    if data is None:
        quiet = statistics is None
        subject = opening.network(recipe, loader=opening.loader(network.allow_code), quiet=quiet)
        bench = Bench(recipe, subject, None)
        held = opening.statistics(statistics, subject)
    else:
        both = opening.network_and_data(recipe, loader=opening.loader(network.allow_code))
        bench = Bench(recipe, *both, console.track)
        held = collect(bench)
    if work.json:
        console.give(inspecting.facts(network.model, bench, held))
    else:
        inspecting.show(network.model, bench, held)


def report(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="A run folder or its report.json.")],
    html: Annotated[Path | None, typer.Option(metavar="F", help="Write the page here.")] = None,
    csv: Annotated[Path | None, typer.Option(metavar="F", help="One row a channel.")] = None,
    group: Annotated[str | None, typer.Option(help="The channels of one group.")] = None,
    gate: Annotated[str | None, typer.Option(help="The channels of one gate.")] = None,
    compare: Annotated[
        list[Path] | None,
        typer.Option(metavar="RUN", help="Another run beside it; may be given several times."),
    ] = None,
    json: options.Json = False,
) -> None:
    """The report of a run, in the terminal or as a file.

    Examples:
      seprune report runs/quickstart --group layer1.0.conv1
      seprune report runs/quickstart --csv channels.csv
      seprune report runs/quickstart --compare runs/other --html both.html
    """
    from seprune.report import measurement

    for path in (run, *(compare or ())):
        _require_finished(path)
    found = measurement.read(run)
    others = [measurement.read(path) for path in compare or ()]
    if html is not None:
        from seprune.report.html import write_html

        write_html(found, html, others)
    if csv is not None:
        from seprune.report.table import write_csv

        write_csv(found, csv)
    if json:
        console.give(measurement.to_json(found))
    elif html is None and csv is None:
        from seprune.report.terminal import show

        show(found, console.stdout(), group=group, gate=gate)
        if others:
            from seprune.cli.tables import comparison
            from seprune.report import compare as comparing

            made = comparing.compare([found, *others])
            console.stdout().print(comparison(made.table()))


def _require_finished(run: Path) -> None:
    if not run.exists():
        raise InputError(
            f"{run}: no such run",
            why="a report is read from a run folder or its report.json",
            fix="give the folder that was --out of `seprune run`",
        )
    if run.is_dir() and not (run / "report.json").is_file() and (run / JOURNAL).is_file():
        raise InputError(
            f"{run}: the run is not finished",
            why="it has no report.json yet",
            fix=f"go on with: seprune run {run / 'recipe.yaml'} --out {run}",
            code="unfinished",
        )


def compare(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN...")],
    html: Annotated[Path | None, typer.Option(metavar="F", help="Table and figure.")] = None,
    csv: Annotated[Path | None, typer.Option(metavar="F", help="One row a network.")] = None,
    json: options.Json = False,
) -> None:
    """Several runs side by side.

    Accuracy against MACs over seeds and criteria, the Pareto front marked.

    Example:
      seprune compare runs/* --html compare.html
    """
    from seprune.report import compare as comparing
    from seprune.report import measurement

    for path in runs:
        _require_finished(path)
    made = comparing.compare([measurement.read(r) for r in runs])
    if html is not None:
        from seprune.report.html import write_comparison

        write_comparison(made, html)
    if csv is not None:
        comparing.write_csv(made, csv)
    if json:
        console.give(made.to_json())
    elif html is None and csv is None:
        from seprune.cli.tables import comparison

        console.stdout().print(comparison(made.table()))


def export(
    run: Annotated[
        str, typer.Argument(metavar="RUN", help="A run folder, or a network that seprune wrote.")
    ],
    onnx: Annotated[Path | None, typer.Option(metavar="F", help="Write ONNX here.")] = None,
    pt2: Annotated[Path | None, typer.Option(metavar="F", help="Write torch.export here.")] = None,
    data: Annotated[
        str | None, typer.Option("--data", metavar="D", help="Images to compare on; else noise.")
    ] = None,
    opset: Annotated[int | None, typer.Option(help="Of ONNX.")] = None,
    allow_code: options.AllowCode = False,
    json: options.Json = False,
) -> None:
    """Write ONNX and torch.export files, checked.

    With a free batch size; they answer as the eager model does, or no file is written.

    Example:
      seprune export runs/quickstart --onnx small.onnx --pt2 small.pt2
    """
    if onnx is None and pt2 is None:
        raise UsageError("nothing to export to", why="neither --onnx nor --pt2 is given",
                         fix="--onnx FILE or --pt2 FILE")  # fmt: skip
    from seprune.cli import exporting, opening

    made = exporting.export(
        _network(Path(run)),
        {"onnx": onnx, "pt2": pt2},
        data,
        opset=opset,
        loader=opening.loader(allow_code),
    )
    if json:
        console.give(made)


def _network(run: Path) -> Path:
    """The network of a run folder: the fine-tuned one, if there is just one."""
    if (run / "config.json").is_file() or not run.is_dir():
        return run
    for name in ("finetuned", "pruned"):
        found = [p.parent for p in sorted(run.rglob(f"{name}/config.json"))]
        if len(found) > 1:
            raise UsageError(
                f"{run}: holds {len(found)} networks",
                why=", ".join(str(p.relative_to(run)) for p in found),
                fix=f"seprune export {found[0]} ...",
            )
        if found:
            return found[0]
    return run


def models(
    pattern: Annotated[str, typer.Argument(help="A glob, or a part of the name.")] = "*",
    json: options.Json = False,
) -> None:
    """Networks that can be built here. Those with channel gates come first.

    Example:
      seprune models 'timm/seres*'
    """
    from seprune.models import names

    found = names(pattern)
    if not found:
        raise InputError(f"no network is called like '{pattern}'", why="nothing here matches it",
                         fix="seprune models", code="no-model")  # fmt: skip
    if json:
        console.give(found)
    else:
        print("\n".join(found))


def env(json: options.Json = False) -> None:
    """Versions, devices, extras, free disk.

    Also whether torch and torchvision are a pair.

    Example:
      seprune env --json
    """
    from seprune.runtime.environment import environment

    facts = environment()
    if json:
        console.give(facts)
        return
    for name in ("python", "platform", "cpus"):
        print(f"{name:20s} {facts[name]}")
    print(f"{'free disk':20s} {facts['disk_free'] / 1e9:,.1f} GB here")
    pair = facts["pair"]
    print(f"{'torch, torchvision':20s} {pair['torch']}, {pair['torchvision']}: "
          + ("they fit" if pair["fits"] else f"do not fit ({pair['reason']})"))  # fmt: skip
    if pair["install"]:
        print(f"{'':20s} {pair['install']}")
    for device in facts["devices"]:
        more = ", ".join(f"{k} {v}" for k, v in device.items() if k not in ("device", "name"))
        print(f"{device['device']:20s} {device['name']}{', ' if more else ''}{more}")
    for name, extra in facts["extras"].items():
        print(f"{name + ', extra':20s} {'present' if extra['present'] else extra['install']}")
    for name, version in facts["packages"].items():
        print(f"  {name:18s} {version or 'missing'}")


def verify(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="A run or a saved network.")],
    json: options.Json = False,
) -> None:
    """Check the hashes and the journal of a folder.

    Example:
      seprune verify runs/quickstart
    """
    from seprune.pipeline.run_folder import verify as check

    problems = check(folder)
    for problem in problems:
        console.tell(problem)
    if problems:
        raise InputError(
            f"{folder}: {len(problems)} problem{'s' if len(problems) > 1 else ''}",
            why=f"files are not what seprune wrote: {'; '.join(problems[:3])}",
            fix="run the stage that wrote them again, or copy the folder again",
            code="damaged",
        )
    if json:
        console.give({"folder": str(folder), "problems": problems})
    console.tell(f"{folder}: whole")


def convert(
    file: Annotated[Path, typer.Argument(help="A pickled model whose author you trust.")],
    allow_pickle: Annotated[
        bool, typer.Option("--allow-pickle", help="Yes, run the code in this file.")
    ] = False,
    out: Annotated[Path | None, typer.Option("--out", metavar="F")] = None,
    weights: options.Weights = "auto",
    json: options.Json = False,
) -> None:
    """Take the weights out of a pickled model.

    In a process of its own, into safetensors.

    Example:
      seprune convert model.pkl --allow-pickle --out weights.safetensors
    """
    from seprune.checkpoint import convert as carry_out
    from seprune.checkpoint import load_weights

    choice = options.weights_of(weights)
    if allow_pickle:
        target = out or _beside(file)
        found, said = carry_out(file, target, weights=choice), f"tensors: {target}"
    else:
        target = file
        found, said = load_weights(file, weights=choice), "tensors can be read as they are"
    console.tell(f"{file}: {len(found.tensors)} {said}")
    if json:
        console.give({"file": str(target), "tensors": len(found.tensors), "sha256": found.sha256})


def _beside(file: Path) -> Path:
    """FILE.safetensors; a file that is there already may be somebody's."""
    target = file.with_suffix(".safetensors")
    if target.exists():
        raise UsageError(f"{target}: exists already", why="nothing is overwritten unasked",
                         fix=f"seprune convert --allow-pickle {file} --out FILE")  # fmt: skip
    return target
