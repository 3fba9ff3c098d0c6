"""Closed-form recovery: exact where it can be, better where it cannot."""

import copy
import threading
from dataclasses import replace

import pytest
import torch
from nets import Inner, Residual, images
from torch import nn

from seprune.errors import EnvironmentFault, InputError, UsageError
from seprune.graph.groups import find_structure
from seprune.pruning.plan import plan_of
from seprune.pruning.prune import prune
from seprune.recovery.refit import RefitOptions, network, refit
from seprune.recovery.refit.network import Refitter
from seprune.recovery.refit.products import MatrixProduct
from seprune.recovery.refit.targets import TargetFinder

EXACT = RefitOptions(ridge=1e-12, precision="float64", device="cpu")
CPU = RefitOptions(device="cpu")


class Pair(nn.Module):
    """Two layers; the second half of the first one's channels is a mixture of the first half."""

    def __init__(self, first: nn.Module, second: nn.Module) -> None:
        super().__init__()
        self.first, self.second = first, second

    def forward(self, x):
        return self.second(self.first(x))


def dependent(first, second):
    """`first` without bias, its upper channels exact linear combinations of its lower ones."""
    with torch.no_grad():
        half = len(first.weight) // 2
        mix = torch.randn(half, half)
        first.weight[half:] = (mix @ first.weight[:half].flatten(1)).view_as(first.weight[half:])
    return Pair(first, second).eval()


def halved(model, x):
    """The plan that keeps the lower half of every group, and the cut network."""
    groups = find_structure(model, x).groups
    plan = plan_of(groups, {g.name: range(g.units // 2) for g in groups if g.prunable}, {})
    return plan, prune(model, plan)


def seeded(make):
    torch.manual_seed(0)
    return make()


def distance(a, b, x):
    with torch.no_grad():
        return float((a(x) - b(x)).square().mean())


@pytest.mark.parametrize(
    "second",
    [
        lambda: nn.Conv2d(8, 5, 3, padding=1),
        lambda: nn.Conv2d(8, 5, 3, stride=2, dilation=2, bias=False),
        lambda: nn.Conv2d(8, 5, 3, padding="same", padding_mode="reflect"),
        lambda: nn.Conv2d(8, 5, 1, stride=2),
        lambda: nn.Conv2d(8, 5, (1, 3)),
    ],
)
def test_what_is_a_linear_combination_of_the_kept_channels_is_recovered(second):
    model = seeded(lambda: dependent(nn.Conv2d(3, 8, 1, bias=False), second()))
    x = torch.randn(32, 3, 9, 9)
    plan, small = halved(model, x)
    result = refit(model, small, plan, [x], options=EXACT)
    assert distance(model, small, x) > 1e-2
    assert distance(model, result.model, x) < 1e-9
    assert result.layers == ("second",)
    assert result.skipped == {}
    before, after = result.errors["second"]
    assert after < 1e-9 < 1e-2 < before


@pytest.mark.parametrize("shape", [(64, 6), (16, 5, 6)])
def test_a_linear_layer_on_rows_or_tokens_is_recovered(shape):
    model = seeded(lambda: dependent(nn.Linear(6, 8, bias=False), nn.Linear(8, 3)))
    x = torch.randn(shape)
    plan, small = halved(model, x)
    result = refit(model, small, plan, [x], options=EXACT)
    assert distance(model, small, x) > 1e-2
    assert distance(model, result.model, x) < 1e-9


def test_a_one_dimensional_convolution_is_recovered():
    model = seeded(lambda: dependent(nn.Conv1d(3, 8, 1, bias=False), nn.Conv1d(8, 4, 3, padding=1)))
    x = torch.randn(32, 3, 12)
    plan, small = halved(model, x)
    assert distance(model, refit(model, small, plan, [x], options=EXACT).model, x) < 1e-9


def test_a_mean_that_was_cut_away_goes_into_the_norm_behind_a_layer_without_bias():
    model = seeded(
        lambda: Pair(
            nn.Conv2d(3, 4, 1),
            nn.Sequential(nn.Conv2d(4, 5, 1, bias=False), nn.BatchNorm2d(5)),
        )
    ).eval()
    with torch.no_grad():  # the upper channels are constant: only the intercept can replace them
        model.first.weight[2:] = 0
        model.first.bias[2:] = 3
    x = torch.randn(16, 3, 4, 4)
    plan, small = halved(model, x)
    result = refit(model, small, plan, [x], options=EXACT)
    assert distance(model, small, x) > 1e-2
    assert distance(model, result.model, x) < 1e-9
    assert not torch.equal(result.model.second[1].running_mean, small.second[1].running_mean)


def test_depthwise_and_grouped_convolutions_make_up_for_the_errors_before_them():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem = nn.Conv2d(3, 8, 1, bias=False)
            self.mix = nn.Conv2d(8, 8, 1, bias=False)
            self.depthwise = nn.Conv2d(8, 8, 3, padding=1, groups=8)
            self.grouped = nn.Conv2d(8, 8, 3, padding=1, groups=2)
            self.head = nn.Conv2d(8, 3, 1)

        def forward(self, x):
            return self.head(self.grouped(self.depthwise(self.mix(self.stem(x)))))

    model, x = seeded(Net).eval(), torch.randn(64, 3, 6, 6)
    plan, small = halved(model, x)
    result = refit(model, small, plan, [x], options=CPU)
    assert result.layers == ("mix", "depthwise", "grouped", "head")
    assert all(after <= before + 1e-12 for before, after in result.errors.values())
    assert distance(model, result.model, x) < 0.7 * distance(model, small, x)


@pytest.mark.parametrize("make", [Residual, Inner])
def test_networks_with_gates_come_closer_to_their_parent(make):
    model, x = seeded(make).eval(), images(64, 12)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.running_mean, -0.2, 0.2)
            nn.init.uniform_(module.bias, -0.2, 0.2)
    plan, small = halved(model, x)
    result = refit(model, small, plan, [x], options=CPU)
    unseen = images(32, 12, seed=1)
    assert distance(model, result.model, unseen) < 0.5 * distance(model, small, unseen)
    assert result.skipped == {}


def test_the_split_into_batches_does_not_matter_and_labels_are_not_needed():
    model, x = seeded(Residual).eval(), images(24, 12)
    plan, small = halved(model, x)
    loaders = ([x], list(x.split(5)), [(b, torch.zeros(len(b)).long()) for b in x.split(8)])
    states = [
        refit(model, small, plan, loader, options=CPU).model.state_dict() for loader in loaders
    ]
    for other in states[1:]:
        assert all(torch.equal(states[0][name], other[name]) for name in other)


def test_several_networks_fitted_together_are_those_fitted_one_by_one():
    model, x = seeded(Residual).eval(), images(24, 12)
    groups = [g for g in find_structure(model, x).groups if g.prunable]
    kept = (lambda n: range(n // 2), lambda n: range(1, n), lambda n: range(n // 4, n))
    plans = [plan_of(groups, {g.name: keep(g.units) for g in groups}, {}) for keep in kept]
    together = Refitter(model, plans, [x], options=CPU)
    assert together.parent.several
    for plan in plans:
        small = prune(model, plan)
        alone, found = refit(model, small, plan, [x], options=CPU), together(small, plan)
        assert found.errors == alone.errors
        assert all(
            torch.equal(a, b) for a, b in zip(found.model.parameters(), alone.model.parameters())
        )


def test_progress_tells_the_layer_images_a_second_and_the_time_left(monkeypatch):
    clock = iter(range(0, 10_000, 2))  # two seconds pass between two looks
    monkeypatch.setattr(network.time, "perf_counter", lambda: float(next(clock)))
    told = []

    def track(work, *, label, total, unit, live):
        for number, item in enumerate(work, 1):
            yield item
            told.append((label, number, total, unit, live()))

    model = seeded(lambda: dependent(nn.Conv2d(3, 8, 1, bias=False), nn.Conv2d(8, 5, 1)))
    model.second = nn.Sequential(model.second, nn.Conv2d(5, 3, 1))
    x = torch.randn(32, 3, 5, 5)
    plan, small = halved(model, x)
    refit(model, small, plan, [x], options=CPU, track=track)
    assert told == [
        ("refitting", 1, 2, "layers", "second.0, 8.0 images/s, 0:00:02 left"),
        ("refitting", 2, 2, "layers", "second.1, 8.0 images/s, 0:00:00 left"),
    ]


@pytest.mark.parametrize(
    ("columns", "images", "rows"),
    [(9, 64, 4096), (144, 64, 4608), (144, 1024, 4608), (144, 2048, 9216), (576, 4096, 32768)],
)
def test_rows_follow_the_inputs_of_a_layer_and_the_images(columns, images, rows):
    assert RefitOptions().rows_of(columns, images) == rows
    assert RefitOptions(rows=77).rows_of(columns, images) == 77


def test_only_so_many_images_are_used():
    model, x = seeded(Residual).eval(), images(24, 12)
    plan, small = halved(model, x)
    few = RefitOptions(images=10, device="cpu")
    one = refit(model, small, plan, x.split(4), options=few).model
    other = refit(model, small, plan, [x[:10]], options=few).model
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters()))


def test_the_callers_models_are_left_as_they_are():
    model, x = seeded(Residual).train(), images(16, 12)
    plan, small = halved(model, x)
    small.blocks[0].conv1.weight.requires_grad_(False)
    before = [copy.deepcopy(m.state_dict()) for m in (model, small)]
    threads = threading.active_count()
    result = refit(model, small, plan, [x], options=CPU)
    for net, state in zip((model, small), before):
        assert net.training
        assert all(torch.equal(net.state_dict()[n], v) for n, v in state.items())
        assert not any(m._forward_hooks or m._forward_pre_hooks for m in net.modules())
    assert result.model.training
    assert not result.model.blocks[0].conv1.weight.requires_grad
    assert threading.active_count() == threads


def test_forwards_that_may_not_wait_give_the_same_result():
    model, x = seeded(Residual).eval(), images(12, 8)
    plan, small = halved(model, x)
    bound = RefitOptions(memory=40_000, device="cpu")  # three images a forward, none of them waits
    one, other = (refit(model, small, plan, [x], options=o).model for o in (CPU, bound))
    assert distance(one, other, x) < 1e-6 * distance(small, one, x)


def test_normal_equations_in_blocks_lead_to_the_direct_solution():
    model = seeded(lambda: Pair(nn.Conv2d(3, 16, 3, bias=False), nn.Conv2d(16, 4, 1))).eval()
    with torch.no_grad():  # kept channels that hardly correlate at one position
        model.first.weight[:8] = nn.init.orthogonal_(torch.empty(8, 27)).view(8, 3, 3, 3)
    x = torch.randn(64, 3, 8, 8)
    plan, small = halved(model, x)
    bound = RefitOptions(gram=8 * 4**2, device="cpu")  # two blocks of four channels
    direct, blocks = (refit(model, small, plan, [x], options=o) for o in (CPU, bound))
    assert blocks.errors["second"] == pytest.approx(direct.errors["second"], rel=1e-3)
    assert distance(direct.model, blocks.model, x) < 1e-3 * distance(model, direct.model, x)


def test_blocks_that_interact_come_closer_turn_by_turn():
    model = seeded(lambda: Pair(nn.Conv2d(3, 16, 3, bias=False), nn.Conv2d(16, 4, 3))).eval()
    x = torch.randn(64, 3, 8, 8)
    plan, small = halved(model, x)
    bound = RefitOptions(gram=8 * (4 * 9) ** 2, device="cpu")
    direct, blocks = (refit(model, small, plan, [x], options=o) for o in (CPU, bound))
    best, (before, after) = direct.errors["second"][1], blocks.errors["second"]
    assert best <= after < 0.5 * before


def test_some_positions_say_nearly_as_much_as_all():
    model, x = seeded(Residual).eval(), images(64, 16)
    plan, small = halved(model, x)
    some = RefitOptions(rows=64 * 40, device="cpu")  # 40 of 256 positions of every image
    full = distance(model, refit(model, small, plan, [x], options=CPU).model, x)
    part = distance(model, refit(model, small, plan, [x], options=some).model, x)
    assert part < 2 * full < distance(model, small, x)


def test_directions_that_the_images_do_not_show_keep_their_weights():
    model = seeded(lambda: Pair(nn.Conv2d(3, 8, 1, bias=False), nn.Conv2d(8, 4, 1))).eval()
    x = torch.randn(16, 1, 5, 5).repeat(1, 3, 1, 1)  # grey: one direction of the inputs
    plan, small = halved(model, x)
    result = refit(model, small, plan, [x], options=replace(CPU, precision="float64"))
    shown = small.first.weight.detach().flatten(1).sum(1)  # the direction that grey shows
    change = (result.model.second.weight - small.second.weight).detach().flatten(1)
    across = change - (change @ shown / shown.square().sum())[:, None] * shown
    assert float(change.norm()) > 1e-2
    assert float(across.norm()) < 1e-4 * float(change.norm())


class Standardised(nn.Conv2d):
    def forward(self, x):
        return nn.functional.conv2d(x, self.weight / self.weight.norm(), self.bias)


def test_layers_that_cannot_be_refitted_are_named_and_keep_their_weights():
    model = seeded(lambda: Pair(nn.Conv2d(3, 8, 1), Standardised(8, 4, 1))).eval()
    x = torch.randn(8, 3, 5, 5)
    plan, small = halved(model, x)
    result = refit(model, small, plan, [x], options=CPU)
    assert result.layers == ()
    assert result.skipped == {"second": "its output is not its weight times its input"}
    assert torch.equal(result.model.second.weight, small.second.weight)


def test_numbers_that_are_not_finite_leave_the_layer_as_it_was():
    model = seeded(lambda: Pair(nn.Conv2d(3, 8, 1), nn.Conv2d(8, 4, 1))).eval()
    x = torch.randn(8, 3, 5, 5)
    plan, small = halved(model, x)
    x[5, 0, 0, 0] = float("nan")
    result = refit(model, small, plan, [x], options=CPU)
    assert result.skipped == {"second": "its values are not finite for image 5"}
    assert torch.equal(result.model.second.weight, small.second.weight)


def test_weights_beyond_their_type_leave_the_layer_as_it_was():
    """What is left says the same 1e12 times more softly, so 1e30 would have to become 1e42."""
    model = seeded(lambda: Pair(nn.Conv2d(3, 2, 1, bias=False), nn.Conv2d(2, 1, 1))).eval()
    with torch.no_grad():
        model.first.weight[1] = 1e-12 * model.first.weight[0]
        model.second.weight.copy_(torch.tensor([1e30, 0.0]).reshape(1, 2, 1, 1))
    x = torch.randn(8, 3, 5, 5)
    groups = find_structure(model, x).groups
    plan = plan_of(groups, {g.name: [1] for g in groups if g.prunable}, {})
    small = prune(model, plan)
    result = refit(model, small, plan, [x], options=CPU)
    assert result.skipped == {"second": "its new weights are beyond torch.float32"}
    assert torch.equal(result.model.second.weight, small.second.weight)


class Exp(nn.Module):
    """A module, so that what it gives can be read."""

    def forward(self, x):
        return torch.exp(x)


@pytest.mark.parametrize("batches", [[8], [3, 5]])
def test_a_shortcut_that_overflows_names_the_layer_beside_it_and_the_image(batches):
    """Inputs and outputs of the layer are finite; the error that it makes up for is not."""

    class Shortcut(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.side = nn.Conv2d(3, 8, 1), nn.Sequential(nn.Conv2d(3, 8, 1), Exp())
            self.second, self.head = nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 2, 1)

        def forward(self, x):
            y = self.side(x)
            return self.head(torch.relu(self.second(torch.tanh(self.first(x))) + y))

    model, x = seeded(Shortcut).eval(), torch.randn(8, 3, 5, 5)
    plan, small = halved(model, x)
    x[6] *= 1e4
    result = refit(model, small, plan, x.split(batches), options=CPU)
    reason = "its values are not finite for image 6"
    assert result.skipped == {"second": reason, "head": reason}
    assert torch.equal(result.model.second.weight, small.second.weight)
    assert result.notes()[-1] == f"not refitted: second, head: {reason}"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rows": 0}, "rows=0"), ({"images": -3}, "images=-3"), ({"images": 2.5}, "images=2.5"),
        ({"gram": -8}, "gram=-8"), ({"ridge": float("nan")}, "ridge=nan"),
        ({"ridge": -1.0}, "ridge=-1.0"), ({"precision": "half"}, "precision='half'"),
        ({"memory": 0}, "memory=0"), ({"memory": 4e9}, "memory=4000000000.0"),
        ({"memory": "lots"}, "memory='lots'"), ({"memory": True}, "memory=True"),
    ],
)  # fmt: skip
def test_options_that_no_refit_can_be_made_with_are_named(options, message):
    model, x = seeded(Residual).eval(), images(4, 12)
    plan, small = halved(model, x)
    with pytest.raises(UsageError, match=message):
        refit(model, small, plan, [x], options=replace(CPU, **options))


def test_an_activation_that_overflows_names_its_layers_and_image_only():
    """The image itself is finite, and so is what the first layer makes of it."""

    class Squares(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.third = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 4, 1)
            self.second = nn.Conv2d(8, 8, 1, bias=False)

        def forward(self, x):
            return self.third(self.second(self.first(x)) ** 2)

    model, x = seeded(Squares).eval(), torch.randn(8, 3, 5, 5)
    plan, small = halved(model, x)
    x[6] *= 1e21
    result = refit(model, small, plan, [x[:3], x[3:]], options=replace(CPU, precision="float64"))
    assert result.skipped == {"third": "its values are not finite for image 6"}
    assert result.layers == ("second",)
    assert torch.equal(result.model.third.weight, small.third.weight)
    assert not torch.equal(result.model.second.weight, small.second.weight)


def test_images_of_several_sizes_are_refused():
    model, x = seeded(Residual).eval(), images(8, 12)
    plan, small = halved(model, x)
    with pytest.raises(InputError, match="images of several sizes: 3x12x12 and 3x10x12") as caught:
        refit(model, small, plan, [x[:5], x[5:, :, 1:-1]], options=CPU)
    assert "image 5 is the first of another size" in str(caught.value)


def test_a_shared_layer_is_skipped():
    class Shared(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem, self.twice = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 1)
            self.head = nn.Conv2d(8, 3, 1)

        def forward(self, x):
            return self.head(self.twice(self.twice(self.stem(x))))

    model, x = seeded(Shared).eval(), torch.randn(8, 3, 5, 5)
    plan, small = halved(model, x)
    result = refit(model, small, plan, [x], options=CPU)
    assert result.skipped == {"twice": "it runs 2 times in one forward"}
    assert result.layers == ("head",)


def test_a_shift_of_the_channels_is_no_layer_and_a_bare_matrix_is_named_as_one():
    class Bare(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.shift = nn.Conv2d(3, 8, 1), nn.Parameter(torch.rand(1, 8, 1, 1))
            self.matrix, self.last = nn.Parameter(torch.rand(5, 8)), nn.Linear(5, 2)

        def forward(self, x):
            y = (self.first(x) - self.shift).relu().mean((2, 3))
            return self.last(nn.functional.linear(y, self.matrix))

    torch.manual_seed(0)
    model = Bare().eval()
    structure = find_structure(model, images())
    plan = plan_of(structure.groups, {"first": range(5)}, {})
    assert {"shift", "matrix"} <= set(plan.layers())
    small = prune(model, plan)
    result = refit(model, small, plan, [images()], options=RefitOptions(device="cpu"))
    assert result.skipped == {"matrix": "it is no layer, but a bare weight"}


def test_no_images_are_an_error():
    model, x = seeded(Residual).eval(), images(4, 12)
    plan, small = halved(model, x)
    with pytest.raises(InputError, match="no images"):
        refit(model, small, plan, [], options=CPU)
    with pytest.raises(InputError, match="no images to refit on"):
        refit(model, small, plan, [x[:0], x[:0]], options=CPU)


def test_a_network_that_the_plan_does_not_lead_to_is_refused():
    model, x = seeded(Residual).eval(), images(4, 12)
    plan, _ = halved(model, x)
    with pytest.raises(InputError, match=r"does not fit the plan: layer 'blocks\.0") as caught:
        refit(model, model, plan, [x], options=CPU)
    assert "the plan keeps 4 of its outputs, the network has 8" in str(caught.value)


def test_a_forward_that_fails_midway_ends_all_threads():
    class Moody(Residual):
        def forward(self, x):
            if len(x) > 2 and not torch.equal(x[0], x[1]):
                raise ValueError("bad mood")
            return super().forward(x)

    model, x = seeded(Moody).eval(), images(8, 12)
    plan, small = halved(model, x[:2])
    threads = threading.active_count()
    with pytest.raises(ValueError, match="bad mood"):
        refit(model, small, plan, [x], options=CPU)
    assert threading.active_count() == threads


def test_a_process_that_may_have_no_more_threads_says_so(monkeypatch):
    def refuse(thread):
        raise RuntimeError("can't start new thread")

    model, x = seeded(Residual).eval(), images(4, 12)
    plan, small = halved(model, x[:2])
    monkeypatch.setattr(threading.Thread, "start", refuse)
    with pytest.raises(EnvironmentFault, match="no thread can be started") as caught:
        refit(model, small, plan, [x], options=CPU)
    assert "collect.images=512" in caught.value.fix


def test_a_memory_budget_too_small_for_one_image_says_what_one_needs():
    model, x = seeded(Residual).eval(), images(4, 12)
    plan, small = halved(model, x)
    with pytest.raises(UsageError, match="memory=100 bytes is too little for one image") as caught:
        refit(model, small, plan, [x], options=replace(CPU, memory=100))
    need = int(str(caught.value.why).split()[3].replace(",", ""))
    assert f"memory={2 * need}" in caught.value.fix
    refit(model, small, plan, [x], options=replace(CPU, memory=2 * need))


def test_running_out_of_memory_halves_the_batch_and_is_reported_once():
    class Tight(Residual):
        def forward(self, x):
            if len(x) > 3:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
            return super().forward(x)

    model, x = seeded(Tight).eval(), images(11, 12)
    plan, small = halved(model, x[:2])
    result = refit(model, small, plan, [x], options=CPU)
    assert result.warnings == (
        "batches of more than 2 images did not fit into memory; the refit went on with smaller "
        "ones",
        "the loader gave 11 of 2,048 images",
    )
    roomy = seeded(Residual).eval()
    same = refit(roomy, prune(roomy, plan), plan, [x], options=CPU).model
    for a, b in zip(result.model.parameters(), same.parameters()):
        assert torch.allclose(a, b, rtol=1e-3, atol=1e-3)


def test_memory_that_runs_out_between_the_forwards_halves_the_batch_too(monkeypatch):
    """Patches are made outside of any forward; the allocator refuses those of many images."""
    model, x = seeded(Residual).eval(), images(40, 12)
    plan, small = halved(model, x[:2])
    whole, most, others = MatrixProduct.patches, 12, set(threading.enumerate())

    def refused(self, index):
        if len(self.input) > most:
            raise torch.OutOfMemoryError("DefaultCPUAllocator: can't allocate memory")
        return whole(self, index)

    expected = refit(model, small, plan, [x], options=CPU)
    monkeypatch.setattr(MatrixProduct, "patches", refused)
    found = refit(model, small, plan, [x], options=CPU)
    assert "batches of more than 8 images did not fit into memory" in found.warnings[0]
    assert len(found.warnings) == len(expected.warnings) + 1
    for name, after in expected.errors.items():
        assert found.errors[name] == pytest.approx(after, rel=1e-2)
    most = 0
    with pytest.raises(EnvironmentFault, match="out of memory with a single image"):
        refit(model, small, plan, [x], options=CPU)
    assert not set(threading.enumerate()) - others


def test_what_a_waiting_forward_holds():
    """Per image: what is read at the layer or later, and the image, which the caller holds."""

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 4, 1)
            self.third, self.head = nn.Conv2d(4, 8, 1), nn.Conv2d(8, 2, 1)

        def forward(self, x):
            y = self.first(x)
            return self.head(self.third(self.second(y)) + y)

    model, x = seeded(Net).eval(), torch.randn(2, 3, 5, 5)
    plan, _ = halved(model, x)
    targets, _ = TargetFinder(model, x).find(plan)
    held = {t.layer: t.alive // (4 * 25) for t in targets}
    assert held == {"second": 3 + 8, "third": 3 + 8 + 4, "head": 3 + 8}


def test_memory_for_little_gives_what_memory_for_all_gives():
    """The parent's forwards wait where what is read of them does not fit."""
    model, x = seeded(Residual).eval(), images(40, 12)
    plan, small = halved(model, x)
    states = [
        refit(model, small, plan, [x], options=replace(CPU, memory=memory)).model.state_dict()
        for memory in (4 << 20, 4 << 30)
    ]
    for name, value in states[0].items():
        assert torch.allclose(value, states[1][name], rtol=1e-3, atol=1e-3), name


def test_a_module_that_remembers_is_not_mixed_up_between_batches():
    """Batches wait in the middle of their forwards, each with what its modules hold."""

    class Plain(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
            self.third, self.held = nn.Conv2d(8, 4, 1), [torch.zeros(1)]

        def forward(self, x):
            y = self.first(x)
            return self.third(self.second(y) * y)

    class Remembers(Plain):
        def forward(self, x):
            self.held[0] = self.first(x)
            return self.third(self.second(self.held[0]) * self.held[0])

    x = images(300, 6)  # three batches
    made = []
    for kind in (Plain, Remembers):
        model = seeded(kind).eval()
        plan, small = halved(model, x[:2])
        made.append(refit(model, small, plan, [x], options=CPU))
    assert made[0].skipped == made[1].skipped == {}
    for a, b in zip(made[0].model.parameters(), made[1].model.parameters()):
        assert torch.equal(a, b)


def test_a_loader_that_ends_early_is_a_warning_and_batches_may_differ():
    model, x = seeded(Residual).eval(), images(11, 12)
    plan, small = halved(model, x)
    batches = [x[:5], x[5:6], x[6:]]
    result = refit(model, small, plan, batches, options=replace(CPU, images=20))
    assert result.warnings == ("the loader gave 11 of 20 images",)
    same = refit(model, small, plan, [x], options=CPU).model
    assert all(torch.equal(a, b) for a, b in zip(result.model.parameters(), same.parameters()))


@pytest.mark.parametrize("seed", range(6))
def test_every_turn_of_a_layer_before_a_relu_is_measured_by_one_scale(seed):
    """Where the parent is silent the target moves with the output, and with it its variance."""
    torch.manual_seed(seed)
    wide = nn.Sequential(nn.Conv2d(3, 24, 3), nn.BatchNorm2d(24), nn.ReLU())
    narrow = nn.Sequential(nn.Conv2d(24, 6, 1, bias=False), nn.BatchNorm2d(6), nn.ReLU())
    model = nn.Sequential(*wide, *narrow, nn.Conv2d(6, 3, 1)).train()
    with torch.no_grad():
        model[4].bias.fill_(-1.0)  # mostly silent
        for _ in range(50):
            model(torch.randn(8, 3, 9, 9))
    model.eval()
    x = torch.randn(32, 3, 9, 9)
    groups = find_structure(model, x).groups
    plan = plan_of(groups, {g.name: range(4) for g in groups if g.name == "0"}, {})
    small = prune(model, plan)
    result = refit(model, small, plan, [x], options=replace(CPU, rows=1 << 16))
    before, after = result.errors["3"]
    with torch.no_grad():
        dense = model[:5](x)
        gain = (model[4].weight / (model[4].running_var + model[4].eps).sqrt())[:, None, None]

        def error(net):
            """Squared distance before the norm, where the parent or this network is above 0."""
            own = net[:5](x)
            return torch.where(dense > 0, dense - own, own.clamp_min(0)).div(gain).square().sum()

        exact = float(error(result.model) / error(small))
    # `after` is by the target of the last turn, from which the output has moved a little nearer
    assert exact <= after / before <= 1.1 * exact
