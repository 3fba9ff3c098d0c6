"""States of a model in which statistics cannot be collected: each is named, with what to do."""

import pytest
import torch
from nets import SE, Chain, images
from torch import Tensor, nn

from seprune import analyse, collect_statistics
from seprune.errors import InputError


def batches() -> list[Tensor]:
    return [images()]


def refused(model: nn.Module, **options: object) -> InputError:
    with pytest.raises(InputError) as caught:
        collect_statistics(model, batches(), **options)  # type: ignore[arg-type]
    return caught.value


def test_a_scripted_and_a_compiled_model_are_refused_with_the_way_back():
    plain = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU())
    assert refused(torch.jit.script(plain)).what == "a scripted model cannot be pruned"
    compiled = refused(torch.compile(Chain(SE(8))))
    assert compiled.what == "a model that torch.compile has wrapped cannot be pruned"
    assert compiled.fix == "pass model._orig_mod, and compile the result"
    with pytest.raises(InputError, match="a scripted model cannot be pruned"):
        analyse(torch.jit.script(plain), images())


def test_inference_mode_and_what_was_made_in_it_are_refused_only_for_derivatives():
    model = Chain(SE(8))
    structure = analyse(model, images())
    with torch.inference_mode():
        inside = refused(model, structure=structure)
        made = Chain(SE(8))
    assert inside.what == "derivatives cannot be collected in torch.inference_mode()"
    found = refused(made, structure=structure)
    assert found.what == "'a.weight' is an inference tensor"
    assert "inference_mode" in found.why
    assert collect_statistics(model, batches()).samples == len(images())


def test_what_autograd_refuses_ends_with_its_own_words_and_a_criterion_without_it():
    class Overwritten(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.se = SE(8)

        def forward(self, x: Tensor) -> Tensor:
            y = self.se(x).exp()
            z = y * 2
            y.add_(1)  # exp needs its result for the derivative
            return z + y

    model = Chain(Overwritten())
    error = refused(model, structure=analyse(model, images()))
    assert error.what.startswith("autograd refuses this model: one of the variables needed")
    assert error.fix == "a criterion without derivatives: importance.criterion=gate_mean, or l2"
