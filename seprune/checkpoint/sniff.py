"""What is this file really? Decided by its bytes, never by its name, before anything parses it."""

from __future__ import annotations

import difflib
import errno
import re
import stat
from pathlib import Path
from typing import Literal, NoReturn

from seprune.errors import InputError
from seprune.runtime.reading import open_regular
from seprune.runtime.text import shell_word

Kind = Literal["zip", "legacy", "pickle", "safetensors"]
SUFFIXES = (".safetensors", ".pth", ".pt", ".bin", ".ckpt", ".tar")
TORCH_MAGIC = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."  # first pickle of a file of torch < 1.6
PICKLE = re.compile(rb"\x80[\x02-\x05]|[(c]?c[\w.]+\n[\w.]+\n")  # protocols 2 to 5; a global of 0
HEAD = 4096

# where the bytes stand, the bytes, what the file is, what to do about it
_EXPORT = "load it in its own framework and save its weights as .safetensors"
_UNPACK = "unpack it and name the file inside"
_DOWNLOAD = "download the weights file again"
_FOREIGN = (
    (0, b"\x89HDF\r\n\x1a\n", "an HDF5 file (Keras / TensorFlow)", _EXPORT),
    (4, b"TFL3", "a TensorFlow Lite model", _EXPORT),
    (-8, b"\x57\xfb\x80\x8b\x24\x75\x47\xdb", "the index of a TensorFlow checkpoint", _EXPORT),
    (0, b"GGUF", "a GGUF file", _EXPORT),
    (0, b"\x93NUMPY", "a NumPy array", _EXPORT),
    (0, b"\x1f\x8b", "gzip-compressed", _UNPACK),
    (0, b"BZh", "bzip2-compressed", _UNPACK),
    (0, b"\xfd7zXZ\0", "xz-compressed", _UNPACK),
    (0, b"\x28\xb5\x2f\xfd", "zstandard-compressed", _UNPACK),
    (0, b"7z\xbc\xaf\x27\x1c", "a 7-Zip archive", _UNPACK),
    (0, b"Rar!", "a RAR archive", _UNPACK),
    (0, b"\x89PNG", "a PNG image", _DOWNLOAD),
    (0, b"\xff\xd8\xff", "a JPEG image", _DOWNLOAD),
    (0, b"%PDF", "a PDF document", _DOWNLOAD),
    (0, b"\x7fELF", "a compiled program", _DOWNLOAD),
)


def locate(path: Path) -> Path:
    """The regular file that holds the weights: `path`, or `model.safetensors` in that folder.

    Raises:
        InputError: missing (names the nearest match), not a file, or unreadable.
    """
    try:
        mode = path.stat().st_mode
        if stat.S_ISDIR(mode):
            return _inside(path)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise _missing(path) from error
    except (OSError, ValueError) as error:
        raise unreadable(path, error) from error
    if not stat.S_ISREG(mode):
        raise InputError(
            f"{path}: not a regular file",
            why="it is a device, a pipe or a socket",
            fix="give the path of a weights file",
            code="checkpoint-unreadable",
        )
    return path


def sniff(path: Path) -> Kind:
    """The container format of a weights file.

    Raises:
        InputError: empty, incomplete, or something that holds no PyTorch weights; says what it is.
    """
    with open_regular(path) as stream:
        head = stream.read(HEAD)
        size = stream.seek(0, 2)
        stream.seek(max(0, size - 8))
        tail = stream.read(8)
    if not head:
        refuse(path, "the file is empty (0 bytes)", fix=_DOWNLOAD, code="checkpoint-empty")
    if not head.strip(b"\0"):
        incomplete(path, f"its first {len(head)} of {size} bytes are zeros")
    kind = container(head)
    if kind is None:
        _refuse_foreign(path, head, tail=tail)
    return kind


def container(head: bytes) -> Kind | None:
    """The format that the first bytes of a file announce."""
    if head.startswith(b"PK\x03\x04"):
        return "zip"
    if head.startswith(TORCH_MAGIC):
        return "legacy"
    # the first 8 bytes are the header's length: printable text there means a text file
    if head[8:9] == b"{" and not head[:8].decode("latin1").isprintable():
        return "safetensors"
    return "pickle" if PICKLE.match(head) else None


def refuse(path: Path, what: str, *, why: str = "", fix: str, code: str) -> NoReturn:
    """Raise the InputError for a file that is not weights; `what` completes its path."""
    raise InputError(
        f"{path}: {what}",
        why=why or "seprune reads weights that torch.save or safetensors wrote",
        fix=fix,
        code=code,
    )


def incomplete(path: Path, why: str) -> NoReturn:
    """Raise the InputError for a file that was cut short."""
    raise InputError(
        f"{path}: incomplete file", why=why, fix="download it again", code="checkpoint-incomplete"
    )


def damaged(path: Path, why: str) -> NoReturn:
    """Raise the InputError for a file whose content contradicts itself."""
    raise InputError(
        f"{path}: damaged file", why=why, fix="download it again", code="checkpoint-damaged"
    )


def unreadable(path: Path, error: Exception) -> InputError:
    """The InputError for a file that the system does not let us read."""
    why = getattr(error, "strerror", None) or str(error)
    disk = getattr(error, "errno", None) == errno.EIO
    look = f"ls -l {shell_word(path)}"
    return InputError(
        f"{path}: cannot be read",
        why=why,
        fix=f"{'check the disk' if disk else 'check its permissions'}: {look}",
        code="checkpoint-unreadable",
    )


def _refuse_foreign(path: Path, head: bytes, *, tail: bytes) -> NoReturn:
    for offset, magic, what, fix in _FOREIGN:
        where = tail if offset < 0 else head[offset:]
        if where.startswith(magic):
            refuse(path, f"it is {what}", fix=fix, code="checkpoint-unsupported")
    if head[257:262] == b"ustar":
        _refuse_tar(path, head)
    _refuse_text(path, head)
    protobuf = _protobuf(path, head)
    if protobuf:
        refuse(path, f"it is {protobuf}", fix=_EXPORT, code="checkpoint-unsupported")
    if len(head) < 9 or head.startswith(b"PK"):
        incomplete(path, f"it ends after {len(head)} bytes")
    refuse(
        path,
        "not a weights file",
        why=f"it starts with the bytes {head[:8].hex(' ')}, which no known format does",
        fix="give a .safetensors file or a state dict that torch.save wrote",
        code="checkpoint-unknown",
    )


def _refuse_text(path: Path, head: bytes) -> None:
    if head.startswith(b"version https://git-lfs"):
        size = re.search(rb"^size (\d+)", head, re.MULTILINE)
        refuse(
            path,
            "it is a git-LFS pointer, not the weights themselves",
            why=f"git stored the {size[1].decode() if size else '?'} bytes of weights elsewhere",
            fix="run `git lfs pull` in the repository that it came from",
            code="checkpoint-not-weights",
        )
    if re.match(rb"\s*<(!doctype|html|head|\?xml)", head, re.IGNORECASE):
        title = re.search(rb"<title[^>]*>\s*(.{1,60}?)\s*<", head, re.IGNORECASE | re.DOTALL)
        named = f" (title: {title[1].decode(errors='replace')!r})" if title else ""
        refuse(
            path,
            f"it is an HTML page{named}",
            why="the server sent a page, often a login or an error, in place of the weights",
            fix="open the link in a browser and download the weights file itself",
            code="checkpoint-not-weights",
        )
    text = head.decode(errors="ignore")
    if len(text) >= len(head) - 4 and not re.search(r"[\0-\x08\x0e-\x1f]", text):
        line = text.strip().partition("\n")[0][:60]
        refuse(path, f"it is a text file: {line!r}", fix=_DOWNLOAD, code="checkpoint-not-weights")


def _refuse_tar(path: Path, head: bytes) -> NoReturn:
    first = head[:100].rstrip(b"\0").decode(errors="replace")
    if first.rstrip("/") in ("pickle", "sys_info", "tensors", "storages"):
        refuse(
            path,
            "it is a tar checkpoint of torch 0.1",
            why="torch has no safe reader for that format: reading it could run code",
            fix=f"if you trust its author: seprune convert --allow-pickle {shell_word(path)}",
            code="checkpoint-pickled",
        )
    what = f"it is a tar archive (first entry: {first!r})"
    refuse(path, what, fix=_UNPACK, code="checkpoint-unsupported")


def _protobuf(path: Path, head: bytes) -> str:
    if re.search(r"\.(data-\d+-of-\d+|pb)$", path.name):
        return "a TensorFlow file"
    # field 1, a small varint, then a known field: onnx.ModelProto, or tensorflow.SavedModel
    if re.match(rb"\x08[\x01-\x20][\x12\x1a\x22\x28\x32\x3a\x42]", head):
        return "an ONNX model"
    return ""


def _inside(folder: Path) -> Path:
    wanted = folder / "model.safetensors"
    if wanted.is_file():
        return wanted
    if (folder / "saved_model.pb").exists():
        what = "it is a TensorFlow SavedModel folder"
        refuse(folder, what, fix=_EXPORT, code="checkpoint-unsupported")
    files = sorted(p.name for p in folder.iterdir() if p.suffix in SUFFIXES)
    raise InputError(
        f"{folder}: a folder without model.safetensors",
        why=f"it holds {', '.join(files[:5])}" if files else "it holds no weights file",
        fix=f"give the file: {folder / files[0]}" if files else "give the path of a weights file",
        code="checkpoint-folder",
    )


def _missing(path: Path) -> InputError:
    folder = path.parent
    if not folder.is_dir():
        why, near = f"the folder {folder} does not exist", []
    else:
        names = sorted(p.name for p in folder.iterdir())
        near = difflib.get_close_matches(path.name, names, n=1, cutoff=0.5)
        near = near or [name for name in names if name.endswith(SUFFIXES)][:1]
        why = f"the nearest match is {near[0]}" if near else f"{folder} holds no weights file"
    return InputError(
        f"{path}: no such file",
        why=why,
        fix=f"give {folder / near[0]}" if near else "check the path",
        code="checkpoint-missing",
    )
