"""Gates as people write them: found, right values, right derivatives, right cuts."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from cutting import masked, random_plan
from masked_reads import masked_reads
from torch import Tensor, nn
from user_spellings import SPREAD, USERS, C

import seprune
from seprune.graph.hooks import watch


class Frame(nn.Module):
    """conv -> gate -> conv -> classes."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.gate = USERS[name]()
        conv = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[self.gate.dims - 1]
        self.conv, self.head = conv(3, C, 3, padding=1), conv(C, 6, 3, padding=1)
        self.fc = nn.Linear(6, 4)

    def features(self, x: Tensor) -> Tensor:
        return self.conv(x).relu()

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.head(self.gate(self.features(x))).relu().flatten(2).mean(2))


@pytest.fixture(params=USERS)
def frame(request: pytest.FixtureRequest) -> tuple[str, Frame, Tensor]:
    torch.manual_seed(8)
    model = Frame(request.param).double().eval()
    x = torch.rand(5, 3, *(7, 6, 5)[: model.gate.dims], dtype=torch.double)
    return request.param, model, x


def test_values_derivatives_and_cuts(frame: tuple[str, Frame, Tensor]) -> None:
    name, model, x = frame
    structure = seprune.analyse(model, x[:2])
    seen: list[Tensor] = []
    with torch.no_grad(), watch(model, structure.gates, lambda _, gate, __: seen.append(gate)):
        model(x)
        closed = model.gate.closed(model.features(x))
    assert any(g.shape == closed.shape and torch.allclose(g, closed, atol=1e-9) for g in seen)
    group = next(g for g in structure.groups if g.name == "conv")
    assert group.prunable, group.reason
    assert group.gates
    assert name in SPREAD or {s.kind for s in group.sources} == {"gate"}

    y = torch.arange(len(x)) % 4
    found = seprune.collect_statistics(model, [(x, y)], structure=structure, gradients="labels")
    right = masked_reads(
        model, structure, x, lambda out, i: F.cross_entropy(out, y[i : i + 1])
    )["conv"].square()  # fmt: skip
    torch.testing.assert_close(
        found.groups["conv"]["effect_square"].double(), right.mean(0), rtol=1e-4, atol=1e-15
    )

    plan = random_plan(structure)
    small = seprune.prune(model, plan)
    assert small.conv.out_channels < C
    with torch.no_grad():
        torch.testing.assert_close(small(x), masked(model, plan)(x), rtol=1e-11, atol=1e-12)
