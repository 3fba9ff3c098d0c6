"""The only place that calls torch.load, and the safetensors reader beside it."""

from __future__ import annotations

import argparse
import pickle
import re
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from torch.serialization import safe_globals

from seprune.checkpoint import archive, pickles
from seprune.checkpoint.sniff import HEAD, Kind, container, damaged, incomplete
from seprune.errors import EnvironmentFault, InputError
from seprune.runtime.distributed import out_of_memory
from seprune.runtime.reading import parse_json, require_regular
from seprune.runtime.timeout import at_most

READ_SECONDS, READ_RATE = 60, 20e6  # and bytes a second, at the least
MOST_SIDES = 64  # of a tensor
MOST_TENSORS = 100_000  # of a .safetensors file; a few seconds, the largest networks have a tenth
HEADER_LIMIT = 100_000_000  # the format's own
_ITEM_BITS = {"F64": 64, "I64": 64, "U64": 64, "F32": 32, "I32": 32, "U32": 32, "F16": 16}
_ITEM_BITS |= {"BF16": 16, "I16": 16, "U16": 16, "I8": 8, "U8": 8, "BOOL": 8}
_STORAGE_BYTES = {
    "Double": 8,
    "Float": 4,
    "Half": 2,
    "BFloat16": 2,
    "Long": 8,
    "Int": 4,
    "Short": 2,
}
_STORAGE_BYTES |= {"Char": 1, "Byte": 1, "Bool": 1, "Untyped": 1}
_STORAGE_BYTES |= {"ComplexFloat": 8, "ComplexDouble": 16}


class _Dtype:
    """Stands in for numpy.dtype: reads numbers only, and never numpy's own unpickling."""

    def __init__(self, text: object, *_: object) -> None:
        self.text = text if isinstance(text, str) else ""

    def __setstate__(self, state: tuple[object, ...]) -> None:
        if state[1] == ">":
            self.text = f">{self.text}"


class _Unread:
    """Stands in for numpy.ndarray (random states of a training script) and paths: not kept."""

    def __init__(self, *_: object) -> None:
        pass

    def __setstate__(self, state: object) -> None:
        pass


def _scalar(dtype: _Dtype, content: bytes = b"") -> object:
    if not re.fullmatch(r">?[biuf][1248]", dtype.text):
        return None
    return np.frombuffer(content, np.dtype(dtype.text))[0].item()


_STAND_INS: list[Callable[..., Any] | tuple[Callable[..., Any], str]] = [
    argparse.Namespace,
    (_Dtype, "numpy.dtype"),
    (_Unread, "numpy.ndarray"),
    *((_scalar, f"numpy.{core}.multiarray.scalar") for core in ("core", "_core")),
    *((_Unread, f"numpy.{core}.multiarray._reconstruct") for core in ("core", "_core")),
    *((_Unread, name) for name in pickles.PATHS),
]


def read(path: Path, kind: Kind) -> tuple[Any, tuple[str, ...]]:
    """The objects in a weights file, on the CPU, and what there is to say about it.

    Raises:
        InputError: damaged, incomplete, or more than tensors and plain values.
    """
    with _memory(path):
        if kind == "safetensors":
            return read_safetensors(path), ()
        if kind == "zip":
            return _read_zip(path)
        if kind == "pickle":
            _refuse_plain(path)
        return _read_legacy(path), ("a file of torch < 1.6: it has no checksums",)


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a .safetensors file, after its header was checked against its size."""
    require_regular(path)
    _check_header(path)
    try:
        with safe_open(str(path), framework="pt", device="cpu") as opened:
            return {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    except SafetensorError as error:
        damaged(path, f"its header contradicts the file ({error})")


def read_metadata(path: Path) -> dict[str, str]:
    """The free text that a .safetensors file carries."""
    with safe_open(str(path), framework="pt") as opened:
        return dict(opened.metadata() or {})


def read_pickled(path: Path) -> Any:
    """Unpickle anything and run what it names. Only the child process of `convert` may call it."""
    with path.open("rb") as stream:
        if container(stream.read(HEAD)) == "pickle":
            stream.seek(0)
            return pickle.load(stream)
    return torch.load(path, map_location="cpu", weights_only=False)


def _read_zip(path: Path) -> tuple[Any, tuple[str, ...]]:
    found = archive.preflight(path)
    outlines = pickles.outline(found.pickle)
    pickles.check(path, outlines)
    _check_records(path, outlines[0], found=found)
    notes = () if found.checked else ("written without checksums: damage cannot be seen",)
    return _load(path), notes


def _refuse_plain(path: Path) -> NoReturn:
    with path.open("rb") as stream:
        pickles.check(path, pickles.outline(stream.read(pickles.PICKLE_LIMIT)))
    raise InputError(
        f"{path}: a Python pickle that torch.save did not write",
        why="it holds plain values and no tensors",
        fix="give a .safetensors file or a state dict that torch.save wrote",
        code="checkpoint-unknown",
    )


def _check_records(path: Path, outline: pickles.Outline, *, found: archive.Archive) -> None:
    """Every tensor's record is there, as long as the pickle says, and matches its checksum."""
    claims = [(f"data/{storage.key}", name, storage) for name, storage in outline.storages()]
    for record in found.broken:
        owner = next((f" of the tensor {name}" for key, name, _ in claims if key == record), "")
        damaged(path, f"the checksum (CRC) of the record {record}{owner} does not match its bytes")
    for record, name, storage in claims:
        size, has = _storage_bytes(storage), found.sizes.get(record)
        if has != size:
            damaged(path, f"the tensor {name} needs {size} bytes, the record {record} has {has}")


def _storage_bytes(storage: pickles.Storage) -> int:
    return storage.numel * _STORAGE_BYTES.get(storage.type_name.removesuffix("Storage"), 0)


def _read_legacy(path: Path) -> Any:
    with path.open("rb") as stream:
        # magic number, protocol, system, objects, storage keys; the raw storages follow
        outlines = pickles.outline(stream.read(pickles.PICKLE_LIMIT), pickles=5)
    pickles.check(path, outlines)
    size = path.stat().st_size
    storages = {storage.key: _storage_bytes(storage) for _, storage in outlines[3].storages()}
    needed = outlines[-1].end + sum(8 + count for count in storages.values())
    if needed > size:
        incomplete(path, f"its tensors end at byte {needed:,}, the file at {size:,}")
    return _load(path)


def _load(path: Path) -> Any:
    try:
        # an open file, because torch.load hands *paths* that end in .safetensors elsewhere
        with (
            path.open("rb") as stream,
            safe_globals(_STAND_INS),
            warnings.catch_warnings(),
            at_most(READ_SECONDS + path.stat().st_size / READ_RATE, TimeoutError),
        ):
            warnings.simplefilter("ignore")
            return torch.load(stream, map_location="cpu", weights_only=True)
    except MemoryError:
        raise
    except Exception as error:  # torch raises a dozen types, with advice that must not be shown
        if "allocate memory" in str(error):
            raise MemoryError from error
        if isinstance(error, pickle.UnpicklingError) and "Unsupported operand" in str(error):
            raise pickles.refused(
                path, "written with a pickle protocol above 2", called=""
            ) from None
        damaged(path, f"torch cannot rebuild its tensors ({type(error).__name__})")


def _check_header(path: Path) -> None:
    size = path.stat().st_size
    with path.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        if length > min(size - 8, HEADER_LIMIT):
            if length <= HEADER_LIMIT:
                incomplete(path, f"its header takes {length:,} bytes, the file has {size:,}")
            damaged(path, f"it claims a header of {length:,} bytes; the format allows 100,000,000")
        text = stream.read(length)
    if (count := text.count(b"{")) > MOST_TENSORS:  # each is an object, before any is parsed
        damaged(path, f"its header has {count:,} objects; there can be {MOST_TENSORS:,}")
    try:
        entries = parse_json(text)
        for name, entry in entries.items():
            if name != "__metadata__":
                _check_entry(path, name, entry=entry)
        ends = [int(e["data_offsets"][1]) for n, e in entries.items() if n != "__metadata__"]
    except (LookupError, ValueError, TypeError, AttributeError, ArithmeticError, RecursionError):
        damaged(path, "its header is not the JSON that the format demands")
    needed = 8 + length + max(ends, default=0)
    if needed > size:
        incomplete(path, f"its tensors end at byte {needed:,}, the file at {size:,}")


def _check_entry(path: Path, name: str, *, entry: dict[str, Any]) -> None:
    shape, (begin, end) = entry["shape"], entry["data_offsets"]
    bits = _ITEM_BITS.get(entry["dtype"])
    if bits is None:
        return
    if len(shape) > MOST_SIDES:
        damaged(path, f"the tensor {name} has {len(shape):,} sides")
    needed = bits // 8
    for width in shape:
        needed *= width
    if needed != end - begin:
        shown = "x".join(map(str, shape))[:60]
        damaged(path, f"the tensor {name} ({shown}) needs {needed:,} bytes, it has {end - begin:,}")


@contextmanager
def _memory(path: Path) -> Iterator[None]:
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not out_of_memory(error):
            raise
        raise EnvironmentFault(
            f"{path}: not enough memory to read it",
            why=f"its tensors take {path.stat().st_size:,} bytes",
            fix="close other programs or use a machine with more memory",
        ) from error
