"""Published weights by name, from a Hub on loopback and from torchvision's files: real requests."""

from __future__ import annotations

import errno
import hashlib
import json
import resource
import threading
import time
from contextlib import contextmanager
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from hub_server import Hub, serving
from huggingface_hub import constants
from PIL import Image
from safetensors.torch import save
from torchvision.models import EfficientNet_B0_Weights, WeightsEnum, get_model
from torchvision.models._api import Weights

from seprune import from_pretrained, trained_for
from seprune.data.preprocessing import fit, normalise, to_pixels
from seprune.errors import EnvironmentFault, InputError, UsageError
from seprune.export.pruned_model import load
from seprune.models import ModelLoader, zoos
from seprune.models.cache import cache_fault
from seprune.models.hub import HubRepo, fetch
from seprune.models.preprocessing import of_transformers
from seprune.models.pretrained import fetch_published
from seprune.pipeline.inputs import open_both
from seprune.pipeline.network import open_network
from seprune.recipe import recipe_of
from seprune.recipe.sections import ModelSection

ARCH = "test_byobnet"  # timm's own smallest network with SE
REPO = f"timm/{ARCH}.r160_in1k"
MEANS = {"mean": [0.1, 0.2, 0.3], "std": [0.4, 0.5, 0.6]}


def timm_files(classes: int = 10, seed: int = 0) -> dict[str, bytes]:
    """What timm pushes of a network."""
    torch.manual_seed(seed)
    model = timm.create_model(ARCH, num_classes=classes)
    config = {
        "architecture": ARCH,
        "num_classes": classes,
        "pretrained_cfg": {"input_size": [3, 32, 32], "crop_pct": 0.8, "interpolation": "bicubic",
                           "num_classes": classes, **MEANS},
    }  # fmt: skip
    state = {name: t.contiguous() for name, t in model.state_dict().items()}
    return {"config.json": json.dumps(config).encode(), "model.safetensors": save(state)}


FILES = timm_files()


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A Hub that the library talks to, and an empty cache of its own."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    with serving(Hub({"us/net": dict(FILES), REPO: dict(FILES)})) as made:
        monkeypatch.setenv("HF_ENDPOINT", made.url)
        monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda _: None)
        yield made


@pytest.fixture
def seprune(seprune):
    """What is said on stderr, without its line breaks."""

    def call(*words: object) -> tuple[int, str, str]:
        status, out, err = seprune(*words)
        return status, out, " ".join(err.split())

    return call


def answers(model: torch.nn.Module) -> torch.Tensor:
    images = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return model.eval()(images)


def wanted() -> torch.Tensor:
    torch.manual_seed(0)
    return answers(timm.create_model(ARCH, num_classes=10))


# -- a Hub --------------------------------------------------------------------------------------


def test_a_network_of_timm_comes_with_its_weights_and_preprocessing(hub):
    network = open_network(ModelSection(name="hf-hub:us/net"))
    assert torch.equal(answers(network.model), wanted())
    assert network.architecture.name == f"timm/{ARCH}"
    assert network.architecture.classes == 10
    assert network.shape == (3, 32, 32)
    assert network.digest == hashlib.sha256(FILES["model.safetensors"]).hexdigest()
    known = network.trained_for
    assert known.base_model == "us/net"
    assert (list(known.preprocessing.mean), list(known.preprocessing.std)) == (*MEANS.values(),)
    assert known.preprocessing.resize == (40, 40)
    assert known.preprocessing.interpolation == "bicubic"


@pytest.mark.parametrize("name", ["us/net", REPO, f"hf-hub:{REPO}"])
def test_from_pretrained_takes_networks_of_timm_too(hub, monkeypatch, name):
    """By the name of a repository, which for timm's own is that of timm."""
    config = zoos.timm_config(f"{ARCH}.r160_in1k")
    monkeypatch.setattr(zoos, "timm_config", lambda name: {**config, "num_classes": 10})
    model = from_pretrained(name)
    assert torch.equal(answers(model), wanted())
    assert trained_for(model).base_model == name.removeprefix("hf-hub:")
    with pytest.raises(InputError, match="not pushed by seprune") as caught:
        load(f"hf-hub:{name.removeprefix('hf-hub:')}")
    assert f"seprune.from_pretrained('{name.removeprefix('hf-hub:')}')" in caught.value.fix


def test_the_cache_is_used_again_also_without_a_connection(hub, monkeypatch):
    open_network(ModelSection(name="hf-hub:us/net"))
    large = [r for r in hub.requests if r.startswith("GET /cdn/")]
    assert len(large) == 1
    open_network(ModelSection(name="hf-hub:us/net"))
    assert [r for r in hub.requests if r.startswith("GET /cdn/")] == large
    hub.repos.clear()
    hub.private.add("us/net")
    assert torch.equal(answers(open_network(ModelSection(name="hf-hub:us/net")).model), wanted())
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    assert torch.equal(answers(open_network(ModelSection(name="hf-hub:us/net")).model), wanted())


def test_a_new_etag_means_new_weights(hub):
    open_network(ModelSection(name="hf-hub:us/net"))
    hub.repos["us/net"] = timm_files(seed=1)
    changed = answers(open_network(ModelSection(name="hf-hub:us/net")).model)
    assert not torch.equal(changed, wanted())
    before = hub.commit("us/net")
    pinned = open_network(ModelSection(name=f"hf-hub:us/net@{before}"))
    assert torch.equal(answers(pinned.model), changed)


def test_a_broken_transfer_goes_on_where_it_stopped(hub, monkeypatch):
    hub.breaks = 5000
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 1000)
    network = open_network(ModelSection(name="hf-hub:us/net"))
    assert torch.equal(answers(network.model), wanted())
    ranges = [r for r in hub.requests if r.startswith("GET /cdn/") and "bytes=" in r]
    assert [r.rpartition(" ")[2] for r in ranges] == ["bytes=5000-"]


def test_a_transfer_that_always_breaks_is_named_and_what_came_is_kept(hub, tmp_path):
    hub.breaks = 5000  # less than the library writes at once, so it starts anew every time
    with pytest.raises(InputError, match=r"the transfer of model\.safetensors broke off") as caught:
        fetch(HubRepo("us/net"), "model.safetensors")
    assert caught.value.code == "hub-damaged"
    hub.breaks = 0
    assert fetch(HubRepo("us/net"), "model.safetensors").read_bytes() == FILES["model.safetensors"]


def test_a_wrong_hash_is_named_and_leaves_the_cache(hub):
    content = FILES["model.safetensors"]
    hub.forged = content[:-1] + bytes([content[-1] ^ 1])
    with pytest.raises(InputError, match="is not what the Hub promised") as caught:
        fetch(HubRepo("us/net"), "model.safetensors")
    assert caught.value.code == "hub-damaged"
    hub.forged = None
    assert fetch(HubRepo("us/net"), "model.safetensors").read_bytes() == content


REFUSED = {
    "nothing/here": "no such repository, or a private one",
    "us/gated": "its owner has to let you in",
    "us/private": "no such repository, or a private one",
    "us/net@v9": "no such revision",
    "us/empty": "there is no config.json in it",
    "us/bert": "its config.json says model_type 'bert', and BertForMaskedLM",
    "us/own": "its config.json has neither an architecture of timm nor a model_type",
    "us/new": "the architecture 'resnet9000', which timm lacks",
    "us/bare": "no weights",
    "us/named": "its weights have another name: best.pth",
    "us/shards": "its weights are in 2 files",
    "us/page": "config.json: not valid JSON",
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_a_hub_refuses_is_named(hub, name):
    hub.repos |= {"us/gated": dict(FILES), "us/private": dict(FILES), "us/empty": {"x": b""},
                  "us/bert": {"config.json":
                  b'{"model_type": "bert", "architectures": ["BertForMaskedLM"]}'},
                  "us/own": {"config.json": b'{"width": 16}'},
                  "us/new": {"config.json": b'{"architecture": "resnet9000"}'},
                  "us/bare": {"config.json": FILES["config.json"]},
                  "us/named": {"config.json": FILES["config.json"], "best.pth": b"0"},
                  "us/shards": {"config.json": FILES["config.json"], "model.safetensors.index.json":
                  b"{}", **{f"model-0000{n}-of-00002.safetensors": b"" for n in (1, 2)}},
                  "us/page": {"config.json": b"<html>"}}  # fmt: skip
    hub.gated.add("us/gated")
    hub.private.add("us/private")
    with pytest.raises(InputError) as caught:
        open_network(ModelSection(name=f"hf-hub:{name}"))
    assert REFUSED[name] in str(caught.value)
    assert caught.value.code == "hub"


def test_a_name_that_is_none_is_refused_before_anything_is_asked(hub):
    for name in ("hf-hub:net", "hf-hub:a/b/c", "hf-hub:../x"):
        with pytest.raises(UsageError, match="not the name of a repository"):
            open_network(ModelSection(name=name))
    assert hub.requests == []


def test_pickles_need_permission_and_run_nothing(hub, tmp_path):
    files = dict(FILES)
    torch.manual_seed(0)
    torch.save(timm.create_model(ARCH, num_classes=10).state_dict(), tmp_path / "w.bin")
    del files["model.safetensors"]
    hub.repos["us/old"] = {**files, "pytorch_model.bin": (tmp_path / "w.bin").read_bytes()}
    section = ModelSection(name="hf-hub:us/old")
    with pytest.raises(InputError, match=r"its weights are a pickle, pytorch_model\.bin") as caught:
        open_network(section)
    assert caught.value.code == "hub-pickle"
    network = open_network(section, loader=ModelLoader(pickles=True))
    assert torch.equal(answers(network.model), wanted())


def test_another_head_is_named(hub):
    with pytest.raises(InputError, match="weights for 10 classes, the model has 7") as caught:
        open_network(ModelSection(name="hf-hub:us/net", classes=7))
    assert caught.value.code == "checkpoint-classes"


@pytest.mark.parametrize(("at", "option"), [("", ""), ("@half", " --revision half")])
def test_no_connection_says_how_to_fetch_the_file_elsewhere(hub, monkeypatch, at, option):
    """The revision that was asked for, and no other one."""
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")  # nobody listens there
    with pytest.raises(EnvironmentFault, match="cannot be downloaded, and is not in") as caught:
        open_network(ModelSection(name=f"hf-hub:us/net{at}"))
    assert caught.value.code == "offline"
    assert f"hf download us/net{option} --local-dir net" in caught.value.fix
    assert caught.value.fix.endswith("--checkpoint net")


def test_a_missing_connection_is_reported_within_seconds(hub, monkeypatch):
    """The library itself goes on trying for 23 s; here nothing is replaced but the endpoint."""
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", time.sleep)
    start = time.monotonic()
    with pytest.raises(EnvironmentFault, match="cannot be downloaded") as caught:
        fetch(HubRepo("us/net"), "config.json")
    assert "http://127.0.0.1:9 does not answer" in caught.value.why
    assert time.monotonic() - start < 6


def test_a_copy_of_a_repository_stands_for_it(hub, tmp_path, monkeypatch):
    """What the error tells people to do: fetched elsewhere, given with --checkpoint."""
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    for name, content in FILES.items():
        (tmp_path / name).write_bytes(content)
    section = ModelSection(name="hf-hub:us/net", checkpoint=str(tmp_path))
    network = open_network(section)
    assert torch.equal(answers(network.model), wanted())
    assert network.trained_for.preprocessing.mean == (0.1, 0.2, 0.3)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(InputError, match="no weights"):
        open_network(section)
    with pytest.raises(InputError) as caught:
        open_network(ModelSection(name="hf-hub:us/net", checkpoint=str(tmp_path / "gone")))
    assert caught.value.code == "checkpoint-missing"
    assert hub.requests == []


def test_a_preprocessing_file_that_contradicts_timms_is_named(hub, tmp_path):
    """The same by a copy of the repository and by requests."""
    hub.repos["us/net"]["preprocessor_config.json"] = json.dumps(
        PROCESSOR | {"resample": 2}
    ).encode()
    for name, content in hub.repos["us/net"].items():
        (tmp_path / name).write_bytes(content)
    for where, checkpoint in (("hf-hub:us/net", None), (str(tmp_path), str(tmp_path))):
        network = open_network(ModelSection(name="hf-hub:us/net", checkpoint=checkpoint))
        known = network.trained_for.preprocessing
        assert known.source == (
            f"{where}/config.json; preprocessor_config.json says otherwise of resize, scaling, "
            "interpolation"
        )
        assert known.interpolation == "bicubic"


def test_weights_of_ones_own_go_before_those_of_the_repository(hub, tmp_path):
    hub.repos["us/net"]["README.md"] = CARD.encode()
    del hub.repos["us/net"]["model.safetensors"]
    own = tmp_path / "own.safetensors"
    own.write_bytes(timm_files(seed=1)["model.safetensors"])
    network = open_network(ModelSection(name="hf-hub:us/net", checkpoint=str(own)))
    torch.manual_seed(1)
    assert torch.equal(answers(network.model), answers(timm.create_model(ARCH, num_classes=10)))
    assert (network.checkpoint, dict(network.published)) == (str(own), {})


# -- transformers -------------------------------------------------------------------------------

KINDS = {
    "regnet": {"embedding_size": 16, "hidden_sizes": [16, 32, 48, 64], "depths": [1, 1, 2, 1],
               "groups_width": 8, "layer_type": "y"},
    "efficientnet": {"width_coefficient": 0.25, "depth_coefficient": 0.3, "hidden_dim": 320,
                     "image_size": 32},
}  # fmt: skip
PROCESSOR = {
    "image_processor_type": "ViTImageProcessor", "do_normalize": True, "do_rescale": True,
    "do_resize": True, "image_mean": [0.1, 0.2, 0.3], "image_std": [0.4, 0.5, 0.6], "resample": 3,
    "rescale_factor": 1 / 255, "size": {"height": 32, "width": 32},
}  # fmt: skip


def transformers_files(kind: str, folder: Path) -> torch.nn.Module:
    """A classifier of that library with random weights, saved as it saves them."""
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    names = dict(enumerate("dcba"))
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(kind, **KINDS[kind], id2label=names)
    model = transformers.AutoModelForImageClassification.from_config(config)
    model.save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps(PROCESSOR))
    return model


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_a_classifier_of_transformers_comes_with_labels_and_preprocessing(hub, tmp_path, kind):
    made = transformers_files(kind, tmp_path / "saved")
    hub.repos["us/hf"] = {p.name: p.read_bytes() for p in (tmp_path / "saved").iterdir()}
    network = open_network(ModelSection(name="hf-hub:us/hf"))
    images = torch.rand(2, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(network.model(images).logits, made.eval()(images).logits)
    known = network.trained_for
    assert known.labels == tuple("dcba")
    assert (known.task, known.base_model) == ("classification", "us/hf")
    assert known.preprocessing.mean == (0.1, 0.2, 0.3)
    assert network.architecture.name == f"transformers/{kind}"
    assert network.shape == (3, 32, 32)


@pytest.mark.slow
def test_a_network_of_transformers_is_cut_saved_and_loaded_again(hub, tmp_path, seprune):
    transformers_files("regnet", tmp_path / "saved")
    hub.repos["us/hf"] = {p.name: p.read_bytes() for p in (tmp_path / "saved").iterdir()}
    rng = np.random.default_rng(0)
    for part in ("train", "val"):
        for name in "dcba":
            folder = tmp_path / "data" / part / name
            folder.mkdir(parents=True)
            for n in range(6):
                pixels = rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / f"{n}.png")
    out = tmp_path / "small"
    words = ("prune", "hf-hub:us/hf", "--data", tmp_path / "data", "--macs", 0.6, "--out", out)
    status, _, err = seprune(*words)
    assert (status, "its classes are in another order" in err) == (3, True)  # sorted: a, b, c, d
    for part in ("train", "val"):
        for n, name in enumerate("dcba"):
            folder = tmp_path / "data" / part
            (folder / name).rename(folder / f"{n} {name}")
    names = {n: f"{n} {name}" for n, name in enumerate("dcba")}
    config = json.loads(hub.repos["us/hf"]["config.json"])
    hub.repos["us/hf"]["config.json"] = json.dumps({**config, "id2label": names}).encode()
    status, printed, err = seprune(*words, "--json")
    assert status == 0, err
    found = json.loads(printed)
    assert found["macs_after"] <= 0.6 * found["macs_before"]
    model = load(out)
    assert type(model).__name__.endswith("RegNetForImageClassification")
    assert model(torch.rand(1, 3, 32, 32)).logits.shape == (1, 4)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("processor", "given"),
    [("EfficientNetImageProcessor", {}), ("EfficientNetImageProcessor", {"include_top": False}),
     ("ConvNextImageProcessor", {}), ("ConvNextImageProcessor", {"size": {"shortest_edge": 224}}),
     ("ViTImageProcessor", {}), ("LevitImageProcessor", {}), ("MobileNetV2ImageProcessor", {}),
     ("PoolFormerImageProcessor", {})],
)  # fmt: skip
def test_pixels_are_those_of_transformers_own_processors(processor, given):
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    theirs = getattr(transformers, processor)(**given)
    how = of_transformers(theirs.to_dict(), "a test")
    y, x = np.mgrid[: how.resize[0], : how.resize[1]]
    pixels = np.stack([x % 256, y % 256, (x + y) % 256], -1).astype(np.uint8)
    image = Image.fromarray(pixels)  # of their size, so that only numbers are compared
    wanted = torch.as_tensor(np.array(theirs(image, return_tensors="np")["pixel_values"]))
    mine = normalise(to_pixels(fit(image, how))[None], how)
    assert torch.allclose(mine, wanted.float(), atol=2e-3)


@contextmanager
def files_of_at_most(size: int):
    """A disk that takes no more than so many bytes of a file."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_no_space_in_the_cache_is_named_and_the_same_command_goes_on(hub, tmp_path, monkeypatch):
    hub_model = ModelSection(name="hf-hub:us/net")
    with (
        files_of_at_most(200_000),
        pytest.raises(
            EnvironmentFault, match=r"model\.safetensors cannot be kept in the cache"
        ) as e,
    ):
        open_network(hub_model)
    assert e.value.why == "File too large"
    assert "let HF_HOME name a folder on another disk" in e.value.fix
    assert torch.equal(answers(open_network(hub_model).model), wanted())
    (tmp_path / "file").touch()
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "file"))
    with pytest.raises(EnvironmentFault, match="cannot be kept in the cache") as e:
        open_network(hub_model)
    assert "let HF_HOME name a folder that you may write to" in e.value.fix


@pytest.mark.parametrize(
    ("error", "fix"),
    [(OSError(errno.ENOSPC, ""), "free some space, or let X name a folder on another disk"),
     (OSError(errno.EROFS, ""), "let X name a folder that you may write to"),
     (FileNotFoundError(errno.ENOENT, ""), "let X name a folder that you may write to"),
     (FileExistsError(errno.EEXIST, ""), "let X name a folder that you may write to"),
     (FileNotFoundError("not in the cache"), None),
     (ConnectionRefusedError(errno.EACCES, ""), None), (OSError("no number"), None),
     (RuntimeError("other"), None)],
)  # fmt: skip
def test_an_error_of_the_disk_is_not_one_of_the_connection(error, fix):
    fault = cache_fault("a file", "X", error)
    assert (fault and fault.fix) == fix


def test_what_was_fetched_elsewhere_is_taken_with_its_preprocessing(tmp_path):
    for name, content in FILES.items():
        (tmp_path / name).write_bytes(content)
    recipe = recipe_of(
        {"name": "x", "data": {"source": "digits"},
         "model": {"name": f"timm/{ARCH}", "checkpoint": str(tmp_path)}}
    )  # fmt: skip
    network, data = open_both(recipe)
    assert torch.equal(answers(network.model), wanted())
    assert data.info.preprocessing.mean == (0.1, 0.2, 0.3)
    assert data.info.preprocessing.source == str(tmp_path / "config.json")


CARD = """---
model-index:
- name: net
  results:
  - task: {type: image-classification}
    dataset: {name: digits, type: digits}
    metrics:
    - {type: accuracy, value: 0.91}
---
words
"""


@pytest.mark.parametrize(
    ("card", "published"),
    [(CARD, {"top1": 0.91}), (CARD.replace("0.91", "91"), {"top1": 0.91}), ("words", {}),
     (CARD.replace("accuracy", "f1"), {}), ("---\nmodel-index: 3\n---\n", {})],
)  # fmt: skip
def test_the_accuracy_of_a_card_is_taken_where_it_states_one(hub, card, published):
    hub.repos["us/net"]["README.md"] = card.encode()
    assert open_network(ModelSection(name="hf-hub:us/net")).published == published


# as timm's cards have it: several networks, several sizes of images
TABLE = """---
tags: [timm]
---
|model            |img_size|top1 |top5 |param_count|
|-----------------|--------|-----|-----|-----------|
|[net.big](http://h/us/net.big)|32     |99.1 |99.9|1.0        |
|[net](http://h/us/net)|160    |88.02|98.1 |1.0        |
|[net](http://h/us/net)|32     |{0}|97.5 |1.0        |
"""


@pytest.mark.parametrize(
    ("cell", "published"), [("79.5 ", {"top1": 0.795}), ("?", {}), ("1.2.3", {})]
)
def test_the_accuracy_in_a_table_of_timms_is_that_of_the_size_in_use(hub, cell, published):
    hub.repos["us/net"]["README.md"] = TABLE.format(cell).encode()
    assert open_network(ModelSection(name="hf-hub:us/net")).published == published


# -- timm's tags --------------------------------------------------------------------------------


def test_a_tag_of_timm_chooses_weights_and_pretrained_loads_them(hub, monkeypatch, seprune):
    config = zoos.timm_config(f"{ARCH}.r160_in1k")
    assert config["hf_hub_id"] == REPO
    monkeypatch.setattr(zoos, "timm_config", lambda name: {**config, "num_classes": 10, **MEANS})
    network = open_network(ModelSection(name=f"timm/{ARCH}.r160_in1k", pretrained=True))
    assert torch.equal(answers(network.model), wanted())
    assert network.architecture.name == f"timm/{ARCH}"
    assert network.trained_for.base_model == REPO
    assert network.trained_for.preprocessing.mean == (0.1, 0.2, 0.3)
    for more in ((), ("--data", "digits", "--classes", 10)):
        *_, err = seprune("inspect", f"timm/{ARCH}.r160_in1k", *more)
        assert f"note: {ARCH}.r160_in1k names weights, which only --pretrained loads" in err


def test_names_without_weights_are_refused():
    for name, said in (
        ("seprune/se_resnet20", "nobody publishes weights for it"),
        ("torchvision/resnet50.V9", "there are IMAGENET1K_V1, IMAGENET1K_V2"),
        ("torchvision/resnet50.imagenet1k_v1", "write torchvision/resnet50.IMAGENET1K_V1"),
        ("timm/seresnet50.a2_in2k", "write timm/seresnet50.a2_in1k"),
        (f"timm/{ARCH}.no_tag", f"there are {ARCH}.r160_in1k"),
        ("timm/SEResNet50", "next: timm/seresnet50, or"),
        ("torchvision/resnet5", "next: torchvision/resnet50, or"),
        ("torchvision/EfficientNet_B3_Weights.DEFAULT", "next: torchvision/efficientnet_b3, or"),
        ("us/net", "hf-hub:us/net for a repository of a Hub"),
        ("file.py:network", "nobody publishes weights for it"),
    ):
        with pytest.raises(UsageError, match=said):
            fetch_published(name)


@pytest.mark.parametrize(
    ("file", "content", "said"),
    [("model.safetensors", b"x" * 500, "it is a text file"),
     ("model.safetensors", b"", "the file is empty"),
     ("model.safetensors", FILES["model.safetensors"][:-9], "incomplete file"),
     ("preprocessor_config.json", b"{", "not valid JSON"),
     ("config.json", b"{", "not valid JSON")],
)  # fmt: skip
def test_what_is_wrong_on_a_hub_is_not_mended_by_another_download(hub, file, content, said):
    hub.repos["us/net"][file] = content
    with pytest.raises(InputError, match=said) as caught:
        open_network(ModelSection(name="hf-hub:us/net"))
    assert caught.value.what.startswith(f"hf-hub:us/net: {file}: ")
    assert caught.value.fix.startswith("name another repository; if it is right on the Hub: rm /")
    assert Path(caught.value.fix.rpartition(" rm ")[2]).name == file


# -- torchvision --------------------------------------------------------------------------------


@pytest.fixture
def published(tmp_path, monkeypatch):
    """A file like torchvision's, where its enum says that it is; served from a folder."""
    torch.manual_seed(0)
    model = get_model("efficientnet_b0", weights=None, num_classes=10)
    torch.save(model.state_dict(), tmp_path / "w.pth")
    digest = hashlib.sha256((tmp_path / "w.pth").read_bytes()).hexdigest()
    name = f"efficientnet_b0-{digest[:8]}.pth"
    (tmp_path / "w.pth").rename(tmp_path / name)
    handler = partial(_Quiet, directory=str(tmp_path))
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    url = f"http://127.0.0.1:{server.server_address[1]}/{name}"
    meta = {**EfficientNet_B0_Weights.DEFAULT.meta, "categories": list("0123456789")}

    class Here(WeightsEnum):
        IMAGENET1K_V1 = Weights(url, EfficientNet_B0_Weights.IMAGENET1K_V1.transforms, meta)

    monkeypatch.setattr(zoos, "torchvision_weights", lambda *_: Here.IMAGENET1K_V1)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "home"))
    yield tmp_path / name, model
    server.shutdown()
    server.server_close()


class _Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *words: object) -> None:
        pass


PRETRAINED = ModelSection(name="torchvision/efficientnet_b0", pretrained=True)


def test_torchvisions_weights_come_into_its_cache_with_labels_and_accuracy(published, tmp_path):
    path, model = published
    network = open_network(PRETRAINED)
    assert torch.equal(answers(network.model), answers(model))
    assert (tmp_path / "home/hub/checkpoints" / path.name).is_file()
    known = network.trained_for
    assert (known.task, known.labels) == ("classification", tuple("0123456789"))
    assert (known.preprocessing.resize, known.preprocessing.interpolation) == (
        (256, 256),
        "bicubic",
    )
    assert network.published == pytest.approx({"top1": 0.77692, "top5": 0.93532})


def test_another_content_than_the_name_promises_is_refused(published, tmp_path):
    path, _ = published
    good = path.read_bytes()
    path.write_bytes(good[:1000])
    with pytest.raises(InputError, match="not what its name promises") as caught:
        open_network(PRETRAINED)
    assert caught.value.code == "hub-damaged"
    kept = tmp_path / "home/hub/checkpoints"
    assert list(kept.iterdir()) == []
    (kept / path.name).write_bytes(good[:1000])  # a copy that broke off
    with pytest.raises(InputError, match="it was cut short, or changed") as caught:
        open_network(PRETRAINED)
    assert caught.value.fix == f"rm {kept / path.name}"


def test_no_connection_names_the_url(published):
    path, _ = published
    name = path.name
    path.unlink()
    with pytest.raises(EnvironmentFault, match="cannot be downloaded") as caught:
        open_network(PRETRAINED)
    assert caught.value.code == "offline"
    assert f"/{name}; then here" in caught.value.fix
    assert caught.value.fix.endswith(f"--checkpoint {name}")


def test_published_accuracy_stands_beside_the_measured_one(published, seprune):
    status, _, err = seprune(
        *("evaluate", "torchvision/efficientnet_b0", "--pretrained", "--data", "digits"),
        *("--input", "3x32x32", "--set", "data.mean=[0.5,0.5,0.5]", "--set", "data.std=[1,1,1]"),
    )
    assert status == 0, err
    assert "warning: top-1:" in err
    assert "77.69 % published with the weights" in err
    assert "look at the order of the classes" in err
    assert (
        "was asked for, published with EfficientNet_B0_Weights" in err or "[0.5, 0.5, 0.5]" in err
    )


def test_pretrained_and_a_checkpoint_exclude_each_other(seprune):
    status, _, err = seprune(
        "inspect", "torchvision/efficientnet_b0", "--pretrained", "--checkpoint", "w.pth"
    )
    assert status == 2
    assert "pretrained and checkpoint exclude each other" in err


def test_a_file_of_the_right_name_is_not_asked_for_again(published):
    open_network(PRETRAINED)
    path, model = published
    path.unlink()
    assert torch.equal(answers(open_network(PRETRAINED).model), answers(model))


def test_no_file_lies_outside_of_the_caches(hub, tmp_path):
    open_network(ModelSection(name="hf-hub:us/net"))
    assert {p.name for p in Path(tmp_path).iterdir()} == {"cache"}
