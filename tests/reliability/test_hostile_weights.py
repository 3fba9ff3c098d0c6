"""Weights from strangers that mean harm, or are of other kinds: refused, and nothing runs."""

from __future__ import annotations

import gzip
import os
import pickle
import resource
import subprocess
import sys
import zipfile
from pathlib import Path

import costly
import evil
import numpy as np
import onnx
import pytest
import torch
from corpus import NET
from safetensors.torch import save_file
from torch import nn

from seprune.checkpoint import apply_weights, convert, load_weights
from seprune.errors import InputError, UsageError

ROOT = Path(__file__).parents[2]
CONVERT = "next: if you trust its author: seprune convert --allow-pickle"


# 7: pickles that run something

CALLS = {
    "posix.system": evil.command,
    "builtins.exec": evil.python_code,
    "subprocess.Popen": evil.child,
}


@pytest.mark.fault(7)
@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("layout", ["zip", "legacy", "plain", "protocol4", "named safetensors"])
def test_a_pickle_that_runs_a_command(tmp_path, refuse, canary, name, layout):
    path = tmp_path / ("w.safetensors" if layout == "named safetensors" else "w.pth")
    content = {"state_dict": evil.net().state_dict(), "optimizer": {"state": CALLS[name](canary)}}
    if layout == "plain":
        path.write_bytes(pickle.dumps({"w": CALLS[name](canary)}))
    elif layout == "protocol4":
        torch.save(content, path, pickle_protocol=4)
    else:
        torch.save(content, path, _use_new_zipfile_serialization=layout != "legacy")
    error = refuse(path, code="checkpoint-unsafe")
    assert error.what == f"{path}: refused, its pickle calls {name}"
    assert "nothing of it was run" in error.why


@pytest.mark.fault(7)
def test_an_old_text_pickle_that_runs_a_command(tmp_path, refuse, canary):
    (tmp_path / "w.pth").write_bytes(evil.old_text_pickle(canary))
    refuse(tmp_path / "w.pth", code="checkpoint-unsafe", says="its pickle calls posix.system")


@pytest.mark.fault(7)
def test_a_pickle_that_unpickles_another(tmp_path, refuse, canary):
    torch.save({"w": evil.nested_load(canary)}, tmp_path / "w.pth")
    says = "it calls torch.storage._load_from_bytes"
    refuse(tmp_path / "w.pth", code="checkpoint-pickled", says=says)


@pytest.mark.fault(7)
def test_the_name_of_an_innocent_class_does_not_help(tmp_path, refuse, canary):
    torch.save({"model": evil.net(), "w": evil.command(canary)}, tmp_path / "w.pth")
    refuse(tmp_path / "w.pth", code="checkpoint-unsafe", says="its pickle calls posix.system")


@pytest.mark.fault(7)
def test_only_the_listed_torch_functions_pass(tmp_path, refuse):
    # torch's own safe mode allows bytearray, which allocates what the file says
    content = b"\x80\x02c__builtin__\nbytearray\n\x8a\x08\0\0\0\0\0\x10\0\0\x85R."
    evil.archive_with(tmp_path / "w.pth", content)
    refuse(tmp_path / "w.pth", code="checkpoint-pickled", says="it calls builtins.bytearray")


@pytest.mark.fault(7)
def test_the_variable_that_turns_safety_off_changes_nothing(tmp_path, canary):
    torch.save({"w": evil.command(canary)}, tmp_path / "w.pth")
    script = "from pathlib import Path; from seprune.checkpoint import load_weights as load; "
    script += "import sys; load(Path(sys.argv[1]))"
    environment = {**os.environ, "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", script, str(tmp_path / "w.pth")]
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert "w.pth: refused, its pickle calls posix.system" in ended.stderr
    assert not canary.exists()


@pytest.mark.fault(7)
def test_convert_refuses_commands_too(tmp_path, canary):
    torch.save({"model": evil.net(), "w": evil.command(canary)}, tmp_path / "w.pth")
    with pytest.raises(InputError, match=r"its pickle calls posix\.system"):
        convert(tmp_path / "w.pth", tmp_path / "w.safetensors")
    assert not (tmp_path / "w.safetensors").exists()


@pytest.mark.fault(7)
def test_a_pickle_index_that_asks_for_memory(tmp_path, refuse):
    # LONG_BINPUT 0x7fffffff: Python's C unpickler allocates 34 GB for it
    evil.archive_with(tmp_path / "w.pth", b"\x80\x02}r\xff\xff\xff\x7f.")
    refuse(tmp_path / "w.pth", code="checkpoint-no-weights", says="it is a dict with nothing")


SLOW = {"hashes that are alike", "a tuple as a key"}  # they run to the limits of time and memory


@pytest.mark.fault(8)
@pytest.mark.parametrize("layout", ["zip", pytest.param("plain", marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=pytest.mark.slow) if n in SLOW else n for n in costly.PICKLES]
)
def test_a_small_pickle_that_would_take_hours_or_terabytes(terminal, tmp_path, name, layout):
    path = tmp_path / "w.pth"
    if layout == "plain":
        path.write_bytes(costly.PICKLES[name])
    else:
        evil.archive_with(path, costly.PICKLES[name])
    before = path.read_bytes()
    ended = terminal("inspect", NET, "--checkpoint", path, "--json", seconds=10, memory=512)
    assert ended.status == 3, (ended.status, ended.err[-2000:])
    assert ended.error["code"].startswith("checkpoint-"), ended.error
    assert path.read_bytes() == before


# 8: bombs


@pytest.mark.fault(8)
@pytest.mark.parametrize("build", [evil.deflated_bomb, evil.overlapping_bomb])
def test_zip_bombs_are_refused_before_allocation(tmp_path, refuse, build):
    path = build(tmp_path / "w.pth")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    error = refuse(path, code="checkpoint-bomb")
    grown_kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert grown_kib < 8 << 10
    assert f"its {path.stat().st_size:,} bytes would become " in error.what
    assert "is compressed or overlaps another" in error.why


@pytest.mark.fault(8)
@pytest.mark.parametrize("legacy", [False, True])
def test_a_storage_larger_than_the_file(tmp_path, refuse, legacy):
    path = tmp_path / "w.pth"
    torch.save({"w": torch.zeros(1000)}, path, _use_new_zipfile_serialization=not legacy)
    content = path.read_bytes()
    # 1000 elements of the pickle (BININT2) become 0xfff0 and more
    content = content.replace(b"M\xe8\x03", b"M\xf0\xff")
    path.write_bytes(content)
    if not legacy:  # a zip with checksums that fit
        with zipfile.ZipFile(path) as old:
            record = old.infolist()[0]
        start = evil.offset_of(path, "data.pkl")
        evil.archive_with(path, content[start : start + record.file_size])
        refuse(path, code="checkpoint-damaged", says="the tensor w needs 262080 bytes")
    else:
        says = "its tensors end at byte 262,"
        refuse(path, code="checkpoint-incomplete", says=says)


@pytest.mark.fault(8)
def test_a_tensor_expanded_without_end(tmp_path, refuse):
    torch.save({"w": torch.zeros(1).expand(10**12)}, tmp_path / "w.pth")
    says = "the tensor w claims 1000000000000 numbers and has fewer"
    refuse(tmp_path / "w.pth", code="checkpoint-damaged", says=says)


LITTLE_MEMORY = """
import resource, sys
from pathlib import Path
from seprune.checkpoint import load_weights
load_weights(Path({!r}))
used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + (32 << 20), -1))
try:
    load_weights(Path({!r}))
except Exception as error:
    print(error)
    sys.exit(error.exit_status)
"""


@pytest.mark.fault(8)
@pytest.mark.parametrize("suffix", [".pth", ".old", ".safetensors"])
def test_too_little_memory_is_a_fault_of_the_machine(warm, tmp_path, suffix):
    big = {"weight": torch.zeros(16 << 20)}
    for name, state in (("small", evil.net().state_dict()), ("big", big)):
        path = (tmp_path / name).with_suffix(suffix)
        if suffix == ".safetensors":
            save_file(state, path)
        else:
            torch.save(state, path, _use_new_zipfile_serialization=suffix == ".pth")
    paths = [str((tmp_path / name).with_suffix(suffix)) for name in ("small", "big")]
    ended = warm.run(tmp_path / "log", before=LITTLE_MEMORY.format(*paths))
    assert ended.status == 4, ended.output
    assert ended.output.startswith(f"{paths[1]}: not enough memory to read it\n")
    assert "why: its tensors take 67,1" in ended.output
    assert "next: close other programs or use a machine with more memory" in ended.output


# 9: safetensors that lie

ENTRY = {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16]}
LIES = {
    "shape": (
        {"w": {**ENTRY, "shape": [2, 3]}},
        -1,
        "the tensor w (2x3) needs 24 bytes, it has 16",
    ),
    "overflow": ({"w": {**ENTRY, "shape": [2**62, 2**62]}}, -1, "bytes, it has 16"),
    "giant": ({"w": ENTRY}, 2**60, "it claims a header of 1,152,921,504,606,846,976 bytes"),
    "not json": (b"{w", -1, "its header is not the JSON that the format demands"),
    "deep": (b'{"a":' * 50_000, -1, "its header is not the JSON that the format demands"),
    "no dtype": ({"w": {"shape": [2, 2], "data_offsets": [0, 16]}}, -1, "its header is not"),
    "odd dtype": ({"w": {**ENTRY, "dtype": "F33"}}, -1, "its header contradicts the file"),
    "hole": ({"w": {**ENTRY, "shape": [2], "data_offsets": [8, 16]}}, -1, "contradicts the file"),
    "list": (b"{}" + b" " * 6, 1, "its header is not the JSON"),
}


@pytest.mark.fault(9)
@pytest.mark.parametrize("name", LIES)
def test_safetensors_that_lie(tmp_path, refuse, name):
    header, length, says = LIES[name]
    path = evil.safetensors_with(tmp_path / "w.safetensors", header, bytes(16), length)
    refuse(path, code="checkpoint-damaged", says=says)


@pytest.mark.fault(9)
def test_a_tensor_of_a_hundred_thousand_sides(tmp_path, refuse):
    """Their product has 1.9 million digits."""
    entry = {"dtype": "F32", "shape": [2**62] * 100_000, "data_offsets": [0, 4]}
    path = evil.safetensors_with(tmp_path / "w.safetensors", {"w": entry}, bytes(16))
    refuse(path, code="checkpoint-damaged", says="the tensor w has 100,000 sides")


@pytest.mark.fault(9)
def test_safetensors_of_more_tensors_than_any_network_has(tmp_path, refuse):
    """300,000 empty ones, which take no bytes, took 13 s."""
    entry = {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}
    header = {f"a{i}": entry for i in range(100_001)}
    path = evil.safetensors_with(tmp_path / "w.safetensors", header, b"")
    refuse(path, code="checkpoint-damaged", says="its header has 100,002 objects")


@pytest.mark.fault(9)
def test_safetensors_with_a_header_longer_than_the_file(tmp_path, refuse):
    path = evil.safetensors_with(tmp_path / "w.safetensors", {"w": ENTRY}, b"", 5_000_000)
    says = "its header takes 5,000,000 bytes, the file has "
    refuse(path, code="checkpoint-incomplete", says=says)


# 10: whole pickled models


@pytest.mark.fault(10)
@pytest.mark.parametrize(
    ("layout", "wrap"),
    [
        ("zip", lambda m: {"epoch": 3, "model": m, "ema": None}),
        pytest.param("legacy", lambda m: m, marks=pytest.mark.slow),
        pytest.param(
            "plain", lambda m: {"epoch": 3, "model": m, "ema": None}, marks=pytest.mark.slow
        ),
        pytest.param("zip", lambda m: m, marks=pytest.mark.slow),
        pytest.param(
            "legacy", lambda m: {"epoch": 3, "model": m, "ema": None}, marks=pytest.mark.slow
        ),
        pytest.param("plain", lambda m: m, marks=pytest.mark.slow),
    ],
)
def test_a_whole_model_is_converted_in_a_child(tmp_path, refuse, wrap, layout):
    path, out = tmp_path / "w.pth", tmp_path / "w.safetensors"
    model = evil.net()
    if layout == "plain":
        path.write_bytes(pickle.dumps(wrap(model), protocol=2))
    else:
        torch.save(wrap(model), path, _use_new_zipfile_serialization=layout == "zip")
    error = refuse(path, code="checkpoint-pickled", says=f"{CONVERT} {path}")
    if layout == "zip":
        named = "a whole pickled model (class torch.nn.modules.container.Sequential)"
        assert named in error.what
    before = path.read_bytes()
    converted = convert(path, out)
    assert path.read_bytes() == before
    assert converted.metadata["source_sha256"]
    for name, tensor in model.state_dict().items():
        assert torch.equal(converted.tensors[name], tensor)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["w.pth", "w.safetensors"]


@pytest.mark.fault(10)
def test_convert_names_a_class_that_is_not_here(tmp_path):
    module = tmp_path / "their_nets.py"
    module.write_text("import torch\nclass Net(torch.nn.Linear):\n    pass\n")
    sys.path.insert(0, str(tmp_path))
    try:
        import their_nets

        torch.save(their_nets.Net(2, 2), tmp_path / "w.pth")
    finally:
        sys.path.remove(str(tmp_path))
    with pytest.raises(InputError) as caught:
        convert(tmp_path / "w.pth", tmp_path / "w.safetensors")
    assert caught.value.code == "checkpoint-convert"
    assert caught.value.why == "ModuleNotFoundError: No module named 'their_nets'"
    assert "PYTHONPATH=FOLDER seprune convert --allow-pickle" in str(caught.value)
    assert not (tmp_path / "w.safetensors").exists()


@pytest.mark.fault(10)
def test_convert_stops_a_pickle_that_does_not_end(tmp_path):
    import time

    torch.save({"model": evil.net(), "w": evil.Call(time.sleep, 60)}, tmp_path / "w.pth")
    with pytest.raises(InputError, match=r"why: it did not end within 0\.2 s"):
        convert(tmp_path / "w.pth", tmp_path / "w.safetensors", limit_seconds=0.2)


@pytest.mark.fault(10)
def test_convert_never_writes_over_its_input(tmp_path):
    evil.good(tmp_path / "w.safetensors")
    with pytest.raises(UsageError, match="is the input itself"):
        convert(tmp_path / "w.safetensors", tmp_path / "w.safetensors")


@pytest.mark.fault(10)
def test_a_pickle_protocol_that_the_safe_reader_does_not_know(tmp_path, refuse):
    state = evil.net().state_dict()
    torch.save(state, tmp_path / "w.pth", pickle_protocol=4)
    error = refuse(tmp_path / "w.pth", code="checkpoint-pickled", says=CONVERT)
    assert "written with a pickle protocol above 2" in error.what
    converted = convert(tmp_path / "w.pth", tmp_path / "w.safetensors")
    assert torch.equal(converted.tensors["fc.weight"], state["fc.weight"])


@pytest.mark.fault(10)
def test_a_tar_of_torch_0_1(tmp_path, refuse):
    path = evil.legacy_tar(tmp_path / "w.pth.tar")
    refuse(path, code="checkpoint-pickled", says="it is a tar checkpoint of torch 0.1")


# 12: other frameworks and archives


@pytest.mark.fault(12)
@pytest.mark.filterwarnings("ignore:.*torch.jit")
def test_torchscript(tmp_path, refuse):
    path = evil.torchscript(tmp_path / "w.pt")
    error = refuse(path, code="checkpoint-unsupported", says="it is a TorchScript archive")
    assert "torch.save(model.state_dict(), 'weights.pth')" in error.fix


@pytest.mark.fault(12)
def test_onnx(tmp_path, refuse):
    graph = onnx.helper.make_graph([], "g", [], [])
    onnx.save(onnx.helper.make_model(graph, producer_name="pytorch"), tmp_path / "w.onnx")
    refuse(tmp_path / "w.onnx", code="checkpoint-unsupported", says="it is an ONNX model")


@pytest.mark.fault(12)
def test_a_torch_export_program(tmp_path, refuse):
    program = torch.export.export(nn.Linear(2, 2), (torch.zeros(1, 2),))
    torch.export.save(program, tmp_path / "w.pt2")
    says = "it is a torch.export program (.pt2)"
    refuse(tmp_path / "w.pt2", code="checkpoint-unsupported", says=says)


@pytest.mark.fault(12)
def test_numpy_archive(tmp_path, refuse):
    np.savez_compressed(tmp_path / "w.npz", w=np.zeros(3))
    refuse(tmp_path / "w.npz", code="checkpoint-unsupported", says="it is a NumPy .npz archive")


@pytest.mark.fault(12)
def test_zip_around_a_checkpoint(tmp_path, refuse):
    evil.good(tmp_path / "w.pth")
    with zipfile.ZipFile(tmp_path / "w.zip", "w") as archive:
        archive.write(tmp_path / "w.pth", "w.pth")
    says = "it is a zip archive that torch.save did not write (it holds 'w.pth')"
    refuse(tmp_path / "w.zip", code="checkpoint-unsupported", says=says)


FOREIGN = {
    "w.h5": (b"\x89HDF\r\n\x1a\n" + bytes(64), "it is an HDF5 file (Keras / TensorFlow)"),
    "w.tflite": (b"\x1c\0\0\0TFL3" + bytes(64), "it is a TensorFlow Lite model"),
    "model.ckpt-1.data-00000-of-00001": (b"\x01\x80\xff\xfe" * 9, "it is a TensorFlow file"),
    "model.ckpt-1.index": (
        b"\0\x01\xff" * 9 + b"\x57\xfb\x80\x8b\x24\x75\x47\xdb",
        "it is the index of a TensorFlow checkpoint",
    ),
    "w.pth.gz": (gzip.compress(b"weights"), "it is gzip-compressed"),
    "w.png": (b"\x89PNG\r\n\x1a\n" + bytes(64), "it is a PNG image"),
}


@pytest.mark.fault(12)
@pytest.mark.parametrize("name", FOREIGN)
def test_other_formats_are_named(tmp_path, refuse, name):
    content, says = FOREIGN[name]
    (tmp_path / name).write_bytes(content)
    refuse(tmp_path / name, code="checkpoint-unsupported", says=says)


# 16: values that no trained network has


def _state(change) -> dict[str, torch.Tensor]:
    state = {name: tensor.clone() for name, tensor in evil.net().state_dict().items()}
    change(state)
    return state


BAD_VALUES = {
    "nan": (lambda s: s["fc.weight"][0, :2].fill_(float("nan")), "fc.weight (2 of 40)"),
    "infinite": (lambda s: s["conv1.weight"].view(-1)[0].fill_(-float("inf")), "conv1.weight (1"),
    "statistics": (lambda s: s["bn1.running_var"].fill_(float("nan")), "bn1.running_var (4 of 4)"),
    "zero": (lambda s: [t.zero_() for t in s.values()], "2 tensors: conv1.weight, fc.weight"),
    "zero matrices": (
        lambda s: [t.zero_() for t in s.values() if t.ndim > 1],
        "all weights are zero",
    ),
}


@pytest.mark.fault(16)
@pytest.mark.parametrize("name", BAD_VALUES)
def test_values_that_would_answer_nonsense(tmp_path, name):
    change, says = BAD_VALUES[name]
    path = tmp_path / "w.safetensors"
    save_file(_state(change), path)
    model = evil.net()
    before = {n: t.clone() for n, t in model.state_dict().items()}
    with pytest.raises(InputError) as caught:
        apply_weights(model, load_weights(path), path=path)
    assert caught.value.code == "checkpoint-values"
    assert says in str(caught.value)
    assert "next: take an earlier checkpoint of that training" in str(caught.value)
    assert all(torch.equal(before[n], t) for n, t in model.state_dict().items())
