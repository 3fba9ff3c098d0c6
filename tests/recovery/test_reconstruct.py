"""Label-free reconstruction, against closed forms and independent forwards."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import seprune
from seprune.errors import InputError, UsageError
from seprune.recovery.reconstruct import ReconstructOptions, reconstruct
from seprune.recovery.reconstruct.matching import Matching
from seprune.recovery.refit.targets import Target


class Gated(nn.Module):
    """SiLU, a squeeze-and-excitation gate and two outputs: more than a linear refit can reach."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1)
        self.norm = nn.BatchNorm2d(16)
        self.down, self.up = nn.Conv2d(16, 8, 1), nn.Conv2d(8, 16, 1)
        self.mix = nn.Conv2d(16, 16, 3, padding=1)
        self.head, self.other = nn.Linear(16, 5), nn.Linear(16, 2)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        y = nn.functional.silu(self.norm(self.stem(x)))
        y = y * torch.sigmoid(self.up(torch.relu(self.down(y.mean((2, 3), keepdim=True)))))
        y = nn.functional.silu(self.mix(y)).mean((2, 3))
        return {"classes": self.head(y), "size": self.other(y)}


def images(count: int, seed: int) -> Tensor:
    coarse = torch.randn(count, 3, 4, 4, generator=torch.Generator().manual_seed(seed))
    return nn.functional.interpolate(coarse, scale_factor=4, mode="bilinear")


@pytest.fixture(scope="module")
def case() -> SimpleNamespace:
    torch.manual_seed(0)
    parent = Gated().eval()
    with torch.no_grad():
        parent.norm.running_mean.normal_()
        for layer in (parent.stem, parent.mix, parent.head, parent.other):
            layer.weight.mul_(2)
    structure = seprune.analyse(parent, images(2, 0))
    scores = seprune.score(structure, None, model=parent, scoring=seprune.Scoring("l2"))
    plan = seprune.make_plan(structure, scores, macs=0.5)
    loader = list(images(96, 1).split(32))
    return SimpleNamespace(
        parent=parent, plan=plan, pruned=seprune.prune(parent, plan, images(2, 0)), loader=loader
    )


def run(case: SimpleNamespace, **options: Any) -> seprune.Reconstructed:
    given = {"epochs": 4, "lr": 3e-3, "batch_size": 16, "flip": False, "shift": 0.0, **options}
    return reconstruct(
        case.parent, case.pruned, case.plan, case.loader, options=ReconstructOptions(**given)
    )


def same_weights(one: nn.Module, other: nn.Module) -> bool:
    pairs = zip(one.state_dict().values(), other.state_dict().values(), strict=True)
    return all(torch.equal(a, b) for a, b in pairs)


def test_the_error_falls_on_images_that_nobody_has_seen(case: SimpleNamespace) -> None:
    before = copy.deepcopy(case.pruned)
    made = run(case)
    fresh = images(64, 7)

    def error(model: nn.Module) -> float:
        with torch.no_grad():
            wanted, given = case.parent(fresh), model.eval()(fresh)
        parts = [
            (given[n] - wanted[n]).square().mean() / wanted[n].var(correction=0) for n in wanted
        ]
        return float(torch.stack(parts).mean())

    assert made.best > 0
    assert error(made.model) < 0.7 * error(before)
    assert same_weights(case.pruned, before), "the network given is not changed"
    assert made.held_out == 12
    assert len(made.errors) == 5
    assert made.errors[made.best] == min(made.errors)


def test_relative_errors_of_a_worked_example() -> None:
    """Parent 2x + 0 and 4x, pruned x + 1 and 4x, on x = 0 and 1."""
    parent, pruned = nn.Linear(1, 2), nn.Linear(1, 2)
    with torch.no_grad():
        parent.weight.copy_(torch.tensor([[2.0], [4.0]]))
        parent.bias.zero_()
        pruned.weight.copy_(torch.tensor([[1.0], [4.0]]))
        pruned.bias.copy_(torch.tensor([1.0, 0.0]))
    holder = nn.ModuleDict({"layer": parent}), nn.ModuleDict({"layer": pruned})
    for network in holder:
        network.forward = network["layer"].forward  # type: ignore[method-assign]
    whole = Target("layer", None, -1, None, None, None, False, 0)
    matching = Matching(*holder, [whole])
    x = torch.tensor([[0.0], [1.0]])
    matching.measure([x[:1], x[1:]])
    gap = matching(x)
    # parent gives 0 0 2 4, variance 2.75; differences 1 0 0 0, mean square 0.25
    assert gap.outputs.item() == pytest.approx(0.25 / 2.75)
    # the layer is called through `forward`, so no hook shows it: only outputs are compared
    assert gap.layers == ()


def test_the_network_given_is_a_candidate(case: SimpleNamespace) -> None:
    made = run(case, lr=30.0, epochs=2)
    assert made.best == 0
    assert same_weights(made.model, case.pruned)
    assert all(a == b for a, b in made.layers.values())


def test_a_resumed_run_equals_an_unbroken_one(case: SimpleNamespace, tmp_path: Path) -> None:
    def call(folder: Path | None, track: Callable[..., Any]) -> seprune.Reconstructed:
        return reconstruct(
            case.parent, case.pruned, case.plan, case.loader,
            options=ReconstructOptions(epochs=4, lr=3e-3, batch_size=16, folder=folder),
            track=track,
        )  # fmt: skip

    def quiet(items: Iterable[Any], **_: Any) -> Iterator[Any]:
        return iter(items)

    def stopping(items: Iterable[Any], **_: Any) -> Iterator[Any]:
        for number, item in enumerate(items):
            if number == 2:
                raise KeyboardInterrupt
            yield item

    unbroken = call(None, quiet)
    with pytest.raises(KeyboardInterrupt):
        call(tmp_path, stopping)
    seen: list[int] = []

    def counting(items: Iterable[Any], **_: Any) -> Iterator[Any]:
        for item in items:
            seen.append(item)
            yield item

    resumed = call(tmp_path, counting)
    assert seen == [2, 3]
    assert resumed.errors == unbroken.errors
    assert same_weights(resumed.model, unbroken.model)
    with pytest.raises(InputError, match="belongs to another reconstruction"):
        reconstruct(
            case.parent, case.pruned, case.plan, case.loader,
            options=ReconstructOptions(epochs=5, batch_size=16, folder=tmp_path),
        )  # fmt: skip


def test_memory_changes_the_parts_and_not_the_result(case: SimpleNamespace) -> None:
    need = int(_needed(case))
    small, large = run(case, epochs=1, memory=6 * need), run(case, epochs=1)
    pairs = zip(small.model.state_dict().values(), large.model.state_dict().values(), strict=True)
    assert all(torch.allclose(a, b, rtol=1e-3, atol=1e-5) for a, b in pairs)


def _needed(case: SimpleNamespace) -> str:
    with pytest.raises(UsageError, match="too little for one image") as caught:
        run(case, memory=1)
    return str(caught.value.why).split("needs ")[1].split(" bytes")[0].replace(",", "")


def test_one_image_is_refused(case: SimpleNamespace) -> None:
    with pytest.raises(InputError, match="one image is too few"):
        reconstruct(case.parent, case.pruned, case.plan, [images(1, 0)])


def test_a_network_of_another_plan_is_refused(case: SimpleNamespace) -> None:
    with pytest.raises(InputError, match="cannot be compared at"):
        reconstruct(case.parent, copy.deepcopy(case.parent), case.plan, case.loader)


def test_compress_reconstructs_after_the_refit(case: SimpleNamespace) -> None:
    made = seprune.compress(
        case.parent, list(images(768, 3).split(64)), recover="reconstruct", macs=0.5,
        scoring=seprune.Scoring("l2"),
    )  # fmt: skip
    assert {"recover", "reconstruct"} <= set(made.seconds)
    assert made.refitted is not None
    assert not same_weights(made.model, made.refitted.model)
