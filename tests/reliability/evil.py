"""The evil corpus: every builder writes one real file as somebody could leave it on a web page."""

from __future__ import annotations

import argparse
import io
import json
import pickle
import struct
import subprocess
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import nn


def net() -> nn.Module:
    """A tiny SE-like network with a head, BatchNorm and a zero-initialised gamma."""
    torch.manual_seed(0)
    made = nn.Sequential()
    made.add_module("conv1", nn.Conv2d(3, 4, 3, bias=False))
    made.add_module("bn1", nn.BatchNorm2d(4))
    made.add_module("flatten", nn.Flatten())
    made.add_module("fc", nn.Linear(4, 10))
    nn.init.zeros_(made.bn1.weight)
    return made


class Call:
    """Pickles as `function(*arguments)`."""

    def __init__(self, function: Callable[..., Any], *arguments: object) -> None:
        self.call = (function, arguments)

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[object, ...]]:
        return self.call


def command(canary: Path) -> Call:
    """A pickle that creates the file `canary` through the shell."""
    import os

    return Call(os.system, f"touch '{canary}'")


def python_code(canary: Path) -> Call:
    """A pickle that creates the file `canary` through `exec`."""
    return Call(exec, f"open({str(canary)!r}, 'w').close()")


def child(canary: Path) -> Call:
    """A pickle that creates the file `canary` through a process."""
    return Call(subprocess.Popen, ["touch", str(canary)])


def nested_load(canary: Path) -> Call:
    """A pickle that makes torch unpickle another one without its safe mode."""
    inner = io.BytesIO()
    torch.save(command(canary), inner)
    return Call(torch.storage._load_from_bytes, inner.getvalue())


def old_text_pickle(canary: Path) -> bytes:
    """Protocol 0, as exploit generators write it."""
    return f"cposix\nsystem\n(S'touch {canary}'\ntR.".encode()


def archive_with(path: Path, content: bytes, *, compress: bool = False, top: str = "w") -> Path:
    """A zip in torch's layout around a pickle made by hand."""
    mode = zipfile.ZIP_DEFLATED if compress else zipfile.ZIP_STORED
    with zipfile.ZipFile(path, "w", mode) as archive:
        archive.writestr(f"{top}/data.pkl", content)
        archive.writestr(f"{top}/byteorder", "little")
        archive.writestr(f"{top}/version", "3\n")
    return path


def deflated_bomb(path: Path, megabytes: int = 64) -> Path:
    """A checkpoint of `megabytes` zeros, deflated to a thousandth."""
    stored = path.with_suffix(".stored")
    torch.save({"weight": torch.zeros(megabytes << 18)}, stored)
    with zipfile.ZipFile(stored) as old, zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as new:
        for name in old.namelist():
            new.writestr(name, old.read(name))
    stored.unlink()
    return path


def overlapping_bomb(path: Path, entries: int = 500) -> Path:
    """A stored zip whose table of contents names the same bytes many times."""
    torch.save({"weight": torch.zeros(1 << 14)}, path)
    with zipfile.ZipFile(path, "a") as archive:
        record = max(archive.infolist(), key=lambda info: info.file_size)
        for index in range(entries):
            copy = zipfile.ZipInfo(f"{record.filename.partition('/')[0]}/data/{index + 1000}")
            copy.header_offset, copy.CRC = record.header_offset, record.CRC
            copy.file_size = copy.compress_size = record.file_size
            archive.filelist.append(copy)
        archive._didModify = True
    return path


def flip_bit(path: Path, offset: int, bit: int = 0) -> None:
    """Change one bit of a file."""
    with path.open("r+b") as stream:
        stream.seek(offset)
        byte = stream.read(1)[0]
        stream.seek(offset)
        stream.write(bytes([byte ^ (1 << bit)]))


def offset_of(path: Path, record: str) -> int:
    """Where the bytes of a stored zip record start."""
    with zipfile.ZipFile(path) as archive:
        info = next(i for i in archive.infolist() if i.filename.endswith(record))
    with path.open("rb") as stream:
        stream.seek(info.header_offset + 26)
        name, extra = struct.unpack("<HH", stream.read(4))
    return info.header_offset + 30 + name + extra


def safetensors_with(path: Path, header: object, data: bytes = b"", length: int = -1) -> Path:
    """A .safetensors file with any header, and any claim about its length."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    size = struct.pack("<Q", len(text) if length < 0 else length)
    path.write_bytes(size + text + data)
    return path


def torchscript(path: Path) -> Path:
    """What torch.jit.save writes."""
    torch.jit.trace(nn.Linear(2, 2), torch.zeros(1, 2)).save(str(path))
    return path


def legacy_tar(path: Path) -> Path:
    """The layout of torch 0.1: a tar of pickles."""
    with tarfile.open(path, "w") as archive:
        for name in ("sys_info", "pickle", "storages", "tensors"):
            content = pickle.dumps({}, protocol=2)
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return path


def training(state: dict[str, torch.Tensor]) -> dict[str, Any]:
    """What training scripts save around the weights."""
    return {
        "state_dict": state,
        "args": argparse.Namespace(lr=0.1, out=Path("runs/x")),
        "best": np.float64(0.75),
        "random": np.random.RandomState(0).get_state(),
    }


def good(path: Path) -> dict[str, torch.Tensor]:
    """Save the tiny network's weights in the format that the suffix says.

    `.old` is a training checkpoint of torch < 1.6, whose pickles no checksum protects.
    """
    state = dict(net().state_dict())
    if path.suffix == ".safetensors":
        save_file(state, path)
    elif path.suffix == ".old":
        torch.save(training(state), path, _use_new_zipfile_serialization=False)
    else:
        torch.save(state, path)
    return state
