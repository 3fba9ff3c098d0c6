"""One process of test_recovery_processes.py: a plan chosen, refitted, reconstructed."""

import json
import os
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

import seprune
from seprune.recovery.candidates import TrialOptions, choose_plan
from seprune.recovery.reconstruct import ReconstructOptions, reconstruct
from seprune.recovery.refit import RefitOptions, refit


def network() -> nn.Module:
    torch.manual_seed(0)
    return (
        nn.Sequential(
            nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.SiLU(),
            nn.Conv2d(16, 16, 3, padding=1), nn.SiLU(),
            nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 5),
        )
        .double()
        .eval()
    )  # fmt: skip


def images(count: int) -> Tensor:
    return torch.randn(count, 3, 8, 8, generator=torch.Generator().manual_seed(1)).double()


def recover(folder: Path) -> None:
    """95 images, steps of 21: nothing divides by 2 or 3."""
    parent, loader = network(), list(images(95).split(10))
    structure = seprune.analyse(parent, loader[0][:2])
    plans = {}
    for name in ("l2", "l1", "uniform"):
        scores = seprune.score(structure, None, model=parent, scoring=seprune.Scoring(name))
        plans[name] = seprune.make_plan(structure, scores, macs=0.5)
    options = TrialOptions(images=40, held_out=20, device="cpu")
    choice = choose_plan(parent, plans, loader, options=options)
    small = seprune.prune(parent, choice.plan, loader[0][:2])
    fitted = refit(
        parent, small, choice.plan, loader, options=RefitOptions(device="cpu", precision="float64")
    )
    training = ReconstructOptions(
        epochs=4, lr=3e-3, batch_size=21, device="cpu", folder=folder / "state"
    )
    made = reconstruct(parent, small, choice.plan, loader, options=training)
    if os.environ.get("RANK", "0") == "0":
        found = {
            "chosen": choice.name,
            "trials": [[t.name, t.error, t.images] for t in choice.trials],
            "refit": sorted(fitted.errors.items()),
            "errors": made.errors,
            "best": made.best,
        }
        (folder / "found.json").write_text(json.dumps(found))
        save_file(made.model.state_dict(), folder / "model.safetensors")


if __name__ == "__main__":
    recover(Path(sys.argv[1]))
