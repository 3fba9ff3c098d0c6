"""Rules for operators in small networks: cut ones compute what their masked parents do."""

from collections.abc import Callable

import operators
import pytest
import torch
import torch.nn.functional as F
from cutting import masked, random_plan
from torch import Tensor, nn
from torchvision.ops import roi_align, roi_pool

from seprune import analyse, prune
from seprune.graph.op_rules.registry import RULES
from seprune.graph.op_rules.whole import WHOLE, why_whole

C = 12


class Between(nn.Module):
    """A function between two convolutions."""

    def __init__(self, function: Callable[[Tensor], Tensor], dims: int, made: int) -> None:
        super().__init__()
        kind = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}[dims]
        self.first, self.second = kind(2, C, 3, padding=1), kind(made, 3, 1)
        self.other = kind(2, C, 1)
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x)
        takes = self.function.__code__.co_argcount
        y = self.function(y, self.other(x)) if takes == 2 else self.function(y)
        return self.second(y).flatten(2).mean(2)


BOXES = torch.tensor([[0, 0, 0, 3, 3], [1, 1, 1, 4, 4.0], [0, 2, 0, 5, 3]], dtype=torch.double)


def _levels(y: Tensor, z: Tensor) -> Tensor:
    """Boxes of two maps in one tensor, as torchvision pools them."""
    made = torch.zeros(3, y.shape[1], 2, 2, dtype=y.dtype)
    for level, features in enumerate((y, z)):
        (where,) = torch.where(BOXES[:, 0] == level)
        made[where] = roi_align(features, BOXES[where], 2)
    return made


def _windows(y: Tensor) -> Tensor:
    return y.unfold(2, 2, 2).mean(-1)


def _most(y: Tensor) -> Tensor:
    values, index = y.flatten(2).topk(4, dim=2)
    return (values + y.flatten(2).gather(2, index)).unflatten(2, (2, 2))


def _scattered(y: Tensor) -> Tensor:
    flat = y.flatten(2)
    index = torch.arange(flat.shape[2]).flip(0).expand_as(flat)
    return torch.zeros_like(flat).scatter(2, index, flat).view_as(y)


def _spectrum(y: Tensor) -> Tensor:
    return torch.fft.irfft2(torch.fft.rfft2(y) * 0.5, s=y.shape[-2:])


def _masked(y: Tensor) -> Tensor:
    y = y.clone()
    y[:, :, torch.tensor([0, 2])] = y[:, :, torch.tensor([1, 3])]
    return y


def _unpooled(y: Tensor) -> Tensor:
    values, index = F.max_pool2d(y, 2, return_indices=True)
    return F.max_unpool2d(values, index, 2)


FOLLOWED: dict[str, tuple[Callable[..., Tensor], int, int]] = {
    "roi_align": (lambda y: roi_align(y, BOXES, 2), 2, C),
    "roi_pool": (lambda y: roi_pool(y, BOXES, 2), 2, C),
    "boxes of two levels": (_levels, 2, C),
    "topk and gather": (_most, 2, C),
    "sort": (lambda y: y.sort(dim=2, descending=True)[0], 2, C),
    "scatter": (_scattered, 2, C),
    "index of positions": (lambda y: y[:, :, torch.tensor([3, 0, 2])], 2, C),
    "index of samples": (lambda y: y[torch.tensor([1, 0])], 2, C),
    "two indices": (lambda y: y[:, :, torch.tensor([0, 1]), torch.tensor([2, 3])], 1, C),
    "mask of positions": (lambda y: y[:, :, torch.eye(6, 6) > 0], 1, C),
    "index_put": (_masked, 2, C),
    "index_select": (lambda y: y.index_select(3, torch.tensor([0, 4])), 2, C),
    "unfold": (_windows, 2, C),
    "glu": (lambda y: F.glu(y, 1), 2, C // 2),
    "fft": (_spectrum, 2, C),
    "complex": (lambda y: torch.view_as_real(torch.complex(y, 2 * y)).sum(-1), 2, C),
    "im2col and col2im": (
        lambda y: F.fold(F.unfold(y, 2, stride=2), y.shape[2:], 2, stride=2) + y, 2, C),
    "unfolded channels": (lambda y: F.unfold(y, 2).unflatten(2, (5, 5)), 2, 4 * C),
    "folded channels": (lambda y: F.fold(y.flatten(2), (12, 12), 2, stride=2), 2, C // 4),
    "max_unpool2d": (_unpooled, 2, C),
    "nearest-exact": (lambda y: F.interpolate(y, scale_factor=2, mode="nearest-exact"), 2, C),
    "pad in 3-d": (lambda y: F.pad(y, (1, 1, 1, 1, 1, 1), mode="reflect"), 3, C),
    "tril": (lambda y: torch.tril(y), 2, C),
    "extremes": (
        lambda y: y - torch.aminmax(y.flatten(2), dim=2)[0][..., None, None]
        + torch.var_mean(y, (2, 3), keepdim=True)[0], 2, C),
    "argmax": (lambda y: y * torch.argmax(y.flatten(2), 2)[..., None, None], 2, C),
    "cummax": (lambda y: torch.cummax(y, 2)[0], 2, C),
    "binary": (lambda y, z: torch.hypot(torch.fmax(y, z), torch.fmod(z, y)), 2, C),
    "unary": (lambda y: torch.atan(y).cosh().log2() + torch.special.i0e(y) + y.erfc(), 2, C),
    "nansum": (lambda y: y * y.nansum((2, 3), keepdim=True), 2, C),
}  # fmt: skip


@pytest.mark.parametrize("what", FOLLOWED)
def test_channels_are_followed_through(what):
    function, dims, made = FOLLOWED[what]
    torch.manual_seed(0)
    sides = 1 if what in ("two indices", "mask of positions") else 0
    model = Between(function, 2 if sides else dims, made).double().eval()
    if sides:  # two dimensions of positions become one
        model.second = nn.Conv1d(C, 3, 1).double()
    x = torch.rand(2, 2, *[6] * (2 if sides else dims)).double()
    structure = analyse(model, x)
    (group,) = (g for g in structure.groups if g.name == "first")
    assert group.prunable, group.reason
    assert group.units == {"glu": C // 2, "folded channels": C // 4}.get(what, C)
    for seed in range(2):
        plan = random_plan(structure, seed)
        small = prune(model, plan)
        assert small.first.out_channels < C
        with torch.no_grad():
            torch.testing.assert_close(
                small(x), masked(model, plan)(x), rtol=1e-12, atol=1e-12, equal_nan=True
            )


REFUSED: dict[str, tuple[Callable[[Tensor], Tensor], str]] = {
    "sort": (lambda y: y.sort(dim=1)[0], "sort in the model: channels change their order"),
    "topk": (lambda y: y.topk(C, dim=1)[0], "topk in the model: channels change their order"),
    "index": (lambda y: y[:, list(range(C))], "index in the model: channels are picked by number"),
    "argmax": (
        lambda y: y * y.argmax(1, keepdim=True),
        "argmax in the model: its result is the number of a channel",
    ),
    "fft": (
        lambda y: torch.fft.fft(y, dim=1).real,
        "_fft_r2c in the model: channels change their order",
    ),
    "attention": (
        lambda y: F.scaled_dot_product_attention(*[y.flatten(2).mT[:, None].contiguous()] * 3)[
            :, 0
        ].mT.view_as(y),
        "attention sums products of channels",
    ),
    "cdist": (
        lambda y: y * torch.cdist(y.flatten(2), y.flatten(2)).mean((1, 2))[:, None, None, None],
        "products of channels with channels",
    ),
}


@pytest.mark.parametrize("what", REFUSED)
def test_channels_that_cannot_be_followed_stay_whole_with_a_reason(what):
    function, reason = REFUSED[what]
    torch.manual_seed(0)
    model = Between(function, 2, C).eval()
    (group,) = (g for g in analyse(model, torch.rand(2, 2, 6, 6)).groups if g.name == "first")
    assert not group.prunable
    assert reason in group.reason


def test_every_operator_of_torch_and_torchvision_has_a_rule_or_a_reason():
    names = operators.recorded()
    assert len(names) > 900
    assert [n for n in names if operators.rule_of(n) is None and why_whole(n) is None] == []
    assert why_whole("an_operator_of_next_year") is None
    assert why_whole("_flash_attention_forward") == next(r for r in WHOLE if "attention" in r)
    assert why_whole("nonzero") == "how many results there are depends on values"


def test_the_table_of_operators_is_what_the_rules_say():
    assert operators.TABLE.read_text() == operators.rendered()
    rows = operators.rendered().splitlines()
    (row,) = (r for r in rows if "`roi_align`" in r)
    assert row.startswith("| RoIAlign and RoIPool")
    assert all(any(f"`{n}`" in r for r in rows) for n in RULES if n != "write_into_view")
