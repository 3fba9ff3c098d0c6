"""Commands that look and tell: inspect, report, compare, export, models, env, verify, convert."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from seprune.cli import console, options, recipes
from seprune.errors import InputError, UsageError


def register(app: typer.Typer) -> None:
    """Add the commands."""
    for command in (inspect, report, compare, export, models, env, verify, convert):
        app.command()(command)
    app.add_typer(recipes.app, name="recipes")


def inspect(
    model: options.Model,
    checkpoint: options.Checkpoint = None,
    classes: options.Classes = None,
    input: options.Input = None,
    allow_code: options.AllowCode = False,
    json: options.Json = False,
) -> None:
    """Gates and dependency groups, the cost, and what cannot be pruned and why.

    Example: seprune inspect timm/seresnet18 --input 3x224x224
    """
    recipe = options.recipe_for(
        {"name": model, "checkpoint": checkpoint, "classes": classes, "input": input},
        None, {}, None,
    )  # fmt: skip
    from seprune.pipeline.subject import open_subject
    from seprune.pruning import cuttable

    subject = open_subject(recipe.model, allow_code=allow_code)
    for note in subject.notes:
        console.tell(f"note: {note}")
    structure = cuttable(subject.model, subject.example())
    whole = structure.whole()
    macs, params = structure.macs_at(whole), structure.params_at(whole)
    if json:
        console.give({"model": model, "macs": macs, "params": params, **_facts(structure)})
        return
    from seprune.cli import tables

    size = "x".join(map(str, subject.shape))
    out = console.stderr()
    out.print(f"{model} at {size}: {macs:,} MACs, {params:,} parameters", soft_wrap=True)
    out.print(tables.gates(structure))
    out.print(tables.groups(structure))
    if not structure.gates:
        console.tell("note: no channel gates; importance l2 works without them")


def _facts(structure: Any) -> dict[str, Any]:
    """The contract's lists of gates and groups."""
    owners: dict[str, list[str]] = {}
    for group in structure.groups:
        for link in group.gates:
            owners.setdefault(link.gate, []).append(group.name)
    gates = [
        {"name": g.name, "channels": g.channels, "squeeze": g.squeeze,
         "activation": g.activation, "placement": g.placement,
         "groups": owners.get(g.name, []), "runs": g.runs, "scales": list(g.scales)}
        for g in structure.gates
    ]  # fmt: skip
    groups = [
        {"name": g.name, "channels": g.channels, "gates": [link.gate for link in g.gates],
         "layers": list(g.layers), "prunable": g.prunable, "reason": g.reason,
         "units": g.units, "role": g.role}
        for g in structure.groups
    ]  # fmt: skip
    return {"gates": gates, "groups": groups}


def report(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="A run folder or its report.json.")],
    html: Annotated[Path | None, typer.Option(metavar="F", help="Write the page here.")] = None,
    csv: Annotated[Path | None, typer.Option(metavar="F", help="One row a channel.")] = None,
    group: Annotated[str | None, typer.Option(help="The channels of one group.")] = None,
    gate: Annotated[str | None, typer.Option(help="The channels of one gate.")] = None,
    json: options.Json = False,
) -> None:
    """The report of a run, in the terminal or as a file.

    Example: seprune report runs/quickstart --group layer1.0.conv1
    """
    from seprune.report import measurement

    _require_finished(run)
    found = measurement.read(run)
    if html is not None:
        from seprune.report.html import write_html

        write_html(found, html)
    if csv is not None:
        from seprune.report.table import write_csv

        write_csv(found, csv)
    if json:
        console.give(measurement.to_json(found))
    elif html is None and csv is None:
        from seprune.report.terminal import show

        show(found, console.stdout(), group=group, gate=gate)


def _require_finished(run: Path) -> None:
    if not run.exists():
        raise InputError(
            f"{run}: no such run",
            why="a report is read from a run folder or its report.json",
            fix="give the folder that was --out of `seprune run`",
        )
    if run.is_dir() and not (run / "report.json").is_file() and (run / "journal.jsonl").is_file():
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
    """Several runs side by side: accuracy against MACs, the Pareto front marked.

    Example: seprune compare runs/* --html compare.html
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
    """ONNX and torch.export, with a free batch size, checked against the eager model.

    Example: seprune export runs/quickstart --onnx small.onnx
    """
    if onnx is None and pt2 is None:
        raise UsageError("nothing to export to", why="neither --onnx nor --pt2 is given",
                         fix="--onnx FILE or --pt2 FILE")  # fmt: skip
    from seprune.cli import exporting

    made = exporting.export(
        _network(Path(run)), {"onnx": onnx, "pt2": pt2}, data, opset=opset, allow_code=allow_code
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
    """Networks that can be built here, those with channel gates first."""
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
    """Versions, devices, the torch/torchvision pair, extras, free disk."""
    from seprune.runs import environment

    facts = environment()
    if json:
        console.give(facts)
        return
    for name, value in facts.items():
        if isinstance(value, dict):
            print(name)
            for key, item in value.items():
                print(f"  {key:18s} {_spelled(item)}")
        else:
            print(f"{name:20s} {value}")


def _spelled(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{k} {v}" for k, v in value.items() if v is not None)
    return str(value) if value is not None else "missing"


def verify(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="A run or a saved network.")],
    json: options.Json = False,
) -> None:
    """Check the hashes and the journal of a folder that seprune wrote."""
    from seprune.runs import verify as check

    problems = check(folder)
    if json:
        console.give({"folder": str(folder), "problems": problems})
    for problem in problems:
        console.tell(problem)
    if problems:
        raise InputError(
            f"{folder}: {len(problems)} problem{'s' if len(problems) > 1 else ''}",
            why="files are not what seprune wrote",
            fix="run the stage that wrote them again, or copy the folder again",
            code="damaged",
        )
    console.tell(f"{folder}: whole")


def convert(
    file: Annotated[Path, typer.Argument(help="A pickled model whose author you trust.")],
    allow_pickle: Annotated[
        bool, typer.Option("--allow-pickle", help="Yes, run the code in this file.")
    ] = False,
    out: Annotated[Path | None, typer.Option("--out", metavar="F")] = None,
    json: options.Json = False,
) -> None:
    """Take the weights out of a pickled model, in a process of its own, into safetensors."""
    from seprune.checkpoint import convert as carry_out
    from seprune.checkpoint import load_weights

    target = out or file.with_suffix(".safetensors")
    weights = carry_out(file, target) if allow_pickle else load_weights(file)
    if allow_pickle:
        console.tell(f"{len(weights.tensors)} tensors: {target}")
    else:
        console.tell(f"{file}: {len(weights.tensors)} tensors can be read as they are")
    if json:
        console.give({"file": str(target if allow_pickle else file),
                      "tensors": len(weights.tensors), "sha256": weights.sha256})  # fmt: skip
