"""A pruned network on disk: the same outputs in any process, no pickle, and no silent damage."""

from __future__ import annotations

import copy
import json
import os
import pickletools
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from cutting import random_plan
from nets import images
from safetensors import safe_open
from torch import Tensor, nn

from seprune.checkpoint import load_weights
from seprune.errors import InputError, UsageError
from seprune.export.architecture import Architecture, architecture_of, rebuilt
from seprune.export.pruned_model import load, read_architecture, save
from seprune.graph.groups import find_structure
from seprune.models import ModelLoader, build, zoos
from seprune.pruning.analyse import analyse
from seprune.pruning.plan import PruningPlan
from seprune.pruning.prune import prune
from seprune.runtime.checksums import SUMS, check_sums
from seprune.runtime.files import write_sums

ROOT = Path(__file__).parents[2]
NAME = "seprune/se_resnet20"
CODE = '''
import torch
from torch import nn


class Odd(nn.Module):
    """Tied weights, a buffer that no state dict holds, and a tensor that is no buffer."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.one, self.two = nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 1)
        self.two.weight = self.one.weight
        self.head = nn.Linear(8, 3)
        self.register_buffer("table", torch.arange(3.0), persistent=False)
        self.shift = torch.tensor([1.0, 2.0, 3.0])

    def forward(self, x):
        y = self.two(self.one(self.stem(x)).relu()).mean((2, 3))
        return self.head(y) + self.table + self.shift


def odd():
    return Odd()
'''


@pytest.fixture(scope="module")
def cut() -> tuple[nn.Module, Architecture]:
    """A small CIFAR network with norms that are no identities, and how it came about."""
    torch.manual_seed(0)
    model = build(NAME, classes=4).eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.uniform_(-0.2, 0.2)
            module.running_var.uniform_(0.8, 1.5)
    plan = random_plan(analyse(model, images(2, 32)), share=0.5)
    return prune(model, plan).eval(), Architecture(NAME, 4, plans=(plan,))


def answer(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(images(2, 32))


def elsewhere(folder: Path, code: str) -> Tensor:
    """The outputs of the network in `folder`, loaded by another process."""
    script = (
        "import sys, torch, seprune; torch.set_num_threads(1)\n"
        "x = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))\n"
        f"loader = seprune.ModelLoader.allowing({code!r})\n"
        "model = seprune.load(sys.argv[1], loader=loader)\n"
        "print(model(x).detach().double().tolist())"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, str(folder)],
        capture_output=True, text=True, cwd=ROOT, check=False,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return torch.tensor(json.loads(done.stdout), dtype=torch.float64)


# -- there and back --------------------------------------------------------------------------------


def test_outputs_are_bit_equal(cut, tmp_path):
    model, architecture = cut
    folder = tmp_path / "Größe 0.5 ✂"  # spaces and letters of the world
    save(model, folder, architecture, about={"top1": 0.5})
    assert sorted(p.name for p in folder.iterdir()) == [
        SUMS, "config.json", "model.safetensors", "plan.json",
    ]  # fmt: skip
    again = load(folder)
    assert torch.equal(answer(again), answer(model))
    assert not again.training
    config = json.loads((folder / "config.json").read_text())
    assert (config["architecture"], config["num_classes"], config["top1"]) == (NAME, 4, 0.5)


def test_a_folder_holds_no_pickle_and_sums_that_others_can_check(cut, tmp_path):
    model, architecture = cut
    save(model, tmp_path / "m", architecture)
    for path in (tmp_path / "m").iterdir():
        assert not path.read_bytes().startswith((b"PK", b"\x80\x02"))
        with pytest.raises(Exception):  # noqa: B017, PT011 - any complaint will do
            list(pickletools.genops(path.read_bytes()))
    with safe_open(tmp_path / "m" / "model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}  # what model hubs look for
    done = subprocess.run(["sha256sum", "-c", SUMS], cwd=tmp_path / "m", capture_output=True)
    assert done.returncode == 0


def test_a_pruned_network_can_be_pruned_again(cut, tmp_path):
    model, architecture = cut
    plan = random_plan(analyse(model, images(2, 32)), seed=1, share=0.7)
    twice = prune(model, plan).eval()
    save(twice, tmp_path / "m", architecture.cut(plan))
    assert (tmp_path / "m" / "plan-2.json").is_file()
    assert torch.equal(answer(load(tmp_path / "m")), answer(twice))
    assert len(read_architecture(tmp_path / "m").plans) == 2
    # the same folder once more, with the first cut only: the second plan is not read
    save(model, tmp_path / "m", architecture)
    assert torch.equal(answer(load(tmp_path / "m")), answer(model))


def test_a_network_without_a_cut_is_a_folder_too(tmp_path):
    model = build(NAME, classes=4).eval()
    save(model, tmp_path / "m", Architecture(NAME, 4))
    assert not (tmp_path / "m" / "plan.json").exists()
    assert torch.equal(answer(load(tmp_path / "m")), answer(model))


def test_channels_last_weights_are_saved(cut, tmp_path):
    model, architecture = cut
    expected = answer(model)
    model = prune(model, PruningPlan((), {})).to(memory_format=torch.channels_last)
    save(model, tmp_path / "m", architecture)
    assert torch.equal(answer(load(tmp_path / "m")), expected)


def test_tied_weights_loose_buffers_and_loose_tensors_come_back(tmp_path):
    (tmp_path / "odd.py").write_text(CODE)
    name = f"{tmp_path / 'odd.py'}:odd"
    torch.manual_seed(0)
    model = ModelLoader.allowing(name).build(name).eval()
    plan = random_plan(analyse(model, images(2, 32)))
    small = prune(model, plan).eval()
    small.table.add_(1)
    folder = tmp_path / "Größe 0.5 ✂"
    save(small, folder, Architecture(name, plans=(plan,)))
    again = load(folder, loader=ModelLoader.allowing(name))
    assert torch.equal(answer(again), answer(small))
    assert again.one.weight is again.two.weight
    assert again.table.tolist() == [1, 2, 3]
    assert len(list(again.parameters())) == len(list(small.parameters()))
    assert torch.equal(elsewhere(folder, code=name), answer(small).double())
    with pytest.raises(UsageError, match="allow-code"):
        load(folder)


VALUES = """
import numpy as np
import torch
from torch import nn
class Net(nn.Module):
    def __init__(self, how):
        super().__init__()
        rates = torch.linspace(0.1, 0.3, 2)
        self.rates = {
            "item": lambda: [r.item() for r in rates], "tolist": rates.tolist,
            "numpy": lambda: np.array(rates.numpy()).tolist(),
            "float": lambda: list(map(float, rates)),
            "branch": lambda: [0.1 if rates.sum() > 0 else 0.0] * 2,
        }[how]()
        self.a, self.b = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 5, 1)
        with torch.no_grad():
            side = self.a(torch.zeros(1, 3, 9, 9)).shape[2]
        self.scale = torch.tensor(1.0 + side)
    def forward(self, x):
        return self.b(self.a(x).relu() * (1 - self.rates[0]) * self.scale).mean((2, 3))
"""


@pytest.mark.parametrize("how", ["item", "tolist", "numpy", "float", "branch"])
def test_a_network_that_computes_with_values_while_it_is_built_comes_back(how, tmp_path):
    """Such as rates by `linspace`, which have none on the meta device."""
    (tmp_path / "net.py").write_text(VALUES)
    name = f"{tmp_path / 'net.py'}:Net"
    loader = ModelLoader.allowing(name)
    model = loader.build(name, how=how).eval()
    plan = random_plan(find_structure(model, images(2, 32)))
    small = prune(model, plan).eval()
    save(small, tmp_path / "m", Architecture(name, args={"how": how}).cut(plan))
    again = load(tmp_path / "m", loader=loader)
    assert not any(t.is_meta for t in [*again.parameters(), again.scale])
    assert torch.equal(answer(again), answer(small))


def test_what_a_build_imports_has_values_ever_after(tmp_path, monkeypatch):
    """A module's tensors are made once, by whichever build comes first."""
    (tmp_path / "constants_of_net.py").write_text("import torch\nMEAN = torch.tensor([0.5])\n")
    (tmp_path / "net.py").write_text(
        "from torch import nn\n"
        "def net():\n    from constants_of_net import MEAN\n"
        "    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 4, 1), nn.Flatten())\n"
        "    model.mean = MEAN\n    return model\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    name = f"{tmp_path / 'net.py'}:net"
    made = rebuilt(Architecture(name), loader=ModelLoader.allowing(name))
    assert made.mean.tolist() == [0.5]
    with torch.device("meta"):
        found = zoos._import("constants_of_net")
        monkeypatch.delitem(sys.modules, "constants_of_net")
        again = zoos._import("constants_of_net")
    assert found.MEAN.tolist() == again.MEAN.tolist() == [0.5]


def test_a_network_that_cannot_be_built_without_data_is_built_on_the_cpu(tmp_path):
    """torchvision's RegNet computes its widths with tensors."""
    name = "torchvision/regnet_y_400mf"
    architecture = Architecture(name, 4)
    assert not any(t.is_meta for t in rebuilt(architecture).parameters())
    torch.manual_seed(0)
    model = build(name, classes=4).eval()
    plan = random_plan(find_structure(model, images(2, 32)))
    small = prune(model, plan).eval()
    save(small, tmp_path / "m", architecture.cut(plan))
    again = load(tmp_path / "m")
    assert not any(t.is_meta for t in [*again.parameters(), *again.buffers()])
    assert torch.equal(answer(again), answer(small))


def test_a_loaded_network_learns(cut, tmp_path):
    model, architecture = cut
    save(model, tmp_path / "m", architecture)
    again = load(tmp_path / "m").train()
    again(images(2, 32)).square().sum().backward()
    assert all(p.grad is not None for p in again.parameters())


# -- damage ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["model.safetensors", "plan.json", "config.json"])
def test_a_flipped_bit_is_found(cut, tmp_path, name):
    model, architecture = cut
    folder = tmp_path / "m"
    save(model, folder, architecture)
    content = bytearray((folder / name).read_bytes())
    place = content.rindex(b"\n") - 3 if name == "config.json" else len(content) - 9
    content[place] ^= 1
    (folder / name).write_bytes(content)
    if name == "config.json":  # may be no JSON any more
        with pytest.raises(InputError):
            load(folder)
        return
    with pytest.raises(InputError) as caught:
        load(folder)
    assert caught.value.what == f"{folder}: {name} changed or missing since seprune wrote it"
    assert caught.value.why == "the hashes in SHA256SUMS do not match"
    assert (caught.value.code, caught.value.exit_status) == ("damaged", 3)
    assert (folder / name).read_bytes() == bytes(content)


@pytest.mark.parametrize("name", ["model.safetensors", "plan.json", SUMS])
def test_a_missing_file_is_named(cut, tmp_path, name):
    model, architecture = cut
    save(model, tmp_path / "m", architecture)
    (tmp_path / "m" / name).unlink()
    with pytest.raises(InputError, match=f"{name} changed or missing since seprune wrote it"):
        load(tmp_path / "m")


def resigned(folder: Path, change: tuple[str, str], name: str = "config.json") -> Path:
    """Somebody edits a file and writes the sums again."""
    text = (folder / name).read_text()
    assert change[0] in text
    (folder / name).write_text(text.replace(*change))
    write_sums(folder)
    assert check_sums(folder) == []
    return folder


def test_a_folder_of_a_newer_version_asks_for_an_upgrade(cut, tmp_path):
    model, architecture = cut
    save(model, tmp_path / "m", architecture)
    folder = resigned(tmp_path / "m", ('"format": 1', '"format": 7'))
    with pytest.raises(InputError) as caught:
        load(folder)
    assert str(caught.value) == (
        f"{folder / 'config.json'}: folder format 7, this seprune reads 1\n"
        "why: a newer version of seprune wrote it\n"
        "next: upgrade seprune: pip install -U seprune"
    )
    assert caught.value.code == "newer"


def test_a_folder_that_names_code_runs_nothing(cut, tmp_path):
    model, architecture = cut
    save(model, tmp_path / "m", architecture)
    canary = tmp_path / "canary"
    (tmp_path / "evil.py").write_text(f"open({str(canary)!r}, 'w')\ndef f(): pass\n")
    folder = resigned(
        tmp_path / "m", (f'"model": "{NAME}"', f'"model": "{tmp_path / "evil.py"}:f"')
    )
    with pytest.raises(UsageError, match="allow-code"):
        load(folder)
    assert not canary.exists()


def test_weights_that_do_not_fit_the_plan_are_refused(cut, tmp_path):
    folder = tmp_path / "m"
    save(cut[0], folder)
    save(build(NAME, classes=4), tmp_path / "dense")
    (folder / "model.safetensors").write_bytes((tmp_path / "dense/model.safetensors").read_bytes())
    write_sums(folder)  # somebody mixed the files of two folders, hashes included
    with pytest.raises(InputError) as caught:
        load(folder)
    assert caught.value.what == f"{folder}: the weights do not fit the network that its plan makes"
    assert "tensors missing or of another shape or kind, 0 not known; first: " in caught.value.why


def test_a_network_knows_how_it_is_built_again_through_copies_and_cuts(cut, tmp_path):
    dense = build(NAME, classes=4)
    assert architecture_of(dense) == Architecture(NAME, 4, None, {})
    small, given = cut
    known = architecture_of(copy.deepcopy(small))
    assert known is not None
    assert (known.name, known.classes) == (NAME, 4)
    assert [p.widths() for p in known.plans] == [p.widths() for p in given.plans]
    save(small, tmp_path / "m")
    again = load(tmp_path / "m")
    twice = prune(again, random_plan(find_structure(again, images()), seed=3))
    save(twice, tmp_path / "twice")
    with torch.no_grad():
        assert torch.equal(load(tmp_path / "twice")(images()), twice.eval()(images()))


class Own(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 1)


def test_what_load_could_not_build_is_refused_before_anything_is_written(cut, tmp_path):
    other_head = build(NAME, classes=4)
    other_head.fc = nn.Linear(64, 7)  # as people replace a head
    (tmp_path / "net.py").write_text("raise SystemExit('this file was run')\ndef net(): pass\n")
    wrong = {
        "Own: not saved": (Own(), None),
        r"not saved: seprune/se_resnet20 with 0 plans makes another network than this": (
            other_head, None,
        ),
        r"why: bn1\.\w+: the model has \(\d+,\), it makes \(16,\)": (cut[0], Architecture(NAME, 4)),
        r"net\.py: no function absent": (Own(), Architecture(f"{tmp_path}/net.py:absent")),
        r"gone\.py: cannot be read as Python": (Own(), Architecture(f"{tmp_path}/gone.py:net")),
    }  # fmt: skip
    for text, (model, architecture) in wrong.items():
        with pytest.raises(InputError, match=text):
            save(model, tmp_path / "m", architecture)
        assert not (tmp_path / "m").exists()
    save(Own(), tmp_path / "m", Architecture(f"{tmp_path}/net.py:net"))  # read, never run
    assert load_weights(tmp_path / "m").tensors["conv.weight"].shape == (4, 3, 1, 1)


def test_other_folders_are_not_ours(tmp_path):
    (tmp_path / "config.json").write_text('{"architecture": "resnet50"}')
    with pytest.raises(InputError) as caught:
        load(tmp_path)
    assert caught.value.what == f"{tmp_path / 'config.json'}: not written by seprune"
    with pytest.raises(InputError, match="no such file"):
        load(tmp_path / "nothing")


def test_weights_that_are_not_finite_are_not_saved(tmp_path):
    model = build(NAME, classes=4)
    with torch.no_grad():
        next(model.parameters()).view(-1)[0] = float("nan")
    with pytest.raises(InputError) as caught:
        save(model, tmp_path / "m", Architecture(NAME, 4))
    assert caught.value.what == "the model is not saved: 1 tensors hold NaN or infinities"
    assert not (tmp_path / "m" / "model.safetensors").exists()


def test_the_folder_can_stand_where_a_checkpoint_is_expected(cut, tmp_path):
    """FAULTS row 15: its weights are what a checkpoint reader gets."""
    model, architecture = cut
    save(model, tmp_path / "m", architecture)
    tensors = load_weights(tmp_path / "m").tensors
    assert torch.equal(tensors["fc.weight"], model.state_dict()["fc.weight"])
