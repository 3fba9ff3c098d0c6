"""Calls that the type checker must refuse, each on the line that says so; never run."""

import torch
from torch import nn

import seprune

MODEL, IMAGES = nn.Identity(), torch.zeros(1)

seprune.pruen(1, 2)  # wrong
seprune.prune(42, "x", nonsense=True)  # wrong
seprune.analyse("timm/seresnet50", IMAGES)  # wrong
seprune.collect_statistics(MODEL, [IMAGES], gradients="logit")  # wrong
seprune.Scoring(criterion=3)  # wrong
seprune.RefitOptions(image=64)  # wrong
seprune.make_plan(MODEL, {}, macs=0.5)  # wrong
seprune.evaluate([IMAGES], MODEL)  # wrong
seprune.save("folder", MODEL)  # wrong
seprune.compress(MODEL, [IMAGES], recover="magic", macs=0.5)  # wrong
x: int = seprune.load("folder")  # wrong
seprune.InputError("what", wy="why")  # wrong
