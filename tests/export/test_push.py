"""A folder pushed to a Hub on loopback and loaded from there, by real requests."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from cutting import random_plan
from hub_server import Hub, serving
from huggingface_hub import HfApi, ModelCard, constants
from nets import images
from PIL import Image
from reports import make_report

import seprune
import seprune.export.hub
from seprune import cli
from seprune.errors import EnvironmentFault, InputError, UsageError
from seprune.export.hub import pushed_folder
from seprune.models.hub import HubAccess, HubRepo
from seprune.models.preprocessing import Preprocessing, TrainedFor, remember_training
from seprune.pipeline.network import open_network
from seprune.pipeline.reporting import card_files
from seprune.recipe.sections import ModelSection

HOW = Preprocessing((3, 32, 32), (0.1, 0.2, 0.3), (0.4, 0.5, 0.6), (36, 36), source="a test")


@pytest.fixture
def hub(tmp_path, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setenv("HF_TOKEN", "hf_test")
    with serving(Hub()) as made:
        monkeypatch.setenv("HF_ENDPOINT", made.url)
        monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda _: None)
        yield made


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    torch.manual_seed(0)
    model = seprune.build("seprune/se_resnet20", classes=4).eval()
    small = seprune.prune(model, random_plan(seprune.analyse(model, images(2, 32)), share=0.5))
    known = TrainedFor(HOW, "classification", tuple("abcd"), "timm/seresnet18.x")
    path = tmp_path_factory.mktemp("saved") / "small"
    seprune.save(remember_training(small, known), path, about={"metrics": {"top1": 0.875}})
    return path


def test_what_was_pushed_comes_back_bit_for_bit(hub, folder):
    url = seprune.push_to_hub(folder, "us/small")
    assert url.startswith(hub.url)
    assert set(hub.repos["us/small"]) == {p.name for p in folder.iterdir()} | {"README.md"}
    for path in folder.iterdir():
        assert hub.repos["us/small"][path.name] == path.read_bytes()
    loaded, own = seprune.load("hf-hub:us/small"), seprune.load(folder)
    with torch.no_grad():
        assert torch.equal(loaded(images(2, 32)), own(images(2, 32)))
    known = seprune.trained_for(loaded)
    assert (known.labels, known.base_model) == (tuple("abcd"), "timm/seresnet18.x")
    assert known.preprocessing.mean == HOW.mean
    network = open_network(ModelSection(name="hf-hub:us/small"))
    assert network.published == {"top1": 0.875}
    assert network.trained_for.preprocessing.source == "hf-hub:us/small"


def test_a_network_itself_is_pushed_and_comes_back_by_its_bare_name(hub, folder, tmp_path):
    """As `push_to_hub` and `from_pretrained` of other libraries."""
    model = seprune.load(folder)
    url = seprune.push_to_hub(model, "us/bare", about={"metrics": {"top1": 0.5}})
    assert url.startswith(hub.url)
    again = seprune.from_pretrained("us/bare")
    own = seprune.from_pretrained(folder)
    with torch.no_grad():
        assert torch.equal(again(images(2, 32)), own(images(2, 32)))
    assert seprune.trained_for(again).labels == tuple("abcd")
    assert open_network(ModelSection(name="hf-hub:us/bare")).published == {"top1": 0.5}
    for name in ("us/none", tmp_path / "none", "none"):
        with pytest.raises(seprune.SepruneError) as caught:
            seprune.from_pretrained(name)
        assert caught.value.fix
    with pytest.raises(InputError, match="nothing says how to build it again"):
        seprune.push_to_hub(torch.nn.Linear(2, 2), "us/bare")


def test_data_with_other_names_of_classes_and_other_channels_are_named(folder, tmp_path, seprune):
    for part, number in (("train", 3), ("val", 2)):
        for name in ("1", "2", "10", "20"):  # sorted as text: 1, 10, 2, 20
            (tmp_path / part / name).mkdir(parents=True)
            for n in range(number):
                Image.new("RGB", (32, 32), (n, n, n)).save(tmp_path / part / name / f"{n}.png")
    words = ("evaluate", folder, "--data", tmp_path)
    status, _, err = seprune(*words)
    said = " ".join(err.split())
    assert status == 0, err
    assert (
        "classes are called a, b, c, ..., those of the data 1, 10, 2, ...: they are taken" in said
    )
    assert "warning: top-1: 25.00 % measured, 87.50 % published with the weights" in said
    status, _, err = seprune(*words, "--input", "1x32x32")
    assert (status, "the weights are for images of 3 channels" in err) == (2, True)
    assert "next: --input 3x32x32" in err


def test_a_branch_a_token_and_a_cache_of_ones_own(hub, folder, tmp_path, monkeypatch):
    """By the names that the mixin of the Hub's library has for them."""
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(InputError, match="does not let you push"):
        seprune.push_to_hub(folder, "us/small")
    seprune.push_to_hub(folder, "us/small", token="hf_test", private=True, branch="half")
    assert hub.repos["us/small"] == {}
    assert (
        'seprune.load("hf-hub:us/small@half")' in hub.repos["us/small@half"]["README.md"].decode()
    )
    hub.private.add("us/small")
    with pytest.raises(InputError, match="no such repository, or a private one"):
        seprune.from_pretrained("us/small", revision="half")
    how = {"revision": "half", "token": "hf_test", "cache_dir": tmp_path / "own"}
    first = seprune.from_pretrained("us/small", **how)
    assert (tmp_path / "own" / "models--us--small").is_dir()
    assert not (tmp_path / "cache").exists()
    asked = len(hub.requests)
    again = seprune.from_pretrained("us/small", **how, local_files_only=True)
    assert len(hub.requests) == asked
    with torch.no_grad():
        assert torch.equal(again(images(2, 32)), first(images(2, 32)))
    with pytest.raises(EnvironmentFault, match="is not in the cache") as caught:
        seprune.from_pretrained("us/other", local_files_only=True)
    assert "local_files_only" in caught.value.why
    with pytest.raises(InputError, match="no such revision"):
        seprune.from_pretrained("us/small", revision="v9", token="hf_test")
    with pytest.raises(UsageError, match="a folder has no revision v9"):
        seprune.from_pretrained(str(folder), revision="v9")
    assert "hf_test" not in repr(HubAccess("hf_test"))


def test_the_card_says_what_it_is_and_how_to_use_it(hub, folder):
    seprune.push_to_hub(folder, "us/small")
    text = hub.repos["us/small"]["README.md"].decode()
    data = ModelCard(text).data
    assert (data.library_name, data.base_model) == ("seprune", "timm/seresnet18.x")
    assert data.pipeline_tag == "image-classification"
    assert 'seprune.load("hf-hub:us/small")' in text
    assert "np.float32([0.1, 0.2, 0.3])" in text
    assert "| top-1 | 87.50 % |" in text


@pytest.mark.parametrize("name", ["README.md", "accuracy.png"])
def test_what_is_a_link_is_not_pushed(hub, folder, tmp_path, name):
    """What it leads to may be a secret of whoever pushes somebody else's folder."""
    copied = tmp_path / "copy"
    shutil.copytree(folder, copied)
    (tmp_path / "secret").write_text("key")
    (copied / name).unlink(missing_ok=True)
    (copied / name).symlink_to(tmp_path / "secret")
    with pytest.raises(InputError, match=rf"{name}' in it\nwhy: .* is a link"):
        seprune.push_to_hub(copied, "us/linked")
    assert "us/linked" not in hub.repos


def test_a_card_that_is_there_is_pushed_as_it_is(hub, folder, tmp_path):
    copied = tmp_path / "copy"
    copied.mkdir()
    for path in folder.iterdir():
        (copied / path.name).write_bytes(path.read_bytes())
    (copied / "README.md").write_text("my own words\n")
    seprune.push_to_hub(copied, "us/small")
    assert hub.repos["us/small"]["README.md"] == b"my own words\n"
    (copied / "plan.json").write_text("{}")
    with pytest.raises(InputError, match=r"not pushed, plan\.json changed"):
        seprune.push_to_hub(copied, "us/small")


@pytest.mark.parametrize("when", ["while it is read", "while it is sent"])
def test_a_network_that_is_saved_over_meanwhile_is_pushed_whole(
    hub, folder, tmp_path, monkeypatch, when
):
    """As the new one or as the old one, never with weights of the one and hashes of the other."""
    copied = tmp_path / "copy"
    shutil.copytree(folder, copied)
    other = seprune.load(folder)
    for parameter in other.parameters():
        parameter.data += 0.5
    read = when == "while it is read"
    place, name = (seprune.export.hub, "open_regular") if read else (HfApi, "create_repo")
    real, calls = getattr(place, name), []

    def saving(*given, **named):
        calls.append(name)
        if len(calls) == 1 + read:  # after the first of the files
            seprune.save(other, copied)
        return real(*given, **named)

    monkeypatch.setattr(place, name, saving)
    seprune.push_to_hub(copied, "us/small")
    whole = {n: c for n, c in hub.repos["us/small"].items() if n != "README.md"}
    pushed = copied if read else folder
    assert whole == {n: (pushed / n).read_bytes() for n in whole}
    old, new = ((place / "model.safetensors").read_bytes() for place in (folder, copied))
    assert old != new


def test_a_report_s_card_goes_with_its_picture_and_says_where_it_is_now(hub, folder, tmp_path):
    copied = tmp_path / "copy"
    shutil.copytree(folder, copied)
    report = make_report(budgets=(0.5,))
    for name, content in card_files(report, report.measurements[-1]).items():
        (copied / name).write_bytes(content)
    (copied / "report.json").write_text("{}")
    seprune.push_to_hub(copied, "us/small")
    found = hub.repos["us/small"]
    assert found["accuracy.png"] == (copied / "accuracy.png").read_bytes()
    card = found["README.md"].decode()
    assert 'seprune.load("hf-hub:us/small")' in card
    assert "](accuracy.png)" in card
    assert "report.json" not in found  # with the paths of this machine
    assert seprune.load("hf-hub:us/small")(images(2, 32)).shape == (2, 4)


def test_a_push_needs_permission_and_a_connection(hub, folder, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_other")
    with pytest.raises(InputError, match="the Hub does not let you push") as caught:
        seprune.push_to_hub(folder, "us/small")
    assert caught.value.code == "hub"
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(EnvironmentFault, match="not pushed"):
        seprune.push_to_hub(folder, "us/small")
    assert hub.repos == {}


def test_a_damaged_copy_on_the_hub_is_named(hub, folder):
    seprune.push_to_hub(folder, "us/small")
    hub.repos["us/small"]["plan.json"] += b" "
    with pytest.raises(InputError, match=r"plan\.json changed or missing") as caught:
        seprune.load("hf-hub:us/small")
    assert caught.value.code == "damaged"
    hub.repos["us/small"]["SHA256SUMS"] += b"0" * 64 + b"  ../../x\n"
    with pytest.raises(InputError):
        seprune.load("hf-hub:us/small")
    assert not any("/x" in request for request in hub.requests)


def test_a_repository_does_not_make_one_ask_for_thousands_of_files(hub, folder):
    seprune.push_to_hub(folder, "us/small")
    lines = (f"{'0' * 64}  {number}\n" for number in range(1000))
    hub.repos["us/small"]["SHA256SUMS"] += "".join(lines).encode()
    with pytest.raises(InputError, match=r"1,00\d files, more than the 200"):
        seprune.load("hf-hub:us/small")
    assert len(hub.requests) < 60


def test_other_repositories_are_no_folders_of_seprune(hub):
    hub.repos["us/other"] = {"config.json": b'{"model_type": "bert"}'}
    with pytest.raises(InputError, match="not pushed by seprune"):
        seprune.load("hf-hub:us/other")


def test_the_command_pushes_the_network_of_a_run(hub, folder, monkeypatch, capsys, tmp_path):
    run = tmp_path / "run" / "finetuned"
    run.parent.mkdir()
    folder.rename(run)
    try:
        monkeypatch.setattr(sys, "argv", ["seprune", "push", str(run.parent), "us/run", "--json"])
        with pytest.raises(SystemExit) as stop:
            cli.main()
        output = capsys.readouterr()
    finally:
        run.rename(folder)
    assert not stop.value.code, output.err
    assert json.loads(output.out)["name"] == "us/run"
    assert "model.safetensors" in hub.repos["us/run"]


def test_a_folder_of_many_networks_is_not_listed_to_its_end(request, tmp_path):
    command = request.getfixturevalue("seprune")
    for number in range(7):
        place = tmp_path / f"run{number}" / "pruned"
        place.mkdir(parents=True)
        (place / "config.json").touch()
    status, _, err = command("push", tmp_path, "us/small")
    assert status == 2
    assert "holds 7 networks" in err
    assert "run4/pruned and 2 more" in " ".join(err.split())
    assert f"seprune push {tmp_path}/run0/pruned" in err


@pytest.mark.slow
def test_a_network_of_a_hub_is_exported_and_has_no_report_here(hub, folder, tmp_path, request):
    command = request.getfixturevalue("seprune")
    seprune.push_to_hub(folder, "us/small")
    status, _, err = command("export", "hf-hub:us/small", "--onnx", tmp_path / "small.onnx")
    assert status == 0, err
    assert (tmp_path / "small.onnx").is_file()
    assert "next:" not in err


OWN = """
from torch import nn

class Squeezed(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.down, self.up = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 4, 1), nn.Conv2d(4, 8, 1)
        self.fc = nn.Linear(8, 4)

    def forward(self, x):
        x = self.conv(x).relu()
        x = x * self.up(self.down(x.mean((2, 3), keepdim=True)).relu()).sigmoid()
        return self.fc(x.mean((2, 3)))

def network():
    return Squeezed()
"""


def test_a_network_of_ones_own_code_comes_back_where_its_file_is_and_may_run(
    hub, tmp_path, monkeypatch, request
):
    monkeypatch.chdir(tmp_path)
    Path("own.py").write_text(OWN)
    loader = seprune.ModelLoader.allowing("own.py:network")
    seprune.push_to_hub(loader.build("own.py:network", input=(3, 16, 16)), "us/own")
    command = request.getfixturevalue("seprune")
    status, _, err = command("inspect", "hf-hub:us/own")
    assert (status, "add --allow-code" in err) == (2, True)
    del hub.requests[:]
    status, out, err = command("inspect", "hf-hub:us/own", "--allow-code", "--json")
    assert status == 0, err
    assert [gate["channels"] for gate in json.loads(out)["gates"]] == [8]
    asked = [line for line in hub.requests if line.endswith("/config.json")]
    assert len(asked) == 2  # whether there is a Hub, and for its etag
    copy = shutil.copytree(pushed_folder(HubRepo.of("hf-hub:us/own")), "copy")
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "empty"))
    status, _, err = command("inspect", "hf-hub:us/own", "--allow-code", "--checkpoint", copy)
    assert status == 0, err


def test_a_network_that_python_made_is_pushed_as_the_error_says(hub, tmp_path, monkeypatch):
    """A class of the user's own, made by calling it and cut, says nothing of how it is made."""
    monkeypatch.chdir(tmp_path)
    Path("own.py").write_text(OWN)
    names: dict[str, Any] = {}
    exec(compile(OWN, "own.py", "exec"), names)
    model = names["network"]().eval()
    given = images(4, 16)
    plan = random_plan(seprune.analyse(model, given))
    small = seprune.prune(model, plan).eval()
    with pytest.raises(InputError) as caught:
        seprune.push_to_hub(small, "us/own")
    assert "as third argument of seprune.save" in caught.value.fix
    made = seprune.Architecture("own.py:network").cut(plan)
    seprune.save(small, tmp_path / "small", made)
    seprune.push_to_hub(tmp_path / "small", "us/own")
    loader = seprune.ModelLoader.allowing("own.py:network")
    back = seprune.from_pretrained("us/own", loader=loader)
    assert torch.equal(back(given), small(given))
