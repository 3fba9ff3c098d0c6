"""One layer cut by hand, and gate statistics inside torch-pruning's own pruners."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
import torch_pruning as tp
from nets import Residual, dependent, images
from torch import Tensor, nn

from seprune.errors import InputError
from seprune.integrations.torch_pruning import GateImportance
from seprune.pruning.analyse import analyse
from seprune.pruning.plan import plan_of
from seprune.pruning.prune import prune
from seprune.pruning.surgery import cut_layer
from seprune.statistics import CollectOptions, GateStatistics, collect_statistics


def keep(**sides: list[int]) -> dict[str, Tensor]:
    return {side: torch.tensor(stay) for side, stay in sides.items()}


# -- layers ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [nn.Conv1d, nn.Conv2d, nn.Conv3d])
def test_a_convolution_keeps_rows_and_columns(kind):
    model = nn.Sequential(kind(4, 6, 3))
    weight, bias = model[0].weight.detach().clone(), model[0].bias.detach().clone()
    cut_layer(model, "0", keep(out=[0, 5], **{"in": [1, 2, 3]}))
    assert torch.equal(model[0].weight, weight[[0, 5]][:, [1, 2, 3]])
    assert torch.equal(model[0].bias, bias[[0, 5]])
    assert (model[0].in_channels, model[0].out_channels) == (3, 2)


def test_a_transposed_convolution_has_its_sides_the_other_way_round():
    model = nn.Sequential(nn.ConvTranspose2d(4, 6, 3))
    weight = model[0].weight.detach().clone()
    cut_layer(model, "0", keep(out=[0, 5], **{"in": [1, 2, 3]}))
    assert torch.equal(model[0].weight, weight[[1, 2, 3]][:, [0, 5]])


def test_conv_groups_go_whole_or_lose_the_same_number_each():
    whole = nn.Sequential(nn.Conv2d(6, 9, 1, groups=3))
    weight = whole[0].weight.detach().clone()
    cut_layer(whole, "0", keep(out=[0, 1, 2, 6, 7, 8], **{"in": [0, 1, 4, 5]}))
    assert (whole[0].groups, whole[0].in_channels, whole[0].out_channels) == (2, 4, 6)
    assert torch.equal(whole[0].weight, weight[[0, 1, 2, 6, 7, 8]])
    within = nn.Sequential(nn.Conv2d(6, 4, 1, groups=2))
    weight = within[0].weight.detach().clone()
    cut_layer(within, "0", keep(out=[1, 3], **{"in": [0, 2, 4, 5]}))  # other channels in each
    assert within[0].groups == 2
    assert torch.equal(within[0].weight, torch.stack([weight[1, [0, 2]], weight[3, [1, 2]]]))


def test_a_channel_multiplier_is_cut_by_its_outputs():
    model = nn.Sequential(nn.Conv2d(4, 8, 3, groups=4))
    weight = model[0].weight.detach().clone()
    cut_layer(model, "0", keep(out=[2, 3, 6, 7]))
    assert (model[0].groups, model[0].in_channels, model[0].out_channels) == (2, 2, 4)
    assert torch.equal(model[0].weight, weight[[2, 3, 6, 7]])


@pytest.mark.parametrize(
    "norm",
    [nn.BatchNorm2d(6), nn.GroupNorm(3, 6), nn.LayerNorm(6), nn.InstanceNorm2d(6, affine=True),
     nn.BatchNorm2d(6, affine=False), nn.LayerNorm(6, elementwise_affine=False), nn.PReLU(6)],
    ids=lambda n: type(n).__name__,
)  # fmt: skip
def test_norms_keep_their_parameters_and_buffers(norm):
    model = nn.Sequential(norm)
    before = {n: t.clone() for n, t in model.state_dict().items()}
    cut_layer(model, "0", keep(out=[1, 3, 5]))
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name][[1, 3, 5]] if before[name].dim() else before[name])
    x = torch.rand(2, 3, 3, 3)
    assert model.eval()(x).shape == x.shape


def test_bare_parameters_and_buffers():
    model = nn.Module()
    model.inner = nn.Module()
    model.inner.scale = nn.Parameter(torch.arange(4.0).view(1, 4, 1), requires_grad=False)
    model.inner.register_buffer("table", torch.arange(4.0))
    cut_layer(model, "inner.scale", keep(dim1=[0, 3]))
    cut_layer(model, "inner.table", keep(dim0=[1]))
    assert model.inner.scale.flatten().tolist() == [0, 3]
    assert not model.inner.scale.requires_grad
    assert model.inner.table.tolist() == [1]


def test_a_layer_of_another_kind_is_named():
    model = nn.Sequential(nn.Embedding(4, 4))
    with pytest.raises(InputError) as caught:
        cut_layer(model, "0", keep(out=[0]))
    assert str(caught.value) == (
        "layer '0' of type Embedding cannot be cut\n"
        "why: seprune cuts convolutions, linear layers and normalisations\n"
        "next: protect it: plan.protect=['0']"
    )


# -- inside torch-pruning --------------------------------------------------------------------------


def collected(model: nn.Module) -> GateStatistics:
    return collect_statistics(model, [images(4, 16)], options=CollectOptions(device="cpu"))


def pruned(model: nn.Module, statistics: GateStatistics, **how: str) -> nn.Module:
    pruner = tp.pruner.BasePruner(
        model, images(), importance=GateImportance(statistics, **how), pruning_ratio=0.5,
        ignored_layers=[model.fc], in_channel_groups={}, out_channel_groups={}, num_heads={},
    )  # fmt: skip
    pruner.step()
    return model


def test_gates_that_share_a_group_are_averaged():
    model = dependent("residual")
    statistics = collected(model)
    means = [statistics.values[f"blocks.{i}.se"]["maximum"] for i in range(2)]
    best = torch.stack(means).mean(0).topk(4).indices.sort().values
    weight = model.fc.weight.detach().clone()
    small = pruned(model, statistics, statistic="maximum")
    assert torch.equal(small.fc.weight, weight[:, best])
    assert small.blocks[0].conv1.out_channels == 4  # no gate: by the magnitude of its weights


def test_two_pruners_do_not_share_their_settings():
    for _ in range(2):
        model = Residual().eval()
        assert pruned(model, collected(model)).stem.out_channels == 4


class NormByName(nn.Module):
    """A norm whose weight the forward also reads by name, as NAM attention does."""

    def __init__(self, conv_too: bool = False) -> None:
        super().__init__()
        self.conv_too = conv_too
        self.c, self.bn = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.d, self.fc = nn.Conv2d(8, 6, 1), nn.Linear(6, 4)
        nn.init.uniform_(self.bn.weight, 0.5, 1.5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.c(x)
        if self.conv_too:
            x = x / self.c.weight.square().sum((1, 2, 3)).sqrt()[:, None, None]
        x = x * (self.bn(x) * self.bn.weight.abs()[:, None, None]).sigmoid()
        return self.fc(self.d(x).relu().mean((2, 3)))


@pytest.mark.parametrize("conv_too", [False, True])
def test_a_weight_that_is_read_by_name_as_well_is_cut_once(conv_too):
    torch.manual_seed(0)
    model, x = NormByName(conv_too).eval().double(), torch.rand(3, 3, 8, 8).double()
    structure = analyse(model, x)
    (group,) = (g for g in structure.groups if g.name == "c")
    assert (group.prunable, group.caveat) == (True, None)
    keep = {"c": [0, 2, 3, 5, 7], "d": [0, 1, 2, 4]}
    plan = plan_of(structure.groups, keep, {})
    small = prune(model, plan)
    assert (len(small.bn.weight), small.c.out_channels) == (5, 5)
    params = 3 * 9 * 5 + 5 + 2 * 5 + 5 * 4 + 4 + 4 * 4 + 4
    assert structure.params_at({"c": 5, "d": 4, "fc": 4}) == params
    assert sum(p.numel() for p in small.parameters()) == params
    model.d.weight.data[:, [1, 4, 6]] = 0
    model.fc.weight.data[:, [3, 5]] = 0
    torch.testing.assert_close(small(x), model(x), rtol=1e-12, atol=1e-12)


class Halves(nn.Conv2d):
    """Uses the first half of its filters on the map and the second on a smaller one."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        half = len(self.weight) // 2
        small = F.avg_pool2d(x, 2)
        return F.conv2d(x, self.weight[:half]), F.conv2d(small, self.weight[half:])


def test_parameters_of_a_convolution_whose_weight_is_used_in_slices_are_counted():
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.halves = nn.Conv2d(3, 10, 1), Halves(10, 8, 3, bias=False)
            self.fc = nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            large, small = self.halves(self.a(x).relu())
            return self.fc(large.mean((2, 3)) + small.mean((2, 3)))

    structure = analyse(Net(), torch.rand(2, 3, 8, 8))
    keep = {
        g.name: list(range(4)) if g.name == "a" else list(range(g.units)) for g in structure.groups
    }
    small = prune(Net(), plan_of(structure.groups, keep, {}))
    assert small.a.out_channels == 4
    params = 4 * 4 + 8 * 4 * 9 + 4 * 2 + 2
    assert structure.params_at({name: len(own) for name, own in keep.items()}) == params
    assert sum(p.numel() for p in small.parameters()) == params


class Rearranged(nn.Module):
    def __init__(self, how: str) -> None:
        super().__init__()
        mode = "circular" if how == "circular" else "zeros"
        self.how, self.a = how, nn.Conv2d(3, 16, 3, padding=1, padding_mode=mode)
        self.shuffle, self.unshuffle = nn.PixelShuffle(2), nn.PixelUnshuffle(2)
        self.b = nn.Conv2d({"shuffle": 4, "unshuffle": 64}.get(how, 16), 6, 3, padding_mode=mode,
                           padding=1)  # fmt: skip
        self.c = nn.Conv2d(6, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x).relu()
        if self.how == "channels":
            x = F.channel_shuffle(x, 2)
        x = self.shuffle(x) if self.how == "shuffle" else x
        x = self.unshuffle(x) if self.how == "unshuffle" else x
        return self.c(self.b(x).relu()).mean((2, 3))


@pytest.mark.parametrize(
    ("how", "units"), [("shuffle", 4), ("unshuffle", 16), ("channels", 8), ("circular", 16)]
)
def test_shuffles_and_circular_padding_are_followed(how, units):
    torch.manual_seed(0)
    model, x = Rearranged(how).eval().double(), torch.rand(2, 3, 8, 8).double()
    structure = analyse(model, x)
    assert [(g.units, g.prunable) for g in structure.groups[:2]] == [(units, True), (6, True)]
    keep = [u for u in range(units) if u % 3]
    plan = plan_of(structure.groups, {"a": keep, "b": [0, 2, 3, 5]}, {})
    small = prune(model, plan)
    index = plan.layers()["b"]["in"]
    gone = sorted(set(range(model.b.in_channels)) - set(index.tolist()))
    assert len(gone) == model.b.in_channels * (units - len(keep)) // units
    model.b.weight.data[:, gone] = 0
    model.c.weight.data[:, [1, 4]] = 0
    torch.testing.assert_close(small(x), model(x), rtol=1e-12, atol=1e-12)
