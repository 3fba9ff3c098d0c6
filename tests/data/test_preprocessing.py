"""Preprocessing: the pixels of torchvision and timm, taken from files, kept and named."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from reports import make_report
from torch.nn.functional import cross_entropy
from torchvision.models import get_model_weights

from seprune.data import DataSettings, open_data
from seprune.data.preprocessing import as_code, fit, normalise, to_pixels
from seprune.errors import InputError
from seprune.models import build
from seprune.models.preprocessing import Preprocessing, of_transformers, preprocessing_in
from seprune.models.published import published_preprocessing
from seprune.report.card import model_card

NET = "seprune/se_resnet8"
SIZES = [(300, 200), (199, 301), (224, 224), (97, 640)]


def picture(size: tuple[int, int], mode: str = "RGB") -> Image.Image:
    """Smooth colours with noise on them, so that every way to scale gives other pixels."""
    width, height = size
    chance = np.random.default_rng(width)
    y, x = np.mgrid[:height, :width]
    waves = np.stack([x * 200 / width, y * 200 / height, (x + y) % 50 * 4], -1)
    noisy = waves + chance.integers(0, 50, waves.shape)
    return Image.fromarray(noisy.astype(np.uint8)).convert(mode)


def prepared(image: Image.Image, how: Preprocessing) -> torch.Tensor:
    return normalise(to_pixels(fit(image, how))[None], how)[0]


# -- the same pixels as those who published the weights -------------------------------------------


@pytest.mark.parametrize("name", ["efficientnet_b0", "mobilenet_v3_large", "efficientnet_b3"])
@pytest.mark.parametrize("size", SIZES)
def test_pixels_are_those_of_torchvisions_transforms(name, size):
    weights = get_model_weights(name).DEFAULT
    how = published_preprocessing(f"torchvision/{name}")
    wanted = weights.transforms()(picture(size))
    assert how.shape == tuple(wanted.shape)
    assert torch.allclose(prepared(picture(size), how), wanted, atol=2e-6)


@pytest.mark.parametrize(
    "name",
    ["seresnet50.a1_in1k", "tf_efficientnetv2_b0.in1k", "regnetz_b16.ra3_in1k"],
)
@pytest.mark.parametrize("size", SIZES)
def test_pixels_are_those_of_timms_transforms(name, size):
    config = timm.models.get_pretrained_cfg(name).to_dict()
    given = timm.data.resolve_data_config(pretrained_cfg=config)
    wanted = timm.data.create_transform(**given)(picture(size))
    how = published_preprocessing(f"timm/{name}")
    assert how.shape == tuple(wanted.shape)
    assert torch.allclose(prepared(picture(size), how), wanted, atol=2e-6)


def test_two_files_that_contradict_each_other_are_named(tmp_path):
    theirs = {"size": 32, "image_mean": [0.5] * 3, "image_std": [0.25] * 3}
    timms = {"pretrained_cfg": {"input_size": [3, 32, 32], "mean": [0.5] * 3, "std": [0.2] * 3,
                                "crop_pct": 1.0}}  # fmt: skip
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(theirs))
    (tmp_path / "config.json").write_text(json.dumps(timms))
    found = preprocessing_in(tmp_path)
    assert found.std == (0.2,) * 3
    assert found.source.endswith("/config.json; preprocessor_config.json says otherwise of std")


def test_squashed_images_are_those_of_timm():
    name = next(
        n for n in timm.list_pretrained() if timm.models.get_pretrained_cfg(n).crop_mode == "squash"
    )
    config = timm.models.get_pretrained_cfg(name).to_dict()
    given = timm.data.resolve_data_config(pretrained_cfg=config)
    how = published_preprocessing(f"timm/{name}")
    assert how.scaling == "stretch"
    wanted = timm.data.create_transform(**given)(picture((300, 200)))
    assert torch.allclose(prepared(picture((300, 200)), how), wanted, atol=2e-6)


# name: the file, and what the centre pixel value v in [0, 255] of channel 0 has to become
HUBS = {
    "shortest edge": (
        {"size": {"shortest_edge": 256}, "crop_size": {"height": 224, "width": 224},
         "do_center_crop": True, "resample": 2, "image_mean": [0.5] * 3, "image_std": [0.25] * 3},
        ((3, 224, 224), (256, 256), "cover", "bilinear", "rgb"), lambda v: (v / 255 - 0.5) / 0.25,
    ),
    "stretched": (
        {"size": {"height": 224, "width": 200}, "resample": 3, "image_mean": [0.1] * 3,
         "image_std": [0.2] * 3},
        ((3, 224, 200), (224, 200), "stretch", "bicubic", "rgb"), lambda v: (v / 255 - 0.1) / 0.2,
    ),
    "crop share": (
        {"size": {"shortest_edge": 224}, "crop_pct": 0.875, "resample": 3,
         "image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]},
        ((3, 224, 224), (256, 256), "cover", "bicubic", "rgb"),
        lambda v: (v / 255 - 0.485) / 0.229,
    ),
    "offset": (
        {"size": {"height": 240, "width": 240}, "resample": 0, "do_center_crop": False,
         "rescale_factor": 1 / 127.5, "rescale_offset": True, "do_normalize": False},
        ((3, 240, 240), (240, 240), "stretch", "nearest", "rgb"), lambda v: v / 127.5 - 1,
    ),
    "bgr": (
        {"size": 288, "crop_size": 256, "do_flip_channel_order": True, "do_normalize": False},
        ((3, 256, 256), (288, 288), "cover", "bilinear", "bgr"), None,
    ),
    "no scale": (
        {"size": [32, 32], "do_rescale": False, "image_mean": [100.0] * 3, "image_std": [50] * 3},
        ((3, 32, 32), (32, 32), "cover", "bilinear", "rgb"), lambda v: (v - 100) / 50,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", HUBS)
def test_preprocessor_config_json(name, tmp_path):
    config, facts, value = HUBS[name]
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(config))
    how = preprocessing_in(tmp_path)
    assert (how.shape, how.resize, how.scaling, how.interpolation, how.channel_order) == facts
    assert how.source == str(tmp_path / "preprocessor_config.json")
    colour = Image.new("RGB", (50, 40), (200, 10, 77))
    x = prepared(colour, how)[:, 3, 3]
    if value is None:
        assert torch.allclose(x, torch.tensor([77, 10, 200]) / 255)
    else:
        assert float(x[0]) == pytest.approx(value(200), abs=1e-5)


@pytest.mark.parametrize(
    "content",
    [
        {"image_mean": [0.5] * 3},
        {"size": "large"},
        {"size": 8, "image_mean": ["a"] * 3},
        {"size": 8, "image_mean": [0.0] * 3},  # and no image_std
    ],
)
def test_a_file_that_does_not_say_enough_is_named(content, tmp_path):
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(content))
    with pytest.raises(InputError, match=r"preprocessor_config\.json") as caught:
        preprocessing_in(tmp_path)
    assert caught.value.code == "preprocessing"


def test_a_flipped_order_reads_the_channels_backwards():
    plain = Preprocessing((3, 8, 8), (0.1, 0.2, 0.3), (1.0, 1.0, 1.0), (8, 8))
    turned = Preprocessing((3, 8, 8), (0.3, 0.2, 0.1), (1.0,) * 3, (8, 8), channel_order="bgr")
    image = picture((8, 8))
    assert torch.equal(prepared(image, plain).flip(0), prepared(image, turned))


def test_another_size_keeps_the_part_that_the_centre_covers():
    how = of_transformers({"size": 256, "crop_size": 224}, "x")
    assert how.at((3, 112, 112)).resize == (128, 128)
    assert how.at((3, 448, 224)).resize == (512, 256)
    assert how.at(how.shape) is how


# -- the lines that need no seprune ---------------------------------------------------------------

LINES = [
    Preprocessing((3, 224, 224), (0.485, 0.456, 0.406), (0.229, 0.224, 0.225), (256, 256)),
    Preprocessing((3, 96, 160), (0.5,) * 3, (0.5,) * 3, (100, 170), interpolation="bicubic"),
    Preprocessing((3, 64, 64), (0.4, 0.5, 0.6), (0.1,) * 3, (80, 70), "stretch", "lanczos", "bgr"),
    Preprocessing((1, 28, 28), (0.1307,), (0.3081,), (28, 28)),
    Preprocessing((4, 32, 32), (0.5,) * 4, (0.25,) * 4, (36, 36)),
]


@pytest.mark.parametrize("how", LINES, ids=str)
@pytest.mark.parametrize("size", SIZES)
def test_the_lines_give_the_pixels_that_seprune_gives(how, size, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    picture(size).save("photo.jpg", quality=95)
    found: dict[str, object] = {}
    exec(as_code(how), found)
    image = Image.open("photo.jpg").convert({1: "L", 4: "RGBA"}.get(how.shape[0], "RGB"))
    assert found["x"].dtype == np.float32  # type: ignore[attr-defined]
    assert np.allclose(found["x"][0], prepared(image, how), atol=1e-5)  # type: ignore[index]


def test_a_model_card_shows_the_lines():
    report = make_report()
    report.data["preprocessing"] = LINES[0].plain()
    card = model_card(report, report.baseline)
    assert f"```python\n{as_code(LINES[0])}```" in card
    assert "3x224x224, scaled to cover 256x256, bilinear, mean 0.485 0.456 0.406" in card


def test_the_lines_run_in_a_process_that_has_no_seprune(tmp_path):
    picture((70, 50)).save(tmp_path / "photo.jpg")
    script = as_code(LINES[0]) + (
        "import sys\nassert not {'torch', 'seprune'} & set(sys.modules)\nprint(x.shape, x.dtype)"
    )
    made = subprocess.run(
        [sys.executable, "-I", "-c", script], cwd=tmp_path, capture_output=True, text=True
    )
    assert (made.stdout.strip(), made.stderr) == ("(1, 3, 224, 224) float32", "")
    assert len(as_code(LINES[0]).splitlines()) <= 12


# -- who decides ----------------------------------------------------------------------------------


def test_what_was_asked_for_goes_before_the_weights_and_both_are_named():
    known = Preprocessing((1, 8, 8), (0.25,), (0.5,), (8, 8), source="my folder")
    plain = open_data("digits", DataSettings(preprocessing=known)).info
    assert plain.preprocessing == known
    assert plain.notes == ()
    info = open_data("digits", DataSettings(preprocessing=known, mean=(0.0,), std=(0.5,))).info
    assert info.preprocessing.mean == (0.0,)
    assert info.preprocessing.source == "mean as given, the rest my folder"
    assert info.notes == (
        "mean [0] was asked for, my folder says [0.25]: what was asked for is used",
    )


def test_a_plain_value_is_read_again_and_anything_else_is_refused():
    how = LINES[2]
    assert Preprocessing.of(json.loads(json.dumps(how.plain()))) == how
    wrong = [("shape", [3, 0, 8]), ("std", [0.0] * 3), ("mean", [0.1]), ("resize", [8, 8])]
    wrong += [("interpolation", "best"), ("scaling", None), ("shape", "3x8x8")]
    for key, value in wrong:
        with pytest.raises(InputError, match=f"here: {key} is nothing"):
            Preprocessing.of({**how.plain(), key: value}, where="here")
    with pytest.raises(InputError):
        Preprocessing.of("a text")


# -- commands -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """Weights of a network that knows the digits by pixels from -1 to 1."""
    torch.manual_seed(0)
    model = build(NET, classes=10, input=(1, 8, 8))
    data = open_data("digits", DataSettings(mean=(0.5,), std=(0.5,), augment="none"))
    loader = data.training(64)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    for epoch in range(3):
        loader.set_epoch(epoch)
        for images, labels in loader:
            optimizer.zero_grad()
            cross_entropy(model(images), labels).backward()
            optimizer.step()
    path = tmp_path_factory.mktemp("trained") / "net.pth"
    torch.save(model.state_dict(), path)
    return path


RIGHT = ("--set", "data.mean=[0.5]", "--set", "data.std=[0.5]")


def test_inspect_says_which_preprocessing_the_weights_fit(seprune, trained):
    given = ("inspect", NET, "--checkpoint", trained, "--data", "digits")
    status, out, err = seprune(*given, "--json")
    found = json.loads(out)["preprocessing"]
    assert status == 0
    assert found["fits"] == "-1 to 1"
    losses = [c["loss"] for c in found["candidates"]]
    assert losses == sorted(losses)
    assert {c["name"] for c in found["candidates"]} == {"in use", "-1 to 1", "0 to 1", "MNIST"}
    assert "warning: -1 to 1 fits better than the preprocessing in use" in err
    assert "--set 'data.mean=[0.5]' --set 'data.std=[0.5]'" in err
    assert "the preprocessing in use fits" in seprune(*given, *RIGHT)[2]


def test_the_preprocessing_of_a_folder_is_used_by_what_follows(seprune, trained, tmp_path):
    """Prune, evaluate and fine-tune agree, though only `prune` was given it."""
    small, tuned = tmp_path / "small", tmp_path / "tuned"
    given = (NET, "--checkpoint", trained, "--data", "digits")
    cut = ("--macs", "0.9", "--recover", "bn", "--importance", "l2")
    assert seprune("prune", *given, *RIGHT, *cut, "--out", small)[0] == 0
    config = json.loads((small / "config.json").read_text())
    assert config["preprocessing"]["mean"] == [0.5]
    assert (config["task"], config["labels"]) == ("classification", list("0123456789"))

    def top1(*words: object) -> float:
        status, out, err = seprune("evaluate", small, "--data", "digits", "--json", *words)
        assert status == 0, err
        return float(json.loads(out)["top1"])

    assert top1() == top1(*RIGHT) > 0.8
    wrong = ("--set", "data.mean=[0.9]", "--set", "data.std=[0.1]")
    assert top1(*wrong) < top1()
    *_, err = seprune("evaluate", small, "--data", "digits", *wrong)
    assert f"mean [0.9] was asked for, {small} says [0.5]" in " ".join(err.split())
    assert seprune("finetune", small, "--data", "digits", "--epochs", 0, "--out", tuned)[0] == 0
    assert json.loads((tuned / "config.json").read_text())["preprocessing"]["mean"] == [0.5]


@pytest.mark.slow
def test_the_preprocessing_of_a_folder_is_written_into_its_onnx_file(seprune, trained, tmp_path):
    onnx = pytest.importorskip("onnx")
    small = tmp_path / "small"
    given = (NET, "--checkpoint", trained, "--data", "digits", *RIGHT)
    cut = ("--macs", "0.9", "--recover", "none", "--importance", "l2")
    assert seprune("prune", *given, *cut, "--out", small)[0] == 0
    assert seprune("export", small, "--onnx", tmp_path / "m.onnx", "--data", "digits")[0] == 0
    about = {p.key: p.value for p in onnx.load(tmp_path / "m.onnx").metadata_props}
    assert Preprocessing.of(json.loads(about["preprocessing"])).mean == (0.5,)
    assert json.loads(about["labels"]) == list("0123456789")
    assert (about["task"], about["architecture"]) == ("classification", NET)


def test_classes_in_another_order_are_named(seprune, trained, tmp_path):
    small = tmp_path / "small"
    given = (NET, "--checkpoint", trained, "--data", "digits", *RIGHT)
    cut = ("--macs", "0.9", "--recover", "none", "--importance", "l2")
    assert seprune("prune", *given, *cut, "--out", small)[0] == 0
    config = json.loads((small / "config.json").read_text())
    config["labels"][2:4] = ["3", "2"]
    (small / "config.json").write_text(json.dumps(config))
    from seprune.runtime.files import write_sums

    write_sums(small)
    status, _, err = seprune("evaluate", small, "--data", "digits")
    assert status == 3
    assert "digits: its classes are in another order than the network's" in err
    assert "output 2 is '3' in seprune/se_resnet8, and '2' in the data" in " ".join(err.split())


@pytest.mark.parametrize(
    ("key", "value"), [("preprocessing", {"shape": [1, 8]}), ("task", 3), ("labels", "0123456789"),
                       ("labels", [1, 2]), ("metrics", {"top1": "high"})],
)  # fmt: skip
def test_a_folder_with_anything_else_in_its_place_is_refused(key, value, tmp_path):
    from seprune.export.pruned_model import load, save
    from seprune.runtime.files import write_sums

    save(build(NET), tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, key: value}))
    write_sums(tmp_path)
    with pytest.raises(InputError, match=r"what seprune writes|nothing that seprune wrote"):
        load(tmp_path)
