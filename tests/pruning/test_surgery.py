"""One layer cut by hand, and gate statistics inside torch-pruning's own pruners."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import torch_pruning as tp
from nets import Residual, dependent, images
from torch import Tensor, nn

from seprune.errors import InputError
from seprune.integrations.torch_pruning import GateImportance
from seprune.pruning.surgery import cut_layer
from seprune.statistics import CollectOptions, GateStatistics, collect_statistics


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    """Small inputs gain nothing from threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


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


def test_bare_parameters_buffers_and_attributes():
    model = nn.Module()
    model.inner = nn.Module()
    model.inner.scale = nn.Parameter(torch.arange(4.0).view(1, 4, 1), requires_grad=False)
    model.inner.register_buffer("table", torch.arange(4.0))
    model.inner.parts, model.inner.half = (2, 4), 3
    cut_layer(model, "inner.scale", keep(dim1=[0, 3]))
    cut_layer(model, "inner.table", keep(dim0=[1]))
    cut_layer(model, "inner", {".parts[1]": torch.arange(3), ".half": torch.arange(2)})
    assert model.inner.scale.flatten().tolist() == [0, 3]
    assert not model.inner.scale.requires_grad
    assert model.inner.table.tolist() == [1]
    assert (model.inner.parts, model.inner.half) == ((2, 3), 2)


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


def test_two_pruners_do_not_share_what_they_are_told():
    for _ in range(2):
        model = Residual().eval()
        assert pruned(model, collected(model)).stem.out_channels == 4
