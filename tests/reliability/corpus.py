"""Files that somebody may give as a checkpoint, each with its row of the fault table and code."""

from __future__ import annotations

import functools
import io
import json
import operator
import pickle
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import evil
import onnx
import torch
from safetensors.torch import save_file
from torch import nn

from seprune.models import build
from seprune.runtime.files import write_sums

NET = "seprune/se_resnet8"


@dataclass(frozen=True)
class Fault:
    """A file that is refused: `make` writes it, `says` is a part of the message."""

    row: int
    code: str
    says: str
    make: Callable[[Path, Path], Path]  # folder, canary


def weights(classes: int = 10, channels: int = 1, net: str = NET) -> dict[str, torch.Tensor]:
    """The weights that the digits are scored with."""
    torch.manual_seed(0)
    return dict(build(net, classes=classes, input=(channels, 8, 8)).state_dict())


def dense(path: Path, **change: object) -> Path:
    """A good checkpoint, or a training checkpoint with more beside the weights."""
    torch.save({"state_dict": weights(), **change} if change else weights(), path)
    return path


def edited(pruned: Path, folder: Path, **entries: object) -> Path:
    """A copy of a saved folder with other entries in its config.json, and sums that fit."""
    folder.mkdir()
    for path in pruned.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    config = json.loads((folder / "config.json").read_text())
    config["seprune"] |= entries
    (folder / "config.json").write_text(json.dumps(config))
    write_sums(folder)
    return folder


# -- pickles that run something --------------------------------------------------------------------


def _torch_pickle(content: Callable[[Path], object], *, zipped: bool = True) -> Callable:
    def make(folder: Path, canary: Path) -> Path:
        content_of_file = {"state_dict": weights(), "extra": content(canary)}
        torch.save(content_of_file, folder / "w.pth", _use_new_zipfile_serialization=zipped)
        return folder / "w.pth"

    return make


def _raw_pickle(code: Callable[[str], bytes]) -> Callable[[Path, Path], Path]:
    """Opcodes written by hand, in torch's own zip layout."""

    def make(folder: Path, canary: Path) -> Path:
        return evil.archive_with(folder / "w.pth", code(f"touch '{canary}'"))

    return make


def _stack_global(command: str) -> bytes:
    """STACK_GLOBAL: the name is put together on the stack, as scanners of text do not see it."""
    text = command.encode()
    name = b"\x8c\x05posix\x8c\x06system\x93"
    return b"\x80\x04" + name + b"\x8c" + bytes([len(text)]) + text + b"\x85R."


def _inst(command: str) -> bytes:
    """INST, an opcode that nobody writes any more."""
    return b"(S" + repr(command).encode() + b"\niposix\nsystem\n."


def _obj(command: str) -> bytes:
    """OBJ, likewise."""
    return b"(cposix\nsystem\nS" + repr(command).encode() + b"\no."


def _evaluated(canary: Path) -> evil.Call:
    return evil.Call(eval, f"open({str(canary)!r}, 'w').close()")


def _partial(canary: Path) -> evil.Call:
    import os

    return evil.Call(functools.partial(os.system, f"touch '{canary}'"))


def _attribute(canary: Path) -> evil.Call:
    """No dangerous name in sight but operator's."""
    return evil.Call(operator.methodcaller("touch"), canary)


def _built(canary: Path) -> object:
    """BUILD on an object whose state sets its class's methods."""

    class Sneaky(nn.Module):
        def __reduce__(self):
            import os

            return (os.system, (f"touch '{canary}'",), {"a": 1})

    return Sneaky()


def _member_of_a_zip(folder: Path, canary: Path) -> Path:
    """A zip around a checkpoint around a pickle that runs a command."""
    inner = io.BytesIO()
    torch.save({"w": evil.command(canary)}, inner)
    with zipfile.ZipFile(folder / "w.pth", "w") as archive:
        archive.writestr("w/w.pth", inner.getvalue())
    return folder / "w.pth"


def _plain(folder: Path, canary: Path) -> Path:
    (folder / "w.pth").write_bytes(pickle.dumps({"w": evil.command(canary)}))
    return folder / "w.pth"


def _text(folder: Path, canary: Path) -> Path:
    (folder / "w.pth").write_bytes(evil.old_text_pickle(canary))
    return folder / "w.pth"


def _whole_model(folder: Path, canary: Path) -> Path:
    torch.save(build(NET), folder / "w.pth")
    return folder / "w.pth"


# -- other bytes -----------------------------------------------------------------------------------


def _bytes(content: bytes, name: str = "w.pth") -> Callable[[Path, Path], Path]:
    def make(folder: Path, canary: Path) -> Path:
        (folder / name).write_bytes(content)
        return folder / name

    return make


def _cut(name: str, kept: float) -> Callable[[Path, Path], Path]:
    def make(folder: Path, canary: Path) -> Path:
        path = folder / name
        save_file(weights(), path) if name.endswith(".safetensors") else dense(path)
        content = path.read_bytes()
        path.write_bytes(content[: int(kept * len(content))])
        return path

    return make


def _flipped(folder: Path, canary: Path) -> Path:
    path = dense(folder / "w.pth", epoch=3)
    evil.flip_bit(path, evil.offset_of(path, "data/0") + 8)
    return path


def _nested_bomb(folder: Path, canary: Path) -> Path:
    """A stored zip that holds a deflated one: small outside, 64 MB inside."""
    inner = evil.deflated_bomb(folder / "inner.pth")
    with zipfile.ZipFile(folder / "w.pth", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("w/data.pkl", b"\x80\x02}.")
        archive.write(inner, "w/data/0")
        archive.writestr("w/data/1", bytes(64 << 20))
    inner.unlink()
    return folder / "w.pth"


def _lie(header: object, length: int = -1, data: bytes = bytes(16)) -> Callable[[Path, Path], Path]:
    def make(folder: Path, canary: Path) -> Path:
        return evil.safetensors_with(folder / "w.safetensors", header, data, length)

    return make


def _onnx(folder: Path, canary: Path) -> Path:
    graph = onnx.helper.make_graph([], "g", [], [])
    onnx.save(onnx.helper.make_model(graph, producer_name="pytorch"), folder / "w.onnx")
    return folder / "w.onnx"


def _state(change: Callable[[dict[str, torch.Tensor]], object], **shape: int) -> Callable:
    def make(folder: Path, canary: Path) -> Path:
        state = weights(**shape)
        change(state)
        save_file(state, folder / "w.safetensors")
        return folder / "w.safetensors"

    return make


def _other(net: str = NET, classes: int = 10) -> Callable[[Path, Path], Path]:
    def make(folder: Path, canary: Path) -> Path:
        torch.save(weights(classes, net=net), folder / "w.pth")
        return folder / "w.pth"

    return make


def _folder(folder: Path, canary: Path) -> Path:
    (folder / "given").mkdir()
    dense(folder / "given" / "w.pth")
    return folder / "given"


def _missing(folder: Path, canary: Path) -> Path:
    dense(folder / "se_resnet.pth")
    return folder / "se_resnet.pt"


SHAPE = {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16]}
HTML = b"<!DOCTYPE html>\n<html><head><title>Sign in</title></head></html>"
POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:0a\nsize 1149627\n"
UNSAFE, PICKLED, DAMAGED = "checkpoint-unsafe", "checkpoint-pickled", "checkpoint-damaged"
INCOMPLETE, BOMB, UNSUPPORTED = "checkpoint-incomplete", "checkpoint-bomb", "checkpoint-unsupported"

FAULTS: dict[str, Fault] = {
    "missing": Fault(1, "checkpoint-missing", "the nearest match is se_resnet.pth", _missing),
    "a folder without weights": Fault(1, "checkpoint-folder", "given/w.pth", _folder),
    "empty": Fault(2, "checkpoint-empty", "the file is empty (0 bytes)", _bytes(b"")),
    "HTML": Fault(3, "checkpoint-not-weights", "HTML page (title: 'Sign in')", _bytes(HTML)),
    "LFS pointer": Fault(3, "checkpoint-not-weights", "git-LFS pointer", _bytes(POINTER)),
    "text": Fault(3, "checkpoint-not-weights", "'Rate limit'", _bytes(b"Rate limit\n")),
    "half a .pth": Fault(4, INCOMPLETE, "download it again", _cut("w.pth", 0.5)),
    "half a .safetensors": Fault(4, INCOMPLETE, "download it again", _cut("w.safetensors", 0.5)),
    "zeros": Fault(4, INCOMPLETE, "are zeros", _bytes(bytes(5000))),
    "a flipped bit": Fault(5, DAMAGED, "data/0 of the tensor state_dict.conv1.weight", _flipped),
    "os.system": Fault(7, UNSAFE, "calls posix.system", _torch_pickle(evil.command)),
    "os.system, torch < 1.6": Fault(
        7, UNSAFE, "calls posix.system", _torch_pickle(evil.command, zipped=False)
    ),
    "exec": Fault(7, UNSAFE, "calls builtins.exec", _torch_pickle(evil.python_code)),
    "eval": Fault(7, UNSAFE, "calls builtins.eval", _torch_pickle(_evaluated)),
    "Popen": Fault(7, UNSAFE, "calls subprocess.Popen", _torch_pickle(evil.child)),
    "functools.partial": Fault(7, UNSAFE, "calls posix.system", _torch_pickle(_partial)),
    "operator.methodcaller": Fault(7, PICKLED, "operator.methodcaller", _torch_pickle(_attribute)),
    "BUILD": Fault(7, UNSAFE, "calls posix.system", _torch_pickle(_built)),
    "a pickle in a pickle": Fault(7, PICKLED, "_load_from_bytes", _torch_pickle(evil.nested_load)),
    "STACK_GLOBAL": Fault(7, UNSAFE, "calls posix.system", _raw_pickle(_stack_global)),
    "INST": Fault(7, UNSAFE, "calls posix.system", _raw_pickle(_inst)),
    "OBJ": Fault(7, UNSAFE, "calls posix.system", _raw_pickle(_obj)),
    "a bare pickle": Fault(7, UNSAFE, "calls posix.system", _plain),
    "a text pickle": Fault(7, UNSAFE, "calls posix.system", _text),
    "a zip around it": Fault(7, UNSUPPORTED, "torch.save did not write", _member_of_a_zip),
    "deflated": Fault(8, BOMB, "would become", lambda d, _: evil.deflated_bomb(d / "w.pth")),
    "overlapping": Fault(8, BOMB, "overlaps", lambda d, _: evil.overlapping_bomb(d / "w.pth")),
    "nested": Fault(8, BOMB, "would become", _nested_bomb),
    "a lying shape": Fault(9, DAMAGED, "needs 24 bytes", _lie({"w": {**SHAPE, "shape": [2, 3]}})),
    "an endless shape": Fault(9, DAMAGED, "needs", _lie({"w": {**SHAPE, "shape": [2**62] * 9}})),
    "a giant header": Fault(9, DAMAGED, "claims a header", _lie({"w": SHAPE}, 2**60)),
    "a header past the end": Fault(9, INCOMPLETE, "header takes", _lie({"w": SHAPE}, 5_000_000)),
    "a deep header": Fault(9, DAMAGED, "not the JSON", _lie(b'{"a":' * 50_000)),
    "overlapping offsets": Fault(
        9, DAMAGED, "contradicts the file", _lie({"v": SHAPE, "w": SHAPE})
    ),
    "negative offsets": Fault(
        9, DAMAGED, "contradicts", _lie({"w": {**SHAPE, "data_offsets": [-16, 0]}})
    ),
    "a whole model": Fault(10, PICKLED, "seprune convert --allow-pickle", _whole_model),
    "TorchScript": Fault(
        12, UNSUPPORTED, "TorchScript", lambda d, _: evil.torchscript(d / "w.pth")
    ),
    "ONNX": Fault(12, UNSUPPORTED, "an ONNX model", _onnx),
    "Keras": Fault(12, UNSUPPORTED, "HDF5", _bytes(b"\x89HDF\r\n\x1a\n" + bytes(64), "w.h5")),
    "tar of torch 0.1": Fault(12, PICKLED, "torch 0.1", lambda d, _: evil.legacy_tar(d / "w.tar")),
    "another architecture": Fault(
        14, "checkpoint-mismatch", "of another architecture", _other("seprune/se_resnet20")
    ),
    "other classes": Fault(
        14, "checkpoint-classes", "fc.weight is 7x64 in the file", _other(classes=7)
    ),
    "NaN": Fault(
        16, "checkpoint-values", "fc.weight (64 of 640)",
        _state(lambda s: s["fc.weight"][0].fill_(float("nan"))),
    ),
    "infinity": Fault(
        16, "checkpoint-values", "fc.bias (1 of 10)",
        _state(lambda s: s["fc.bias"][0].fill_(float("-inf"))),
    ),
    "all zero": Fault(
        16, "checkpoint-values", "all weights are zero",
        _state(lambda s: [t.zero_() for t in s.values()]),
    ),
}  # fmt: skip
