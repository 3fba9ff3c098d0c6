"""Weights from strangers: each fault is a real file, refused in three parts, and nothing runs."""

from __future__ import annotations

import os
from pathlib import Path

import evil
import pytest
import torch

from seprune.checkpoint import load_weights
from seprune.errors import InputError

ROOT = Path(__file__).parents[2]
CONVERT = "next: if you trust its author: seprune convert --allow-pickle"


# 1: missing, a folder, unreadable


@pytest.mark.fault(1)
def test_missing_file_names_the_nearest_match(tmp_path, refuse):
    evil.good(tmp_path / "seresnet.pth")
    error = refuse(tmp_path / "seresnet.pt", code="checkpoint-missing")
    assert error.what == f"{tmp_path}/seresnet.pt: no such file"
    assert error.why == "the nearest match is seresnet.pth"
    assert error.fix == f"give {tmp_path}/seresnet.pth"


@pytest.mark.fault(1)
def test_missing_folder_is_named(tmp_path, refuse):
    says = f"why: the folder {tmp_path}/no does not exist"
    refuse(tmp_path / "no" / "w.pth", code="checkpoint-missing", says=says)


@pytest.mark.fault(1)
def test_a_file_used_as_a_folder(tmp_path, refuse):
    evil.good(tmp_path / "w.pth")
    refuse(tmp_path / "w.pth" / "model.safetensors", code="checkpoint-missing")


@pytest.mark.fault(1)
def test_a_folder_with_model_safetensors_just_works(tmp_path):
    state = evil.good(tmp_path / "model.safetensors")
    assert load_weights(tmp_path).tensors.keys() == state.keys()


@pytest.mark.fault(1)
def test_another_folder_lists_its_weights_files(tmp_path, refuse):
    evil.good(tmp_path / "w.pth")
    error = refuse(tmp_path, code="checkpoint-folder", says="why: it holds w.pth")
    assert error.fix == f"give the file: {tmp_path}/w.pth"


@pytest.mark.fault(1)
def test_a_pipe_is_not_opened(tmp_path, refuse):
    os.mkfifo(tmp_path / "w.pth")
    refuse(tmp_path / "w.pth", code="checkpoint-unreadable", says="not a regular file")


@pytest.mark.fault(1)
def test_a_file_that_the_system_refuses_to_read(tmp_path):
    # reading address 0 of a process fails with an input/output error, also for root
    with pytest.raises(InputError, match=r"/proc/self/mem: cannot be read\nwhy: Input/output"):
        load_weights(Path("/proc/self/mem"))


@pytest.mark.fault(1)
def test_a_file_without_permission(tmp_path):
    path = tmp_path / "w.pth"
    evil.good(path)
    path.chmod(0)
    user = os.geteuid()
    try:
        if user == 0:
            os.seteuid(65534)
        with pytest.raises(InputError, match="cannot be read\nwhy: Permission denied") as caught:
            load_weights(path)
    finally:
        os.seteuid(user)
    assert caught.value.code == "checkpoint-unreadable"


# 2 to 4: empty, something else, incomplete


@pytest.mark.fault(2)
def test_empty_file(tmp_path, refuse):
    (tmp_path / "w.pth").touch()
    refuse(tmp_path / "w.pth", code="checkpoint-empty", says="the file is empty (0 bytes)")


OTHER_FILES = {
    "page": (
        b"<!DOCTYPE html>\n<html><head><title>Sign in</title></head></html>",
        "it is an HTML page (title: 'Sign in')",
    ),
    "pointer": (
        b"version https://git-lfs.github.com/spec/v1\noid sha256:0a\nsize 1149627\n",
        "it is a git-LFS pointer, not the weights themselves\n"
        "why: git stored the 1149627 bytes of weights elsewhere\nnext: run `git lfs pull`",
    ),
    "json": (b'{"error": {"code": 404}}', 'it is a text file: \'{"error": {"code": 404}}\''),
    "text": (b"Rate limit exceeded\n", "it is a text file: 'Rate limit exceeded'"),
}


@pytest.mark.fault(3)
@pytest.mark.parametrize("name", OTHER_FILES)
@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_text_in_place_of_weights(tmp_path, refuse, name, suffix):
    path = (tmp_path / "w").with_suffix(suffix)
    content, says = OTHER_FILES[name]
    path.write_bytes(content)
    refuse(path, code="checkpoint-not-weights", says=says)


@pytest.mark.fault(4)
@pytest.mark.parametrize("suffix", [".pth", ".safetensors", ".old"])
@pytest.mark.parametrize("kept", [0.002, 0.3, 0.6, 0.97])
def test_truncated_file(tmp_path, refuse, suffix, kept):
    path = (tmp_path / "w").with_suffix(suffix)
    evil.good(path)
    content = path.read_bytes()
    path.write_bytes(content[: max(3, int(kept * len(content)))])
    error = refuse(path, code="checkpoint-incomplete", says="incomplete file")
    assert error.fix == "download it again"


@pytest.mark.fault(4)
def test_file_of_zeros(tmp_path, refuse):
    (tmp_path / "w.pth").write_bytes(bytes(5000))
    says = "its first 4096 of 5000 bytes are zeros"
    refuse(tmp_path / "w.pth", code="checkpoint-incomplete", says=says)


@pytest.mark.fault(12)
def test_unknown_bytes(tmp_path, refuse):
    (tmp_path / "w.pth").write_bytes(b"\xde\xad\xbe\xef" * 20)
    says = "it starts with the bytes de ad be ef de ad be ef"
    refuse(tmp_path / "w.pth", code="checkpoint-unknown", says=says)


# 5: a flipped bit


@pytest.mark.fault(5)
def test_a_flipped_bit_names_the_tensor(tmp_path, refuse):
    path = tmp_path / "w.pth"
    torch.save({"epoch": 1, "state_dict": evil.net().state_dict()}, path)
    evil.flip_bit(path, evil.offset_of(path, "data/0") + 40)
    says = "the checksum (CRC) of the record data/0 of the tensor state_dict.conv1.weight"
    refuse(path, code="checkpoint-damaged", says=says)


@pytest.mark.fault(5)
def test_a_flipped_bit_in_the_index(tmp_path, refuse):
    path = tmp_path / "w.pth"
    evil.good(path)
    evil.flip_bit(path, evil.offset_of(path, "data.pkl") + 60)
    says = "the record w/data.pkl, which describes the tensors, fails its checksum"
    refuse(path, code="checkpoint-damaged", says=says)


@pytest.mark.fault(5)
def test_a_flipped_bit_that_makes_torch_return_uninitialised_memory(tmp_path, refuse):
    path = tmp_path / "w.pth"
    evil.good(path)
    entry = path.read_bytes().rindex(b"w/data/0") - 46  # in the table of contents
    evil.flip_bit(path, entry + 38, bit=4)  # "is a folder"
    says = "its table of contents calls the record w/data/0 a folder"
    refuse(path, code="checkpoint-damaged", says=says)


@pytest.mark.fault(6)
def test_a_flipped_bit_changes_the_sha256_that_is_shown(tmp_path):
    path = tmp_path / "w.safetensors"
    evil.good(path)
    before = load_weights(path).sha256
    evil.flip_bit(path, path.stat().st_size - 1)
    assert load_weights(path).sha256 != before


@pytest.mark.fault(5)
def test_a_file_written_without_checksums_loads_and_says_so(tmp_path):
    torch.serialization.set_crc32_options(False)
    try:
        evil.good(tmp_path / "w.pth")
    finally:
        torch.serialization.set_crc32_options(True)
    assert load_weights(tmp_path / "w.pth").notes == (
        "written without checksums: damage cannot be seen",
    )
