"""Gates held at their mean and blocks left out: in float64 what the parent would then give."""

from __future__ import annotations

import copy
import json
from dataclasses import replace

import pytest
import torch
from cutting import counted, random_plan
from nets import SE, Inner, Residual, images
from torch import Tensor, nn

from seprune.errors import InputError
from seprune.export.pruned_model import load, save
from seprune.graph.groups import find_structure
from seprune.graph.removable import Removable, find_removable
from seprune.models import build
from seprune.pruning.plan import PruningPlan, plan_of
from seprune.pruning.prune import prune
from seprune.pruning.removals import FrozenGate, Part, Removals
from seprune.recovery.refit import RefitOptions, refit
from seprune.statistics.batches import sample_keys
from seprune.statistics.gate_gradients import objective
from seprune.statistics.removal_losses import removal_losses


def network(model: nn.Module) -> nn.Module:
    torch.manual_seed(0)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2)
            nn.init.uniform_(module.weight, 0.5, 2)
            nn.init.normal_(module.bias)
    return model.double().eval()


def found(model: nn.Module) -> dict[str, Removable]:
    x = images().to(next(model.parameters()).dtype)
    parts = find_removable(model, find_structure(model, x), x)
    return {f"{part.kind} {part.module}": part for part in parts}


def frozen(part: Removable, channels: int) -> FrozenGate:
    mean = torch.rand(channels, generator=torch.Generator().manual_seed(1)).tolist()
    return FrozenGate(part.module, part.layer, part.side, tuple(mean))


def without(model: nn.Module, removed: Removals) -> PruningPlan:
    structure = find_structure(model, images().to(next(model.parameters()).dtype))
    return replace(plan_of(structure.groups, {}, {}), removed=removed)


def held(model: nn.Module, gate: FrozenGate) -> nn.Module:
    """The parent with its gate held at the mean."""
    parent, mean = copy.deepcopy(model), torch.tensor(gate.mean, dtype=torch.float64)
    module = parent.get_submodule(gate.module)
    module.register_forward_hook(lambda _, given, __: given[0] * mean[:, None, None])
    return parent


@pytest.mark.parametrize(
    ("model", "name", "layer", "side", "channels"),
    [
        (Residual(8), "gate blocks.0.se", "blocks.0.bn2", "out", 8),
        (Inner(), "gate se", "project", "in", 12),
    ],
)
def test_a_gate_held_at_its_mean_is_folded_into_a_neighbour(model, name, layer, side, channels):
    model, x = network(model), images().double()
    part = found(model)[name]
    assert (part.layer, part.side) == (layer, side)
    gate = frozen(part, channels)
    small = prune(model, without(model, Removals((gate,))), x)
    torch.testing.assert_close(small(x), held(model, gate)(x), rtol=1e-12, atol=1e-12)
    assert isinstance(small.get_submodule(gate.module), nn.Identity)
    assert not torch.allclose(small(x), model(x))


def test_a_block_that_is_left_out_is_the_parent_with_a_branch_of_zero():
    model, x = network(Residual(8)), images().double()
    # what goes into the first block may be negative, which its ReLU would change
    assert [n for n in found(model) if n.startswith("block")] == ["block blocks.1"]
    small = prune(model, without(model, Removals(blocks=("blocks.1",))), x)
    zero = copy.deepcopy(model)
    nn.init.zeros_(zero.blocks[1].bn2.weight)
    nn.init.zeros_(zero.blocks[1].bn2.bias)
    torch.testing.assert_close(small(x), zero(x), rtol=1e-12, atol=1e-12)
    assert not torch.allclose(small(x), model(x))


class Alone(nn.Module):
    """Gates and blocks that no plan can take out: their insides are read elsewhere, or they are
    called twice, or nothing linear is beside them."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.se, self.twice = nn.Conv2d(3, 8, 1), SE(8), SE(8)
        self.head = nn.Conv2d(8, 3, 1, groups=1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.se(self.conv(x).relu()).relu()  # a ReLU before and after
        return self.head(self.twice(self.twice(y))).mean((2, 3))


def test_gates_without_a_layer_to_hold_their_mean_stay():
    assert found(network(Alone())) == {}


def test_widths_and_parts_go_together():
    model, x = network(Residual(16)), images().double()
    structure, parts = find_structure(model, x), found(model)
    removed = Removals((frozen(parts["gate blocks.0.se"], 16),), ("blocks.1",))
    plan = random_plan(structure)
    both = prune(model, replace(plan, removed=removed), x)
    one = prune(model, without(model, removed), x)
    rest = [g for g in plan.groups if not any(map(removed.covers, (m.layer for m in g.members)))]
    stream = [g for g in plan.groups if any(m.layer == "stem" for m in g.members)]
    cut = {g.name: g.keep for g in (*rest, *stream)}
    apart = find_structure(one, x)
    then = prune(one, plan_of(apart.groups, {g.name: cut[g.name] for g in apart.groups}, {}), x)
    torch.testing.assert_close(both(x), then(x))
    left = structure.without(removed.modules)
    kept = {g.name: len(g.keep) for g in plan.groups}
    assert (left.macs_at(kept), left.params_at(kept)) == counted(both, x)


# -- what is lost ----------------------------------------------------------------------------------


def test_losses_of_the_last_parts_are_the_squared_changes_of_the_projected_outputs():
    """Behind the last block all is linear, so that the first order is everything."""
    model, x = network(Residual(8)), images(6).double()
    x.requires_grad_()
    keys = sample_keys([x], 6, 0)

    def z(own: nn.Module) -> Tensor:
        flat = own(x)
        return torch.stack([objective("logits", flat[i : i + 1], None, keys[i : i + 1])
                            for i in range(6)])  # fmt: skip

    class Open(nn.Module):
        """The last gate in front of a linear head, without the ReLU."""

        def __init__(self) -> None:
            super().__init__()
            self.conv, self.se, self.head = nn.Conv2d(3, 8, 1), SE(8), nn.Conv2d(8, 4, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.se(self.conv(x))).mean((2, 3))

    gated = network(Open())
    structure = find_structure(gated, x.detach()[:2])
    losses = removal_losses(
        gated, [x.detach()[:4], x.detach()[4:]], gates=structure.gates, blocks=()
    )
    features = gated.conv(x)
    gates = gated.se.fc(features.mean((2, 3)))
    torch.testing.assert_close(losses.means["se"], gates.mean(0).detach())
    gate = FrozenGate("se", "head", "in", tuple(gates.mean(0).tolist()))
    change = z(held(gated, gate)) - z(gated)
    assert losses.gates["se"] == pytest.approx(change.square().mean().item())

    losses = removal_losses(model, [x.detach()], gates=(), blocks=("blocks.1",))
    small = prune(model, without(model, Removals(blocks=("blocks.1",))))
    change = z(small) - z(model)
    assert losses.blocks["blocks.1"] == pytest.approx(change.square().mean().item())


# -- as data ---------------------------------------------------------------------------------------


def test_a_saved_network_without_parts_is_loaded_and_replayed(tmp_path):
    model = build("seprune/se_resnet8", input=(1, 8, 8)).eval()
    x = torch.rand(4, 1, 8, 8)
    structure = find_structure(model, x)
    parts = find_removable(model, structure, x)
    gate = next(part for part in parts if part.kind == "gate")
    removed = Removals((frozen(gate, model.get_submodule(gate.layer).weight.shape[0]),))
    plan = replace(random_plan(structure), removed=removed)
    path = tmp_path / "plan.json"
    plan.save(path)
    assert PruningPlan.load(path).removed == removed
    small = refit(
        model, prune(model, plan, x), plan, [x], options=RefitOptions(images=4, device="cpu")
    ).model
    save(small, tmp_path / "small")
    again = load(tmp_path / "small")
    torch.testing.assert_close(again(x), small(x), rtol=0, atol=0)
    assert not any(name.startswith(gate.module) for name in again.state_dict())


@pytest.mark.parametrize(
    ("removed", "why"),
    [
        ([3], "removed: expected object, got array"),
        ({"gates": 3}, "removed.gates: expected array, got int"),
        ({"blocks": [3]}, r"removed.blocks\[0\]: expected str, got int"),
        ({"gates": [{"module": "a"}]}, r"removed.gates\[0\]: object missing required field"),
        (
            {"gates": [{"module": "a", "layer": "b", "side": "up", "mean": [1]}]},
            r"removed.gates\[0\].side: invalid enum value 'up'",
        ),
        (
            {"gates": [{"module": "a", "layer": "b", "side": "in", "mean": [1e999]}]},
            "the mean of gate a is not finite",
        ),
    ],
)
def test_an_impossible_edit_is_named(tmp_path, removed, why):
    plan = without(network(Residual(8)), Removals(blocks=("blocks.1",)))
    content = json.loads(plan.dumps()) | {"removed": removed}
    with pytest.raises(InputError, match=why) as caught:
        PruningPlan.loads(content, path=tmp_path / "plan.json")
    assert caught.value.code == "plan"


@pytest.mark.parametrize(
    "removed",
    [
        Removals(blocks=("blocks.7",)),
        Removals((FrozenGate("blocks.0.se", "blocks.0.bn2", "out", (1.0,) * 7),)),
        Removals((FrozenGate("blocks.0.se", "nowhere", "out", (1.0,) * 8),)),
    ],
)
def test_parts_of_another_model_are_refused(removed):
    model = network(Residual(8))
    with pytest.raises(InputError, match="does not fit the model: gates and blocks"):
        prune(model, without(model, removed))


def test_names_of_parts_tell_them_from_groups():
    part = Part("block blocks.1", "blocks.1", 0.5)
    assert Removals.of_parts([part]) == Removals(blocks=("blocks.1",))
    assert Removals.of_parts([part]).covers("blocks.1.conv1")
    assert not Removals.of_parts([part]).covers("blocks.10")
