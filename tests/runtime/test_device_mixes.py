"""Every stage on a pretended GPU: nothing mixes devices, and the numbers are those of the CPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from pretend_cuda import CPU, GPU, MixedDevices, PretendCuda, pretended
from torch import Tensor, nn

import seprune
from seprune.recovery.candidates import TrialOptions, choose_plan
from seprune.recovery.recalibrate import recalibrate
from seprune.recovery.reconstruct import ReconstructOptions, reconstruct
from seprune.recovery.refit import RefitOptions, refit
from seprune.statistics import CollectOptions, collect_statistics


class Net(nn.Module):
    """A gate on a residual sum, an inner gate, a depthwise convolution, SiLU and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16)
        self.wide, self.wide_norm = nn.Conv2d(16, 24, 1), nn.BatchNorm2d(24)
        self.deep = nn.Conv2d(24, 24, 3, padding=1, groups=24)
        self.down, self.up = nn.Conv2d(24, 8, 1), nn.Conv2d(8, 24, 1)
        self.project = nn.Conv2d(24, 16, 1)
        self.head = nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.norm(self.stem(x)))
        y = nn.functional.silu(self.wide_norm(self.wide(x)))
        y = nn.functional.silu(self.deep(y))
        gate = torch.sigmoid(self.up(torch.relu(self.down(y.mean((2, 3), keepdim=True)))))
        return self.head((x + self.project(y * gate)).mean((2, 3)))


def batches(count: int = 64, seed: int = 0) -> list[tuple[Tensor, Tensor]]:
    random = torch.Generator().manual_seed(seed)
    images = torch.randn(count, 3, 8, 8, generator=random)
    labels = torch.randint(4, (count,), generator=random)
    return list(zip(images.split(16), labels.split(16)))


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch, case: dict[str, Any]):
    torch.manual_seed(0)
    with pretended(monkeypatch) as mode:
        mode.at_home(case["model"], case["small"])
        yield mode


@pytest.fixture(scope="module")
def case() -> dict[str, Any]:
    torch.manual_seed(0)
    model = Net().eval()
    structure = seprune.analyse(model, batches()[0][0][:2])
    statistics = collect_statistics(
        model, batches(), structure=structure, gradients="logits", options=cpu(CollectOptions)
    )
    plan = seprune.make_plan(structure, seprune.score(structure, statistics), macs=0.5)
    small = seprune.prune(model, plan)
    return {"model": model, "structure": structure, "statistics": statistics, "plan": plan,
            "small": small}  # fmt: skip


def cpu(options: type, **given: Any) -> Any:
    return options(device="cpu", **given)


def test_the_pretence_refuses_what_a_gpu_refuses(gpu: PretendCuda) -> None:
    here, there = torch.ones(3), torch.ones(3, device="cuda")
    assert (here.device, there.device, (there * 2).device) == (CPU, GPU, GPU)
    assert there.to("cpu").device == CPU
    assert nn.Linear(3, 2).to("cuda")(there).device == GPU
    with pytest.raises(MixedDevices, match=r"\(3,\) on cpu, \(3,\) on cuda:0"):
        here + there
    with pytest.raises(MixedDevices):
        nn.Linear(3, 2)(there)
    with pytest.raises(MixedDevices):
        there.numpy()
    with pytest.raises(MixedDevices, match="generator"):
        torch.rand(3, device="cuda", generator=torch.Generator())
    assert (there + torch.tensor(1.0)).device == GPU, "CPU scalars may be mixed in"
    assert there[torch.tensor([0])].device == GPU, "so may indices"
    layer = nn.Linear(3, 1).to("cuda")
    layer(there).sum().backward()
    assert layer.weight.grad.device == GPU


def test_collect(gpu: PretendCuda, case: dict[str, Any]) -> None:
    for gradients in ("none", "labels", "sampled", "logits", "weights"):
        collect_statistics(
            case["model"], batches(), structure=case["structure"], gradients=gradients,
            options=CollectOptions(device="cuda", precision="no"),
        )  # fmt: skip
    assert gpu.moves
    assert next(case["model"].parameters()).device == CPU, "the caller's network is back"


def test_collected_numbers_are_those_of_the_cpu(gpu: PretendCuda, case: dict[str, Any]) -> None:
    made = collect_statistics(
        case["model"], batches(), structure=case["structure"], gradients="logits",
        options=CollectOptions(device="cuda", precision="no", channels_last=False),
    )  # fmt: skip
    for name, row in case["statistics"].values.items():
        for key, value in row.items():
            assert torch.equal(torch.as_tensor(made.values[name][key]), torch.as_tensor(value))


def test_refit_reconstruct_and_recalibrate(gpu: PretendCuda, case: dict[str, Any]) -> None:
    model, small, plan = case["model"], case["small"], case["plan"]
    fitted = refit(model, small, plan, batches(), options=RefitOptions(device="cuda"))
    alone = refit(model, small, plan, batches(), options=RefitOptions(device="cpu"))
    for name, errors in alone.errors.items():
        assert fitted.errors[name] == pytest.approx(errors)
    assert gpu.moves
    options = ReconstructOptions(device="cuda", epochs=2, batch_size=16)
    made = reconstruct(model, fitted.model, plan, batches(), options=options)
    assert len(made.errors) == 3
    normed = recalibrate(small, batches(), device="cuda")
    assert next(normed.parameters()).device == CPU


def test_choose(gpu: PretendCuda, case: dict[str, Any]) -> None:
    scores = seprune.score(case["structure"], None, model=case["model"],
                           scoring=seprune.Scoring("l2"))  # fmt: skip
    plans = {"default": case["plan"], "l2": seprune.make_plan(case["structure"], scores, macs=0.5)}
    options = TrialOptions(images=32, held_out=8, device="cuda")
    choice = choose_plan(case["model"], plans, batches(), options=options)
    assert choice.name in plans
    assert gpu.moves


def test_evaluate_and_finetune(gpu: PretendCuda, case: dict[str, Any]) -> None:
    found = seprune.evaluate(case["small"], batches(), device="cuda")
    assert found.count == 64
    settings = seprune.FineTuneSettings(epochs=1, device="cuda", precision="no", ema=0.9, mixup=0.2)
    tuned = seprune.finetune(case["small"], batches(), settings, teacher=case["model"])
    assert len(tuned.history) == 1


@pytest.mark.slow
def test_compress(gpu: PretendCuda, case: dict[str, Any]) -> None:
    made = seprune.compress(
        case["model"], batches(), macs=0.5, device="cuda", recover="reconstruct"
    )
    assert made.after.macs <= 0.5 * made.before.macs
