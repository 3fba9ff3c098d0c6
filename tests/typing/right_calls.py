"""Calls that the type checker accepts; never run."""

import torch
from torch import nn

import seprune


def right(model: nn.Module, loader: list[torch.Tensor], images: torch.Tensor) -> None:
    structure: seprune.NetworkStructure = seprune.analyse(model, images)
    gates: tuple[seprune.Gate, ...] = structure.gates
    group: seprune.ChannelGroup = structure.groups[0]
    statistics: seprune.GateStatistics = seprune.collect_statistics(
        model, loader, structure=structure
    )
    importance: seprune.Importance = seprune.score(
        structure, statistics, scoring=seprune.Scoring("gate_mean")
    )
    plan: seprune.PruningPlan = seprune.make_plan(structure, importance, macs=0.5)
    small: nn.Module = seprune.prune(model, plan)
    refitted: seprune.Refitted = seprune.refit(
        model, small, plan, loader, options=seprune.RefitOptions(images=64)
    )
    tuned: seprune.FineTuned = seprune.finetune(
        refitted.model, loader, seprune.FineTuneSettings(epochs=1), teacher=seprune.Teacher(model)
    )
    found: seprune.Evaluation = seprune.evaluate(tuned.model, loader)
    seprune.save(tuned.model, "folder")
    again: nn.Module = seprune.load("folder")
    done: seprune.Compressed = seprune.compress(again, loader, macs=0.5)
    try:
        seprune.run(seprune.load_recipe("quickstart"), out=__import__("pathlib").Path("runs"))
    except (seprune.UsageError, seprune.InputError, seprune.EnvironmentFault) as error:
        print(error.fix, error.exit_status, gates, group, found, done.plan)
