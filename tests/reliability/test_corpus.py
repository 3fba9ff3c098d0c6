"""Every file of the corpus through every door that reads checkpoints, in processes with limits."""

from __future__ import annotations

from pathlib import Path

import corpus
import pytest
from corpus import FAULTS, NET
from folders import stages, untouched

RECIPE = """\
name: corpus
device: cpu
model:
  name: {net}
  checkpoint: {checkpoint}
data:
  source: digits
"""
EVERY_WAY = {"TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD": "1"}  # must change nothing
MEMORY_MIB = 256


def doors(checkpoint: Path, folder: Path) -> dict[str, list[object]]:
    """The commands that read a checkpoint."""
    recipe = folder / "recipe.yaml"
    recipe.write_text(RECIPE.format(net=NET, checkpoint=f"'{checkpoint}'"))
    given = [NET, "--checkpoint", checkpoint]
    return {
        "inspect": ["inspect", *given, "--classes", "10", "--input", "1x8x8"],
        "evaluate": ["evaluate", *given, "--data", "digits"],
        "prune": ["prune", *given, "--data", "digits", "--out", folder / "pruned"],
        "run": ["run", recipe, "--out", folder / "run"],
    }


def marked(fault: str) -> object:
    return pytest.param(fault, marks=pytest.mark.fault(FAULTS[fault].row), id=fault)


def attack(terminal, canary, tmp_path, fault, chosen):
    given, out = tmp_path / "von Fremden é", tmp_path / "out"
    given.mkdir()
    out.mkdir()
    path = fault.make(given, canary)
    commands = doors(path, out)
    for door in chosen:
        with untouched(given):
            ended = terminal(*commands[door], "--json", env=EVERY_WAY, memory=MEMORY_MIB)
        error = ended.refused(3, fault.code, says=fault.says)
        assert str(path) in error["what"], door
        assert not canary.exists(), f"{door} ran code from the file"
        assert not (out / "pruned").exists()
        assert stages(out / "run") == []


@pytest.mark.filterwarnings("ignore:.*torch.jit")
@pytest.mark.parametrize("name", map(marked, FAULTS))
def test_refused_and_nothing_runs(terminal, canary, tmp_path, name):
    """At one door each, in turn; the next test tries them all."""
    door = ["run", "inspect", "evaluate", "prune"][list(FAULTS).index(name) % 4]
    attack(terminal, canary, tmp_path, FAULTS[name], [door])


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*torch.jit")
@pytest.mark.parametrize("name", map(marked, FAULTS))
def test_refused_at_every_door_and_nothing_runs(terminal, canary, tmp_path, name):
    attack(terminal, canary, tmp_path, FAULTS[name], ["inspect", "evaluate", "prune", "run"])


@pytest.mark.fault(1)
@pytest.mark.parametrize("name", ["inspect", "run"])
def test_a_checkpoint_that_may_not_be_read(terminal, tmp_path, name):
    out = tmp_path / "out"
    out.mkdir()
    path = corpus.dense(tmp_path / "w.pth")
    words = doors(path, out)[name]
    path.chmod(0)
    ended = terminal(*words, "--json", ordinary=True)
    assert "Permission denied" in ended.refused(3, "checkpoint-unreadable")["why"]
