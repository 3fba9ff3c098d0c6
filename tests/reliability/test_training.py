"""What goes wrong while a network is tuned: memory, workers, signals, NaN; and the way on."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from terminal import Ended, Terminal
from torch import nn

from seprune.errors import InputError, StoppedError
from seprune.recovery.finetune.checkpoints import load_generation
from seprune.recovery.recalibrate import recalibrate
from seprune.runtime.interrupts import interrupts

SMALL = (
    *("--set", "finetune.batch_size=100", "--set", "finetune.recalibrate=64"),
    *("--set", "finetune.warmup_epochs=0", "--device", "cpu", "--json"),
)


def digits(out: Path, *more: str) -> tuple[str, ...]:
    words = ("finetune", "seprune/se_resnet8", "--data", "digits", "--epochs", "2")
    return (*words, "--out", str(out), *SMALL, *more)


@pytest.fixture(scope="module")
def unbroken(terminal: Terminal, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("unbroken")
    assert terminal(*digits(out)).status == 0
    return out


def goes_on(terminal: Terminal, out: Path, unbroken: Path) -> None:
    """The same command ends with the very weights of a run that nothing had happened to."""
    ended = terminal(*digits(out))
    assert ended.status == 0, ended.err
    ours, theirs = (load_file(folder / "model.safetensors") for folder in (out, unbroken))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


# -- row 24 ----------------------------------------------------------------------------------------

KILL_A_WORKER = """
import os
import torch.utils.data
from seprune.data.loaders import _Augmented
original, seen = _Augmented.__getitem__, []
def deadly(self, row):
    seen.append(row)
    if torch.utils.data.get_worker_info() is not None and self._key[1] == 1:
        os.kill(os.getpid(), 9)
    return original(self, row)
_Augmented.__getitem__ = deadly
"""


def pictures(folder: Path) -> None:
    """Images of two classes in train/ and val/."""
    generator = np.random.default_rng(0)
    for part in ("train", "val"):
        for name in ("a", "b"):
            for number in range(12):
                path = folder / part / name / f"{number}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                pixels = generator.integers(0, 256, (8, 8, 3), dtype=np.uint8)
                Image.fromarray(pixels).resize((64, 64)).save(path)


@pytest.mark.slow  # test_data.py has the error alone
@pytest.mark.fault(24)
def test_a_killed_loader_worker_is_explained_and_the_run_goes_on(terminal, tmp_path):
    """The worker of the second epoch is killed, as the kernel does when memory is short."""
    images, out, original = (tmp_path / name for name in ("images", "out", "unbroken"))
    pictures(images)

    def finetune(into: Path, **limits: str) -> Ended:
        return terminal(
            "finetune", "seprune/se_resnet8", "--data", images, "--epochs", "3", "--out", into,
            *SMALL, "--set", "data.cache=none", "--set", "data.workers=1",
            "--set", "finetune.batch_size=8", **limits,
        )  # fmt: skip

    error = finetune(out, before=KILL_A_WORKER).refused(
        4, "environment", says="ran out of memory or of shared memory (/dev/shm)"
    )
    assert error["what"] == "a data loading worker process died"
    assert "data.workers=0" in error["next"]
    assert load_generation(out / "state").facts["at"]["epoch"] == 1
    assert finetune(out).status == 0
    assert finetune(original).status == 0
    ours, theirs = (load_file(folder / "model.safetensors") for folder in (out, original))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


# -- row 25 ----------------------------------------------------------------------------------------

HUNGRY = """
import torch
from torch import nn
from seprune.models import build

class Hungry(nn.Module):
    room = {room}

    def __init__(self):
        super().__init__()
        self.body = build("seprune/se_resnet8", classes=10, input=(1, 8, 8))

    def forward(self, x):
        if {when} and len(x) > self.room:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.")
        return self.body(x)

def network():
    torch.manual_seed(0)
    return Hungry()
"""


def hungry(folder: Path, *, room: int, when: str = "self.training") -> str:
    path = folder / f"hungry{room}.py"
    path.write_text(HUNGRY.format(room=room, when=when))
    return f"{path}:network"


@pytest.mark.fault(25)
def test_out_of_memory_while_tuning_halves_the_micro_batch_and_says_so(terminal, tmp_path):
    ended = terminal(
        "finetune", hungry(tmp_path, room=30), "--allow-code", "--data", "digits", "--epochs", "1",
        "--out", tmp_path / "out", *SMALL,
    )  # fmt: skip
    assert ended.status == 0, ended.err
    assert json.loads(ended.out)["accumulate"] == 4
    assert "every step in 4 micro-batches of the same batch together" in ended.err


@pytest.mark.fault(25)
@pytest.mark.parametrize(
    ("words", "when", "what"),
    [
        (("finetune", "--epochs", "1"), "self.training", "with micro-batches of 1 images"),
        (("collect",), "torch.is_grad_enabled()", "out of memory with a single image"),
        (("evaluate",), "len(x) > 1", "out of memory on cpu"),
    ],
    ids=["tuning", "collecting", "evaluating"],
)
def test_out_of_memory_with_single_images_ends_with_what_to_type(
    terminal, tmp_path, words, when, what
):
    out = () if words[0] == "evaluate" else ("--out", tmp_path / "out")
    ended = terminal(
        words[0], hungry(tmp_path, room=0, when=when), "--allow-code", "--data", "digits",
        *words[1:], *out, "--device", "cpu", "--json",
    )  # fmt: skip
    assert what in ended.refused(4, "environment")["what"]


@pytest.mark.fault(25)
def test_out_of_memory_while_collecting_halves_the_batch(terminal, tmp_path):
    answers = []
    for room in (10_000, 5):
        network = hungry(tmp_path, room=room, when="torch.is_grad_enabled()")
        ended = terminal(
            "collect", network, "--allow-code", "--data", "digits", "--images", "100",
            "--out", tmp_path / f"{room}.safetensors", "--device", "cpu", "--json",
        )  # fmt: skip
        assert ended.status == 0, ended.err
        answers.append(load_file(tmp_path / f"{room}.safetensors"))
    roomy, tight = answers
    assert roomy.keys() == tight.keys()
    for name, value in roomy.items():
        assert torch.allclose(value.double(), tight[name].double(), rtol=1e-4, atol=1e-8), name


# -- row 29 ----------------------------------------------------------------------------------------

PRESS = """
import os, signal
from seprune.recovery.finetune import step as learner
original, seen = learner.TrainState.step, []
def step(self, *args, **kwargs):
    seen.append(1)
    if len(seen) == 20:
        for signum in {signals}:
            os.kill(os.getpid(), signum)
    return original(self, *args, **kwargs)
learner.TrainState.step = step
"""
WHILE_SAVING = """
import os, signal
from seprune.recovery.finetune import checkpoints as generations
original, seen = generations.sha256, []
def sha256(path):  # the state is written, the hash that commits it is not
    seen.append(1)
    if len(seen) == 2:
        os.kill(os.getpid(), signal.SIGTERM)
    return original(path)
generations.sha256 = sha256
"""


@pytest.mark.fault(29)
@pytest.mark.parametrize(
    ("before", "status"),
    [
        (PRESS.format(signals="(signal.SIGINT,)"), 130),
        pytest.param(PRESS.format(signals="(signal.SIGTERM,)"), 143, marks=pytest.mark.slow),
        pytest.param(
            PRESS.format(signals="(signal.SIGINT, signal.SIGINT)"), 130, marks=pytest.mark.slow
        ),
        pytest.param(WHILE_SAVING, 143, marks=pytest.mark.slow),
    ],
    ids=["SIGINT", "SIGTERM", "SIGINT twice", "SIGTERM while saving"],
)
def test_a_signal_while_tuning_loses_nothing(terminal, tmp_path, unbroken, before, status):
    """Twice stops in the middle of the step: that epoch is then done again, from its start."""
    ended = terminal(*digits(tmp_path), before=before)
    assert ended.status == status, ended.err
    assert "Traceback" not in ended.err
    assert ended.error["code"] == "stopped"
    assert ended.error["next"] == f"go on with: seprune {' '.join(digits(tmp_path))}"
    assert not list(tmp_path.rglob("*.part"))
    assert load_generation(tmp_path / "state") is not None
    goes_on(terminal, tmp_path, unbroken)


# -- row 31 ----------------------------------------------------------------------------------------


@pytest.mark.fault(31)
def test_a_training_that_diverges_rolls_back_once_then_stops(terminal, tmp_path):
    error = terminal(*digits(tmp_path, "--lr", "1e30")).refused(3, "input")
    assert error["what"].startswith("the training loss became NaN or infinite again in epoch 0")
    assert "rolled back once and went on at half the learning rate" in error["why"]
    assert f"the best weights so far are in {tmp_path}/state" in error["next"]
    kept = load_generation(tmp_path / "state")
    assert kept.facts["at"]["rollbacks"] == 1
    best = [t for n, t in kept.tensors.items() if n.startswith("best.") and t.is_floating_point()]
    assert best
    assert all(t.isfinite().all() for t in best)


# -- row 32 ----------------------------------------------------------------------------------------


@pytest.mark.fault(32)
def test_an_interrupted_or_empty_recalibration_leaves_the_model_alone():
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4))
    before = {name: value.clone() for name, value in model.state_dict().items()}

    def images():
        for number in range(4):
            if number == 2:
                os.kill(os.getpid(), signal.SIGINT)
            yield torch.randn(8, 1, 6, 6), torch.zeros(8)

    with pytest.raises(StoppedError), interrupts("again"):
        recalibrate(model, images(), device="cpu")
    with pytest.raises(InputError, match="BatchNorm cannot be recalibrated without images"):
        recalibrate(model, [], device="cpu")
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.fault(32)
def test_recalibration_alone_says_what_it_brought(terminal, tmp_path, unbroken):
    words = ("finetune", unbroken, "--data", "digits", "--epochs", "0", "--out", tmp_path, *SMALL)
    ended = terminal(*words)
    assert ended.status == 0, ended.err
    answer = json.loads(ended.out)
    assert answer["epochs"] == 0
    assert answer["validation_before"] != answer["validation_recalibrated"]
    before, after = (100 * answer[f"validation_{name}"] for name in ("before", "recalibrated"))
    chosen = [", chosen" if answer["chosen"] == name else "" for name in ("start", "recalibrated")]
    words = f"{before:.2f} % as given{chosen[0]}, {after:.2f} % BatchNorm recalibrated{chosen[1]}"
    assert any(chosen)
    assert f"may have been trained on): {words}" in ended.err
    dense, recalibrated = (load_file(f / "model.safetensors") for f in (unbroken, tmp_path))
    changed = {n for n, t in dense.items() if not torch.equal(t, recalibrated[n])}
    assert {name.rpartition(".")[2] for name in changed} <= {
        "running_mean", "running_var", "num_batches_tracked"
    }  # fmt: skip
