"""Mutations that know what a file holds, and the forms of files that are written back signed.

A form turns a file into a tree of dicts, lists, plain values and tensors, and a tree into a file
whose checksums are right: what comes out is what a hostile hand would write, not damage.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import random
import tarfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from seprune.pipeline.journal import _checksum
from seprune.statistics.stored import _digest

JUNK: tuple[Any, ...] = (
    *(None, True, False, 0, 1, -1, 7, 2**31, 2**62, -(2**62), 0.5, 1e-300, 1e300, -0.0),
    *("", "x", "1", "nan", "../x", "/etc/passwd", "\x1b[31m[red]", "\udcff", "=1+1", "a" * 5000),
    *([], {}, [[]], [None], ["x"], {"x": 1}, [1, 2, 3], [0.5] * 40),
)
DTYPES = (torch.float32, torch.int64, torch.bfloat16, torch.bool, torch.float16, torch.uint8)


def mutated(tree: Any, source: random.Random) -> Any:
    """A copy of the tree with one to three changes anywhere in it."""
    tree = _copy(tree)
    for _ in range(source.choice((1, 1, 2, 3))):
        tree = _once(tree, source)
    return tree


def _copy(tree: Any) -> Any:
    if isinstance(tree, dict):
        return {key: _copy(value) for key, value in tree.items()}
    return [_copy(value) for value in tree] if isinstance(tree, list) else tree


def _once(tree: Any, source: random.Random) -> Any:
    places = _places(tree)
    if not places or source.random() < 0.02:
        return _copy(source.choice(JUNK))
    # a file has thousands of numbers in lists and a few keys that say what they are
    chosen = source.choice(sorted({depth for depth, _, _ in places}))
    _, holder, key = source.choice([place for place in places if place[0] == chosen])
    how = source.choice(("junk", "junk", "drop", "twice", "rename", "swap", "edit", "edit", "none"))
    value = holder[key]
    if how == "junk":
        holder[key] = _copy(source.choice(JUNK))
    elif how == "drop":
        del holder[key]
    elif how == "twice" and isinstance(holder, list):
        holder.insert(key, _copy(value))
    elif how == "rename" and isinstance(holder, dict):
        other = source.choice(["x", "", "..", f"{key}x", *holder])
        holder[other] = holder.pop(key)
    elif how == "swap":
        _, other, place = source.choice(places)
        holder[key], other[place] = _copy(other[place]), _copy(value)
    elif how == "none":
        holder[key] = None
    else:
        holder[key] = _edited(value, source)
    return tree


def _places(tree: Any, depth: int = 0) -> list[tuple[int, Any, Any]]:
    """Every place below the root: how deep, in which dict or list, at which key."""
    found: list[tuple[int, Any, Any]] = []
    keys = range(len(tree)) if isinstance(tree, list) else tree if isinstance(tree, dict) else ()
    for key in list(keys):
        found.append((depth, tree, key))
        found += _places(tree[key], depth + 1)
    return found


def _edited(value: Any, source: random.Random) -> Any:
    """The same kind of value, a little or a lot beside itself."""
    if isinstance(value, Tensor):
        return _tensor(value, source)
    if isinstance(value, bool):
        return not value
    if isinstance(value, int):
        return source.choice((value + 1, value - 1, -value, value * 1000, value // 2, float(value)))
    if isinstance(value, float):
        return source.choice((-value, value * 1e6, 0.0, int(value) if abs(value) < 1e9 else 1))
    if isinstance(value, str):
        cut = source.randrange(len(value) + 1)
        return source.choice((value[:cut], value + "x", value.upper(), value[::-1], f"../{value}"))
    if isinstance(value, list):
        return source.choice((value[:-1], value + value, value[::-1], []))
    return {"x": value}


def _tensor(value: Tensor, source: random.Random) -> Tensor:
    plain = value.to(torch.float64) if value.is_floating_point() else value
    made = (
        lambda: value.to(source.choice(DTYPES)),
        lambda: value.reshape(-1)[:-1].clone(),
        lambda: value.reshape(-1)[:0].clone(),
        lambda: torch.cat([value.reshape(-1)] * 2),
        lambda: value.unsqueeze(0).clone(),
        lambda: torch.full_like(plain, source.choice((-1, 0, 3))).to(value.dtype),
        lambda: (plain * 1e300).to(value.dtype) if value.is_floating_point() else -value,
        lambda: plain / 0 if value.is_floating_point() else value + 1,
    )
    return source.choice(made)().contiguous()


# -- forms ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Form:
    """How a file becomes a tree, and a tree a file with right checksums."""

    load: Callable[[Path], Any]
    store: Callable[[Path, Any], None]


def _text(content: Any) -> str:
    """JSON, also of what Python alone would write."""
    return json.dumps(content, default=_as_list)


def _as_list(value: Any) -> Any:
    return value.tolist() if isinstance(value, Tensor) else str(value)


def _store_json(path: Path, tree: Any) -> None:
    path.write_text(_text(tree))


def _load_journal(path: Path) -> Any:
    return [json.loads(line) for line in path.read_text().splitlines()]


def _store_journal(path: Path, tree: Any) -> None:
    lines = []
    for line in tree if isinstance(tree, list) else [tree]:
        if isinstance(line, dict):
            line = {key: value for key, value in line.items() if key != "sum"}
            line = {**line, "sum": _checksum(json.loads(_text(line)))}
        lines.append(_text(line))
    path.write_text("\n".join(lines) + "\n")


def _store_json_lines(path: Path, tree: Any) -> None:
    lines = tree if isinstance(tree, list) else [tree]
    path.write_text("".join(f"{_text(line)}\n" for line in lines))


def _load_tensors(path: Path) -> Any:
    with safe_open(path, framework="pt") as file:
        facts = json.loads((file.metadata() or {}).get("facts", "{}"))
        return {"facts": facts, "tensors": {n: file.get_tensor(n) for n in file.keys()}}  # noqa: SIM118


def _store_tensors(path: Path, tree: Any) -> None:
    """With the digest that statistics carry, and the one that lies beside a state."""
    parts = tree if isinstance(tree, dict) else {}
    tensors = parts.get("tensors")
    tensors = tensors if isinstance(tensors, dict) else {}
    own = {n: t.contiguous().clone() for n, t in tensors.items() if isinstance(t, Tensor)}
    text = _text(parts.get("facts"))
    save_file(own, path, {"facts": text, "sha256": _digest(own, text)})
    beside = path.with_suffix(".sha256")
    if beside.exists():
        beside.write_text(f"{hashlib.sha256(path.read_bytes()).hexdigest()}  {path.name}\n")


def _load_csv(path: Path) -> Any:
    return list(csv.reader(io.StringIO(path.read_text())))


def _store_csv(path: Path, tree: Any) -> None:
    stream = io.StringIO()
    writer = csv.writer(stream)
    for row in tree if isinstance(tree, list) else [tree]:
        writer.writerow(list(row) if isinstance(row, list | dict) else [row])
    path.write_bytes(stream.getvalue().encode("utf-8", "surrogateescape"))


def _load_header(path: Path) -> Any:
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    return json.loads(content[8 : 8 + length])


def _store_header(path: Path, tree: Any) -> None:
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    text = _text(tree).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + content[8 + length :])


def _load_lines(path: Path) -> Any:
    return [line.split("  ") for line in path.read_text().splitlines()]


def _store_lines(path: Path, tree: Any) -> None:
    rows = tree if isinstance(tree, list) else [tree]
    text = "\n".join("  ".join(map(str, r)) if isinstance(r, list) else str(r) for r in rows)
    path.write_bytes(f"{text}\n".encode("utf-8", "surrogateescape"))


def _load_picture(path: Path) -> Any:
    with Image.open(path) as image:
        return {
            "mode": image.mode,
            "size": list(image.size),
            "pixels": torch.tensor(np.array(image)),
        }


def _store_picture(path: Path, tree: Any) -> None:
    """A picture of another mode, size or content; where there is none, its bytes are cut."""
    parts = tree if isinstance(tree, dict) else {}
    pixels, size, mode = (parts.get(key) for key in ("pixels", "size", "mode"))
    try:
        values = pixels.numpy() if isinstance(pixels, Tensor) else np.zeros((3, 4), np.uint8)
        image = Image.fromarray(values.astype(np.uint8) if values.dtype.kind in "fb" else values)
        if (
            isinstance(size, list)
            and len(size) == 2
            and all(type(n) is int and 0 < n < 4000 for n in size)
        ):
            image = image.resize((size[0], size[1]))
        image = image.convert(mode) if isinstance(mode, str) else image
        image.save(path, "TIFF" if image.mode in ("F", "CMYK", "YCbCr", "LAB") else "PNG")
    except (ValueError, TypeError, KeyError, OSError, AttributeError):
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def _load_shard(path: Path) -> Any:
    with tarfile.open(path) as tar:
        return [[m.name, tar.extractfile(m).read().decode("latin1")] for m in tar]  # type: ignore[union-attr]


def _store_shard(path: Path, tree: Any) -> None:
    """Members that are no pairs of a name and a content are folders, or links to that name."""
    with tarfile.open(path, "w") as tar:
        for row in tree if isinstance(tree, list) else [tree]:
            name, content = (*row, "", "")[:2] if isinstance(row, list) else (row, None)
            member = tarfile.TarInfo(str(name))
            text = content if isinstance(content, str) else _text(content)
            held = text.encode("latin1", "replace")
            member.size, member.type = len(held), tarfile.REGTYPE
            if content is None:
                member.size, member.type, held = 0, tarfile.DIRTYPE, b""
            elif isinstance(content, list | dict):
                member.size, member.type, member.linkname = 0, tarfile.SYMTYPE, text
            tar.addfile(member, io.BytesIO(held))


JSON = Form(lambda path: json.loads(path.read_text()), _store_json)
JSON_LINES = Form(_load_journal, _store_json_lines)
JOURNAL = Form(_load_journal, _store_journal)
TENSORS = Form(_load_tensors, _store_tensors)
TABLE = Form(_load_csv, _store_csv)
HEADER = Form(_load_header, _store_header)
LINES = Form(_load_lines, _store_lines)
SHARD = Form(_load_shard, _store_shard)
PICTURE = Form(_load_picture, _store_picture)
