"""Which weights are taken from a checkpoint, under which names, and how they get into a model."""

from __future__ import annotations

import argparse
import collections
import pathlib
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from torch.optim.swa_utils import AveragedModel

from seprune.checkpoint import apply_weights, convert, is_pruned_folder, load_weights
from seprune.errors import InputError

SHARED = Path(__file__).parents[3] / "shared" / "checkpoints"


def net(classes: int = 10, width: int = 4) -> nn.Module:
    torch.manual_seed(0)
    layers = {
        "conv1": nn.Conv2d(3, width, 3, bias=False),
        "bn1": nn.BatchNorm2d(width),
        "flatten": nn.Flatten(),
        "fc": nn.Linear(width, classes),
    }
    return nn.Sequential(collections.OrderedDict(layers))


def scaled(factor: float, prefix: str = "") -> dict[str, torch.Tensor]:
    """The tiny network's state dict, with every weight multiplied so that it is recognised."""
    return {
        prefix + name: t * factor if t.is_floating_point() else t
        for name, t in net().state_dict().items()
    }


def same(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> bool:
    return left.keys() == right.keys() and all(torch.equal(t, right[n]) for n, t in left.items())


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "w.pth"


def test_both_shared_checkpoints_hold_the_same_weights():
    if not SHARED.is_dir():
        pytest.skip(f"needs {SHARED.name}/ beside the repository")
    plain = load_weights(SHARED / "se_resnet20-cifar10.pth")
    training = load_weights(SHARED / "se_resnet20-cifar10-training.pth")
    assert same(plain.tensors, training.tensors)
    assert (plain.source, plain.stripped, plain.notes) == ("", (), ())
    assert (training.source, training.stripped) == ("state_dict", ("module.",))
    assert training.notes == (
        "weights taken from state_dict",
        "prefix module. stripped from every name",
    )
    assert training.metadata == {"epoch": 42, "arch": "se_resnet20", "best_acc": 0.87}


@pytest.mark.parametrize("suffix", [".pth", ".safetensors", ".bin"])
@pytest.mark.parametrize("named", [".pth", ".safetensors"])
def test_the_bytes_decide_and_not_the_name(tmp_path, suffix, named):
    path = tmp_path / f"w{suffix}"
    if suffix == ".safetensors":
        save_file(scaled(1), path)
    else:
        torch.save(scaled(1), path)
    renamed = path.rename(tmp_path / f"renamed{named}")
    assert same(load_weights(renamed).tensors, scaled(1))


def test_files_of_old_torch_load_and_say_that_damage_is_invisible(path):
    torch.save(scaled(2), path, _use_new_zipfile_serialization=False)
    loaded = load_weights(path)
    assert same(loaded.tensors, scaled(2))
    assert loaded.notes == ("a file of torch < 1.6: it has no checksums",)


def test_a_training_checkpoint_with_everything_that_scripts_leave(path):
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    model(torch.randn(2, 3, 3, 3)).sum().backward()
    optimizer.step()
    content = {
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "lr_scheduler": torch.optim.lr_scheduler.MultiStepLR(optimizer, [3, 5]).state_dict(),
        "scaler": torch.amp.GradScaler("cpu").state_dict(),
        "args": argparse.Namespace(lr=0.1, out=pathlib.Path("runs/x"), acc=np.float32(0.5)),
        "random": np.random.RandomState(0).get_state(),
        "torch_random": torch.get_rng_state(),
        "best": np.float64(0.75),
        "count": np.int64(7),
        "epoch": 3,
        "shape": torch.Size([3, 32, 32]),
        "dtype": torch.float16,
    }
    torch.save(content, path)
    loaded = load_weights(path)
    assert same(loaded.tensors, dict(model.state_dict()))
    assert loaded.metadata == {"best": 0.75, "count": 7, "epoch": 3}


# which weights

RAW, EMA, SECOND = scaled(1), scaled(2), scaled(3)
CONTAINERS = {
    # name: (content, {choice: (key, weights)})
    "timm": (
        {"state_dict": RAW, "state_dict_ema": EMA, "model_ema": SECOND},
        {
            "auto": ("state_dict_ema", EMA),
            "ema": ("state_dict_ema", EMA),
            "raw": ("state_dict", RAW),
        },
    ),
    "torchvision": (
        {"model": RAW, "model_ema": EMA, "epoch": 1},
        {"auto": ("model_ema", EMA), "ema": ("model_ema", EMA), "raw": ("model", RAW)},
    ),
    "no average yet": (
        {"state_dict": RAW, "state_dict_ema": None, "model": SECOND},
        {"auto": ("state_dict", RAW), "raw": ("state_dict", RAW)},
    ),
    "another key": (
        {"net": RAW, "acc": 0.9, "optimizer": {"state": {0: {"m": torch.ones(1)}}}},
        {"auto": ("net", RAW), "raw": ("net", RAW)},
    ),
    "plain": (RAW, {"auto": ("", RAW), "raw": ("", RAW)}),
}


@pytest.mark.parametrize("name", CONTAINERS)
def test_weights_are_chosen_as_timm_chooses(path, name):
    content, choices = CONTAINERS[name]
    torch.save(content, path)
    for choice, (key, expected) in choices.items():
        loaded = load_weights(path, weights=choice)
        assert loaded.source == key
        assert same(loaded.tensors, expected)


def test_auto_takes_what_timm_takes(path):
    load_state_dict = pytest.importorskip("timm.models").load_state_dict
    for content, _ in CONTAINERS.values():
        torch.save(content, path)
        if "net" not in content:
            assert same(load_weights(path).tensors, dict(load_state_dict(str(path))))


def test_the_choice_is_reported(path):
    torch.save({"model": RAW, "model_ema": EMA}, path)
    assert load_weights(path).notes == (
        "weights taken from model_ema (beside it: model; --weights raw|ema chooses)",
    )


def test_averaged_models_lose_their_counter_and_prefix(path):
    averaged = AveragedModel(net())
    averaged.update_parameters(net())
    torch.save({"model": RAW, "model_ema": averaged.state_dict()}, path)
    loaded = load_weights(path)
    assert same(loaded.tensors, dict(averaged.module.state_dict()))
    assert loaded.notes[1:] == (
        "averaged weights (n_averaged = 1)",
        "prefix module. stripped from every name",
    )
    torch.save(averaged.state_dict(), path)
    assert same(load_weights(path, weights="ema").tensors, loaded.tensors)


@pytest.mark.parametrize(
    ("content", "choice", "why"),
    [
        (RAW, "ema", "it holds a plain state dict"),
        ({"state_dict": RAW}, "ema", "it holds state_dict"),
        ({"state_dict_ema": RAW}, "raw", "it holds state_dict_ema"),
        ({"n_averaged": torch.tensor(3), **RAW}, "raw", "it holds averaged weights (n_averaged)"),
    ],
)
def test_a_choice_that_the_file_does_not_offer(path, content, choice, why):
    torch.save(content, path)
    with pytest.raises(InputError) as caught:
        load_weights(path, weights=choice)
    error = caught.value
    assert (error.code, error.exit_status) == ("checkpoint-no-choice", 3)
    assert error.what == f"{path}: no {choice} weights in it"
    assert why in error.why
    assert error.fix == "use --weights auto"


@pytest.mark.parametrize(
    ("content", "why"),
    [
        ({"epoch": 3, "lr": 0.1}, "it is a dict with 'epoch', 'lr'"),
        ([1, 2], "it is a list"),
        ({}, "it is a dict with nothing"),
        ({"a": RAW, "b": EMA}, "it is a dict with 'a', 'b'; several of them are state dicts: a, b"),
    ],
)
def test_a_file_without_a_state_dict(path, content, why):
    torch.save(content, path)
    with pytest.raises(InputError) as caught:
        load_weights(path)
    error = caught.value
    assert (error.code, error.exit_status) == ("checkpoint-no-weights", 3)
    assert (error.what, error.why) == (f"{path}: no state dict in it", why)
    assert "torch.save({'state_dict': model.state_dict()}" in error.fix


# prefixes


@pytest.mark.parametrize(
    ("prefix", "stripped"),
    [
        ("module.", ("module.",)),
        ("_orig_mod.module.", ("_orig_mod.", "module.")),
        ("module._orig_mod.", ("module.", "_orig_mod.")),
        ("model.", ("model.",)),
    ],
)
def test_wrappers_are_stripped(path, prefix, stripped):
    torch.save(scaled(1, prefix), path)
    loaded = load_weights(path)
    assert loaded.stripped == stripped
    assert same(loaded.tensors, RAW)


def test_a_prefix_that_only_some_names_have_stays(path):
    torch.save({"model.a": torch.ones(1), "b": torch.ones(1)}, path)
    assert list(load_weights(path).tensors) == ["model.a", "b"]


def test_a_prefix_that_is_the_models_own_comes_back(path):
    wrapped = nn.ModuleDict({"model": net()})
    torch.save(scaled(5, "module.model."), path)
    apply_weights(wrapped, load_weights(path), path=path)
    assert same(dict(wrapped.state_dict()), scaled(5, "model."))


def test_what_is_no_tensor_is_reported(path):
    torch.save({**RAW, "note": "hello", "extra": {}}, path)
    loaded = load_weights(path)
    assert same(loaded.tensors, RAW)
    assert loaded.notes == ("left out, not tensors: note, extra",)


# into a model


def test_weights_are_applied_and_notes_returned(path):
    torch.save({"state_dict": scaled(7)}, path)
    model = net()
    notes = apply_weights(model, load_weights(path), path=path)
    assert same(dict(model.state_dict()), scaled(7))
    assert notes == ("weights taken from state_dict",)


def test_half_precision_is_cast_and_reported(path):
    half = {n: t.half() if t.is_floating_point() else t for n, t in RAW.items()}
    torch.save(half, path)
    model = net()
    assert apply_weights(model, load_weights(path), path=path) == ("stored as float16, cast",)
    assert torch.equal(model.fc.weight, half["fc.weight"].float())


def test_other_classes_name_the_head(path):
    torch.save(net(classes=7).state_dict(), path)
    with pytest.raises(InputError) as caught:
        apply_weights(net(classes=10), load_weights(path), path=path)
    error = caught.value
    assert (error.code, error.exit_status) == ("checkpoint-classes", 3)
    assert error.what == f"{path}: weights for 7 classes, the model has 10"
    assert error.why == "the head fc.weight is 7x4 in the file, 10x4 in the model"
    assert error.fix == "--classes 7"


def test_features_that_were_saved_alone_miss_a_head_and_nothing_else(path):
    state = {n: t for n, t in net().state_dict().items() if not n.startswith("fc.")}
    torch.save(state, path)
    model = net()
    with pytest.raises(InputError) as caught:
        apply_weights(model, load_weights(path), path=path)
    what = f"{path}: weights without a head, the model has one: fc.weight, fc.bias"
    assert caught.value.what == what
    assert "num_classes 0 in model.args" in caught.value.fix
    model.fc = nn.Identity()
    apply_weights(model, load_weights(path), path=path)
    del state["bn1.weight"]  # a head and more is another network
    torch.save(state, path)
    with pytest.raises(InputError, match="another architecture"):
        apply_weights(net(), load_weights(path), path=path)


def test_another_architecture_is_one_summary_and_no_partial_load(path):
    state = {f"block{i}.conv.weight": torch.ones(2, 2) for i in range(40)}
    torch.save({"arch": "resnet99", "state_dict": {**state, "fc.weight": torch.ones(9, 2)}}, path)
    model = net()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(InputError) as caught:
        apply_weights(model, load_weights(path), path=path)
    error = caught.value
    assert (error.code, error.exit_status) == ("checkpoint-mismatch", 3)
    assert error.what == (
        f"{path}: weights of another architecture, "
        "41 tensors, 178 numbers, head fc.weight 9x2 (9 classes)"
    )
    assert error.why == (
        "6 missing from the file: conv1.weight, bn1.weight, and 4 more; "
        "40 unknown to the model: block0.conv.weight, block1.conv.weight, and 38 more; "
        "1 of another shape: fc.weight is 9x2 in the file, 10x4 in the model"
    )
    assert "the file says that it is 'resnet99'" in error.fix
    assert same(dict(model.state_dict()), before)


def test_images_of_other_channels_are_named_with_the_option_that_mends_it(path):
    state = net().state_dict()
    state["conv1.weight"] = state["conv1.weight"][:, :1].clone()
    torch.save(state, path)
    with pytest.raises(InputError) as caught:
        apply_weights(net(), load_weights(path), path=path)
    error = caught.value
    assert error.what == f"{path}: weights for images of 1 channels, the model takes 3"
    assert error.why == "conv1.weight is 4x1x3x3 in the file, 4x3x3x3 in the model"
    assert error.fix.startswith("--input 1xHxW ")


def test_another_width_is_not_mistaken_for_classes(path):
    torch.save(net(width=8).state_dict(), path)
    with pytest.raises(
        InputError, match=r"6 of another shape: conv1\.weight is 8x3x3x3 in the file"
    ):
        apply_weights(net(), load_weights(path), path=path)


def test_a_counter_that_old_files_lack_is_no_difference(path):
    torch.save({n: t for n, t in RAW.items() if "num_batches" not in n}, path)
    model = net()
    apply_weights(model, load_weights(path), path=path)
    assert model.bn1.num_batches_tracked == 0


@pytest.mark.parametrize("kept", ["0.weight", "1.weight"])
def test_tied_weights_load_from_either_name(path, kept):
    model = nn.Sequential(nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False))
    model[1].weight = model[0].weight
    torch.save({kept: torch.eye(3)}, path)
    apply_weights(model, load_weights(path), path=path)
    assert torch.equal(model[0].weight, torch.eye(3))
    assert model[1].weight is model[0].weight


def test_zero_gammas_biases_and_infinite_masks_are_legitimate(path):
    model = net()
    nn.init.zeros_(model.bn1.weight)
    nn.init.zeros_(model.fc.bias)
    model.register_buffer("mask", torch.tensor([0.0, -float("inf")]))
    torch.save(model.state_dict(), path)
    apply_weights(model, load_weights(path), path=path)


def test_a_value_that_overflows_in_the_models_precision_is_refused(path):
    state = scaled(1)
    state["fc.weight"][0, 0] = 1e6
    torch.save(state, path)
    with pytest.raises(InputError, match=r"NaN or infinite weights.*\n.*fc\.weight \(1 of 40\)"):
        apply_weights(net().half(), load_weights(path), path=path)


# folders and conversion


def test_a_pruned_folder_is_recognised_by_its_config(tmp_path):
    save_file(scaled(1), tmp_path / "model.safetensors")
    assert not is_pruned_folder(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    assert not is_pruned_folder(tmp_path)
    (tmp_path / "config.json").write_text("[" * 100_000)
    assert not is_pruned_folder(tmp_path)
    (tmp_path / "config.json").write_text('{"seprune": {"version": 1}}')
    assert is_pruned_folder(tmp_path)
    assert not is_pruned_folder(tmp_path / "model.safetensors")
    path = tmp_path / "model.safetensors"
    weights = load_weights(path)
    with pytest.raises(InputError, match=f"next: .* give its folder, {tmp_path}"):
        apply_weights(net(width=8), weights, path=path)


def test_convert_reads_plain_weights_without_unpickling_them(path, tmp_path, monkeypatch):
    tensors = {**RAW, "conv1.weight": RAW["conv1.weight"].to(memory_format=torch.channels_last)}
    torch.save({"state_dict": tensors, "state_dict_ema": EMA}, path)
    monkeypatch.setattr("subprocess.run", None)
    out = tmp_path / "new" / "w.safetensors"
    assert same(convert(path, out, weights="raw").tensors, RAW)
    metadata = load_weights(out).metadata
    assert metadata["source_sha256"] == load_weights(path).sha256
    assert metadata["notes"].startswith("weights taken from state_dict (beside it: state_dict_ema")


def test_weights_with_a_head_load_into_a_network_without_one(path):
    torch.save(net().state_dict(), path)
    headless = net()
    headless.fc = nn.Identity()
    notes = apply_weights(headless, load_weights(path), path=path)
    assert notes == ("left out, the model has no such layer: fc.weight, fc.bias",)
    left = {n: t for n, t in net().state_dict().items() if not n.startswith("fc.")}
    assert same(headless.state_dict(), left)
    headless.conv1 = nn.Identity()  # a convolution is no head
    with pytest.raises(InputError, match="another architecture"):
        apply_weights(headless, load_weights(path), path=path)
