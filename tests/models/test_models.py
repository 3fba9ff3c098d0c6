"""Networks by name: the doors, what they refuse, and the user's own file."""

from __future__ import annotations

import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from seprune import models
from seprune.errors import EnvironmentFault, InputError, UsageError
from seprune.models import NETWORKS
from seprune.models.usercode import failed_in


def on_meta(name: str, **args: Any) -> nn.Module:
    """Shapes without memory: the largest network takes a tenth of a second."""
    with torch.device("meta"):
        return models.build(name, **args).eval()


def params(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize(
    ("name", "size"),
    [
        ("torchvision/mobilenet_v3_small", (3, 224, 224)),
        ("torchvision/efficientnet_b1", (3, 240, 240)),
        ("torchvision/lraspp_mobilenet_v3_large", (3, 520, 520)),
        ("torchvision/deeplabv3_mobilenet_v3_large", (3, 520, 520)),
        ("torchvision/ssdlite320_mobilenet_v3_large", (3, 320, 320)),
        ("torchvision/fasterrcnn_mobilenet_v3_large_320_fpn", (3, 320, 320)),
        ("torchvision/fasterrcnn_mobilenet_v3_large_fpn", (3, 800, 800)),
    ],
)
def test_torchvision_networks_are_built_without_a_download(
    name: str, size: tuple[int, int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_args: Any, **_kwargs: Any) -> None:
        raise AssertionError("weights were fetched")

    monkeypatch.setattr("torch.hub.load_state_dict_from_url", refuse)
    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", refuse)
    model = on_meta(name, classes=7)
    assert models.input_size(name, model) == size
    assert params(model) < params(on_meta(name, classes=8))


def test_timm_networks_take_channels_classes_and_a_weights_tag() -> None:
    pytest.importorskip("timm")
    model = models.build("timm/seresnet50.a1_in1k", classes=5, input=(1, 64, 64)).eval()
    assert models.input_size("timm/seresnet50.a1_in1k", model) == (1, 224, 224)
    with torch.no_grad():
        assert model(torch.zeros(1, 1, 64, 64)).shape == (1, 5)


def test_timm_networks_of_fixed_size_are_built_for_the_size_given() -> None:
    pytest.importorskip("timm")
    model = models.build("timm/coatnet_pico_rw_224", classes=5, input=(3, 64, 64)).eval()
    with torch.no_grad():
        assert model(torch.zeros(1, 3, 64, 64)).shape == (1, 5)


def test_a_stem_that_folds_positions_into_channels_takes_images_of_three_channels() -> None:
    pytest.importorskip("timm", reason="timm is not installed")
    model = models.build("timm/tresnet_m")
    first = next(m for m in model.modules() if isinstance(m, nn.Conv2d))
    assert first.in_channels == 3 * 4 * 4
    assert models.input_size("timm/tresnet_m", model) == (3, 224, 224)


def test_names_list_gated_networks_first() -> None:
    pytest.importorskip("timm")
    found = models.names()
    assert len(found) == len(set(found)) > 1000
    own = [*NETWORKS, "se_resnet8_fpn", "se_resnet8_ssd"]
    assert found[: len(own)] == [f"seprune/{name}" for name in own]
    rank = found.index
    assert rank("torchvision/regnet_y_400mf") < rank("torchvision/resnet50")
    assert rank("timm/legacy_senet154") < rank("torchvision/resnet50")
    assert rank("timm/efficientnet_b0") < rank("timm/efficientnet_lite0")
    assert rank("timm/seresnet50") < rank("timm/densenet121")
    assert models.names("*/se_resnet5*") == ["seprune/se_resnet56", "seprune/se_resnet50"]
    assert models.names("mobilenet_v3_small") == ["torchvision/mobilenet_v3_small"]


def test_without_timm_its_networks_say_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(EnvironmentFault) as caught:
        models.build("timm/seresnet50")
    assert caught.value.what == "timm: cannot be imported"
    assert caught.value.fix == "pip install 'seprune[timm]'"
    assert caught.value.exit_status == 4
    assert not any(name.startswith("timm/") for name in models.names())


def test_segmentation_models_are_named_by_decoder_and_encoder() -> None:
    pytest.importorskip("segmentation_models_pytorch", reason="the extra smp is not installed")
    name = "smp/unet:tu-mobilenetv3_small_050"
    model = models.build(name, classes=5, input=(1, 64, 64)).eval()
    with torch.no_grad():
        assert model(torch.zeros(1, 1, 64, 64)).shape == (1, 5, 64, 64)
    with pytest.raises(UsageError, match="its input size is not known"):
        models.input_size(name, model)
    assert "smp/unet" in models.names("smp/*")
    with pytest.raises(UsageError, match="there is no encoder se_resnet51") as caught:
        models.build("smp/unet:se_resnet51")
    assert caught.value.fix == "smp/unet:se_resnet50"
    with pytest.raises(UsageError, match="smp/unett:se_resnet50: no such model"):
        models.build("smp/unett:se_resnet50")
    with pytest.raises(UsageError, match="encoder_weights is not an argument"):
        models.build("smp/unet:se_resnet50", encoder_weights="imagenet")
    with pytest.raises(UsageError, match="encoder_name is resnet18 in the arguments"):
        models.build("smp/unet:se_resnet50", encoder_name="resnet18")


def test_without_segmentation_models_the_message_names_the_extra(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "segmentation_models_pytorch", None)
    with pytest.raises(EnvironmentFault) as caught:
        models.build("smp/unet:se_resnet50")
    assert caught.value.fix == "pip install 'seprune[smp]'"
    assert not any(name.startswith("smp/") for name in models.names())


def test_an_unknown_name_lists_close_ones() -> None:
    for name, close in [
        ("seprune/se_resnet21", "seprune/se_resnet20"),
        ("torchvision/mobilenetv3_small", "torchvision/mobilenet_v3_small"),
        ("mobilenet_v3_small", "torchvision/mobilenet_v3_small"),
        ("timm/se_resnet20", "seprune/se_resnet20"),
    ]:
        with pytest.raises(UsageError) as caught:
            models.build(name)
        assert caught.value.what == f"{name}: no such model"
        assert close in caught.value.why
        assert caught.value.fix
        assert caught.value.exit_status == 2


@pytest.mark.parametrize("name", ["us/net", "hf:us/net", "https://hub.example/us/net"])
def test_the_name_of_a_repository_without_its_prefix_is_named(name):
    with pytest.raises(UsageError, match="no such model") as caught:
        models.build(name)
    assert caught.value.fix.startswith("hf-hub:us/net for a repository of a Hub")


REFUSED: list[tuple[str, dict[str, Any], str, str]] = [
    ("seprune/se_resnet20", {"reducton": 8}, "unknown argument 'reducton'", "it takes reduction, "),
    ("seprune/se_vgg16", {"placement": "pre"}, "unknown argument 'placement'", "it takes"),
    ("seprune/se_resnet20", {"reduction": 0}, "reduction=0: not a whole", "per hidden unit"),
    ("seprune/se_resnet20", {"squeeze": "avg"}, "squeeze='avg': no such", "known: mean, max"),
    (
        "seprune/se_resnet20",
        {"excitation": "elu"},
        "excitation='elu'",
        "known: sigmoid, tanh, relu",
    ),
    ("seprune/se_resnet20", {"placement": "x"}, "placement='x'", "standard, pre, post, identity"),
    ("seprune/se_resnet20", {"stages": ["layer4"]}, "no stage 'layer4'", "layer1, layer2, layer3"),
    ("seprune/se_resnet20", {"stages": 3}, "no stage '3'", "layer1, layer2, layer3"),
    ("seprune/se_resnet20", {"classes": 0}, "classes=0", "width of the last layer"),
    ("seprune/se_resnet20", {"input": (3, 0, 4)}, "input=3x0x4", "channels x height x width"),
    ("torchvision/resnet50", {"input": (1, 8, 8)}, "cannot take 1 input channels", "made for 3"),
    ("timm/seresnet50", {"pretrained": True}, "pretrained is not an argument", "is downloaded"),
    ("torchvision/resnet50", {"depth": 3}, "cannot be built with depth=3", "depth"),
]


@pytest.mark.parametrize(("name", "args", "what", "why"), REFUSED)
def test_wrong_arguments_are_refused(name: str, args: dict[str, Any], what: str, why: str) -> None:
    with pytest.raises(UsageError) as caught:
        models.build(name, **args)
    assert what in caught.value.what
    assert why in caught.value.why
    assert caught.value.fix


FILE = """
import pathlib, torch
pathlib.Path(__file__).with_suffix(".ran").touch()
def net(classes=3, width=4):
    return torch.nn.Sequential(torch.nn.Conv2d(2, width, 1), torch.nn.Conv2d(width, classes, 1))
def plain():
    return torch.nn.Conv2d(2, 1, 1)
def number():
    return 7
def broken():
    raise KeyError("width")
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "my nets.py"
    path.write_text(FILE)
    return path


def test_code_runs_only_when_it_is_allowed(file: Path) -> None:
    with pytest.raises(UsageError) as caught:
        models.build(f"{file}:net")
    assert caught.value.what == f"{file}:net: refused to run code"
    assert "--allow-code" in caught.value.fix
    assert caught.value.exit_status == 2
    other = models.ModelLoader.allowing(file.with_name("other.py"))
    with pytest.raises(UsageError, match="refused to run code"):
        other.build(f"{file}:net")
    assert not file.with_suffix(".ran").exists()


def test_a_function_gets_the_arguments_that_it_has(file: Path) -> None:
    loader = models.ModelLoader.allowing(file)
    model = loader.build(f"{file}:net", classes=5, input=(2, 8, 8), width=6)
    assert model(torch.zeros(1, 2, 8, 8)).shape == (1, 5, 8, 8)
    assert isinstance(loader.build(f"{file}:plain", classes=5), nn.Conv2d)
    with pytest.raises(UsageError, match="its input size is not known") as caught:
        models.input_size(f"{file}:net", model)
    assert caught.value.fix == "--input 3x224x224"


@pytest.mark.parametrize(
    ("function", "what", "why"),
    [
        ("number", "returned int, not a network", "torch.nn.Module"),
        ("broken", "the file's code failed", "KeyError: 'width'"),
        ("nett", "no function nett", "its functions are net, plain, number, broken"),
    ],
)
def test_faults_in_the_users_file(file: Path, function: str, what: str, why: str) -> None:
    with pytest.raises(InputError) as caught:
        models.ModelLoader.allowing(file).build(f"{file}:{function}")
    assert what in caught.value.what
    assert why in caught.value.why
    assert caught.value.fix


def test_a_file_may_hold_dataclasses_and_names_of_types(tmp_path: Path) -> None:
    """Both look their module up by its name; two files of one name do not meet there."""
    text = """
from __future__ import annotations
import typing
from dataclasses import dataclass, field
from torch import nn
@dataclass
class Widths:
    out: int = WIDTH
    sizes: list[int] = field(default_factory=list)
def net():
    width = Widths().out if typing.get_type_hints(Widths)["out"] is int else 1
    return nn.Conv2d(3, width, 1)
"""
    for width in (4, 6):
        (tmp_path / str(width)).mkdir()
        path = tmp_path / str(width) / "torch.py"
        path.write_text(text.replace("WIDTH", str(width)))
        model = models.ModelLoader.allowing(path).build(f"{path}:net")
        assert isinstance(model, nn.Conv2d)
        assert model.out_channels == width


@pytest.mark.parametrize("module", ["blocks.py", "blocks/se.py", "../blocks/se.py"])
def test_a_module_beside_the_file_is_not_imported_but_named(
    module: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "my nets" / "net.py"
    other = (path.parent / module).resolve()
    other.parent.mkdir(parents=True, exist_ok=True)
    path.parent.mkdir(exist_ok=True)
    other.write_text("def make():\n    from torch import nn\n    return nn.Conv2d(3, 4, 1)\n")
    name = "blocks" if module == "blocks.py" else "blocks.se"
    path.write_text(f"def net():\n    from {name} import make\n    return make()\n")
    with pytest.raises(InputError, match="the file's code failed") as caught:
        models.ModelLoader.allowing(path).build(f"{path}:net")
    folder = path.parent if module.startswith("blocks") else tmp_path
    assert caught.value.fix == f"PYTHONPATH={shlex.quote(str(folder))} before the command"
    monkeypatch.syspath_prepend(folder)
    made = models.ModelLoader.allowing(path).build(f"{path}:net")
    assert isinstance(made, nn.Conv2d)
    for name in [n for n in sys.modules if n.partition(".")[0] == "blocks"]:
        del sys.modules[name]


def test_a_file_that_is_not_there_or_not_python(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such file"):
        models.ModelLoader(any_file=True).build(f"{tmp_path}/none.py:net")
    (tmp_path / "bad.py").write_text("def net(:\n")
    with pytest.raises(InputError, match="SyntaxError"):
        models.ModelLoader(any_file=True).build(f"{tmp_path}/bad.py:net")


def test_neither_zoo_is_imported_before_it_is_asked_for() -> None:
    code = (
        "import sys, seprune.models as m; m.build('seprune/se_resnet8'); print(sorted(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "'timm'" not in done.stdout
    assert "'torchvision'" not in done.stdout


def test_a_function_may_call_its_classes_num_classes(tmp_path):
    code = "from torch import nn\ndef net(num_classes=9):\n    return nn.Linear(2, num_classes)\n"
    (tmp_path / "net.py").write_text(code)
    loader = models.ModelLoader(any_file=True)
    built = [loader.build(f"{tmp_path}/net.py:net", classes=n).out_features for n in (None, 4)]
    assert built == [9, 4]


def test_an_error_of_an_installed_package_is_not_one_of_the_users_code(tmp_path, monkeypatch):
    """Packages lie beside torch, wherever that is; a system keeps them outside of Python's own."""
    packages = tmp_path / "dist-packages"
    monkeypatch.setattr(torch, "__file__", str(packages / "torch" / "__init__.py"))
    for path, place in ((packages / "other.py", None), (tmp_path / "net.py", "net.py:2")):
        path.parent.mkdir(exist_ok=True)
        path.write_text("x = 1\n1 / 0\n")
        with pytest.raises(ZeroDivisionError) as caught:
            exec(compile(path.read_text(), path, "exec"), {})
        caught.value.__traceback__ = caught.value.__traceback__.tb_next  # without this test's line
        found = failed_in(caught.value)
        assert found == (place and f"{tmp_path / place}")
