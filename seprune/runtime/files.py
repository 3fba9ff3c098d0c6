"""Atomic writes and hashes: the only way anything is written."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from seprune.errors import EnvironmentFault, InputError

if TYPE_CHECKING:
    from torch import Tensor

Fill = Callable[[Path], None]
"""Writes the whole of a file to the path that it is given."""
SUMS, CARD = "SHA256SUMS", "README.md"
UNFINISHED = ".seprune.part"
"""How names of temporary files end; nobody else's do."""


def write_with(path: Path, fill: Fill, *, need: int = 0) -> None:
    """Let `fill` write a temporary file beside `path`, then put it in place in one step.

    Args:
        path: final name; its folder is created.
        fill: writes the whole content to the path that it is given.
        need: bytes that must be free before anything is written.

    Raises:
        EnvironmentFault: no space left or no permission; the previous file is untouched.
    """
    write_together({path: fill}, need=need)


def write_together(parts: Mapping[Path, Fill], *, need: int = 0) -> None:
    """`write_with` for files that belong together: none is put in place until all are written."""
    path, made = next(iter(parts)), dict[Path, Path]()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        need_space(path.parent, need)
        for path, fill in parts.items():
            path.parent.mkdir(parents=True, exist_ok=True)
            made[path] = _temporary(path)
            fill(made[path])
            made[path].chmod(0o666 & ~_umask())
            _sync(made[path])
        for path, temporary in made.items():
            temporary.replace(path)
        for folder in {path.parent for path in made}:
            _sync(folder)
    except OSError as error:
        raise _environment_fault(path, error) from error
    finally:
        for temporary in made.values():
            with suppress(OSError):  # what is wrong with the disk was said; `sweep` comes later
                temporary.unlink(missing_ok=True)


def write_folder(folder: Path, parts: Mapping[str, Fill], *, need: int = 0) -> None:
    """Write files of a folder together with the hashes of all that it then holds."""
    hashes: dict[str, str] = {}

    def hashed(name: str, fill: Fill) -> Fill:
        def both(temporary: Path) -> None:
            fill(temporary)
            hashes[name] = sha256(temporary)

        return both

    def sums(temporary: Path) -> None:
        temporary.write_bytes(_sums_of(folder, hashes).encode())

    filled = {folder / name: hashed(name, fill) for name, fill in parts.items()}
    write_together({**filled, folder / SUMS: sums}, need=need)


def write_bytes(path: Path, content: bytes) -> None:
    """Write `content` to `path` atomically."""
    write_with(path, bytes_of(content), need=len(content))


def write_text(path: Path, content: str) -> None:
    """Write `content` to `path` atomically, as UTF-8."""
    write_bytes(path, content.encode())


def write_json(path: Path, content: Any) -> None:
    """Write `content` to `path` atomically as JSON; NaN and infinities are refused."""
    write_text(path, json_text(content))


def json_text(content: Any) -> str:
    """`content` as seprune spells JSON; NaN and infinities are refused."""
    return json.dumps(content, indent=1, allow_nan=False, ensure_ascii=False) + "\n"


def bytes_of(content: bytes) -> Fill:
    """What writes `content` and compares what is read back."""

    def fill(temporary: Path) -> None:
        temporary.write_bytes(content)
        if temporary.read_bytes() != content:
            raise OSError(errno.EIO, "what was read back is not what was written")

    return fill


def tensors_of(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> Fill:
    """What writes a .safetensors file and finds every tensor of it again, at its full length."""

    def fill(temporary: Path) -> None:
        from safetensors import SafetensorError, safe_open
        from safetensors.torch import save_file

        try:
            save_file(dict(tensors), temporary, metadata=dict(metadata))
            _sort_metadata(temporary)
            with safe_open(temporary, framework="pt") as file:
                whole = set(file.keys()) == set(tensors)
        except SafetensorError as error:  # the library's own spelling of an OSError
            number = re.search(r"os error (\d+)", str(error))
            raise OSError(int(number[1]) if number else errno.EIO, str(error)) from error
        if not whole:
            raise OSError(errno.EIO, "what was read back is not what was written")

    return fill


def _sort_metadata(path: Path) -> None:
    """Equal content, equal bytes: the library writes its metadata in an order of chance."""
    with path.open("r+b") as stream:
        length = int.from_bytes(stream.read(8), "little")
        header = json.loads(stream.read(length))
        metadata = dict(sorted(header.pop("__metadata__", {}).items()))
        whole = {"__metadata__": metadata, **header}
        text = json.dumps(whole, separators=(",", ":"), ensure_ascii=False).encode().ljust(length)
        if len(text) == length:
            stream.seek(8)
            stream.write(text)


def append_line(path: Path, line: str) -> None:
    """Add one line to `path` and wait until the disk has it; a line that fails leaves nothing."""
    content = line.encode() + b"\n"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("ab", buffering=0) as stream:
            before = stream.tell()
            try:
                if stream.write(content) != len(content):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                os.fsync(stream.fileno())
            except OSError:
                with suppress(OSError):  # a device cannot be cut back
                    stream.truncate(before)
                raise
        if not before:
            _sync(path.parent)
    except OSError as error:
        raise _environment_fault(path, error) from error


def sweep(folder: Path) -> None:
    """Remove what writers that were killed left under `folder`; only its holder may call this."""
    for left in folder.rglob(f".*{UNFINISHED}"):
        left.unlink(missing_ok=True)


def copy(source: Path, target: Path) -> None:
    """Copy a file to `target` atomically."""

    def fill(temporary: Path) -> None:
        shutil.copyfile(source, temporary)

    write_with(target, fill, need=source.stat().st_size)


@contextmanager
def log(path: Path) -> Iterator[IO[bytes]]:
    """`path` opened at its end, for what a child process says."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        stream = path.open("ab")
    except OSError as error:
        raise _environment_fault(path, error) from error
    with stream:
        yield stream


def read_json(path: Path) -> Any:
    """The JSON document in `path`.

    Raises:
        InputError: missing, unreadable or not JSON; names the line.
    """
    try:
        return json.loads(path.read_bytes())
    except FileNotFoundError as error:
        raise InputError(
            f"{path}: no such file", why="nothing is there", fix="check the path"
        ) from error
    except OSError as error:
        raise InputError(
            f"{path}: cannot be read", why=error.strerror or str(error), fix=f"ls -l '{path}'"
        ) from error
    except (ValueError, RecursionError) as error:  # RecursionError: brackets in brackets
        raise InputError(
            f"{path}: not valid JSON",
            why=str(error),
            fix="restore the file or run the stage that writes it again",
        ) from error


def sha256(path: Path) -> str:
    """The hexadecimal SHA-256 of a file."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def write_sums(folder: Path) -> None:
    """Write `SHA256SUMS` over the content of `folder` (the format of sha256sum).

    Content is every file directly in it but the card, which people edit, hidden files and locks.
    """
    write_text(folder / SUMS, _sums_of(folder, {}))


def check_sums(folder: Path, sums: str = SUMS, *, need: Collection[str] = ()) -> list[str]:
    """Names of the files in `folder` that are missing or differ from its `SHA256SUMS`.

    Args:
        sums: another name of that file.
        need: names that it has to list.
    """
    try:
        text = (folder / sums).read_text()
    except (OSError, UnicodeDecodeError):
        return [sums]
    lines = text.split("\n")
    if lines.pop():  # the last line is not whole
        return [sums]
    listed = {line.partition("  ")[2] for line in lines}
    wrong = [sums] if not lines or not listed.issuperset(need) else []
    for line in lines:
        digest, _, name = line.partition("  ")
        if not name or "/" in name or not holds(folder / name, digest):
            wrong.append(name or line)
    return wrong


def need_space(folder: Path, size: int) -> None:
    """Refuse to start a write of `size` bytes that the disk under `folder` has no room for."""
    if size and shutil.disk_usage(folder).free < size:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def holds(path: Path, digest: str) -> bool:
    """Whether `path` is a file with this SHA-256."""
    try:
        return path.is_file() and sha256(path) == digest
    except OSError:  # a name that cannot be, a file that cannot be read: either way not whole
        return False


def _sums_of(folder: Path, known: Mapping[str, str]) -> str:
    """The lines of `SHA256SUMS`: `known` hashes, and those of whatever else is there."""
    there = {p.name: p for p in folder.iterdir() if p.is_file() and _is_content(p.name)}
    hashes = {name: known.get(name) or sha256(path) for name, path in there.items()} | dict(known)
    return "".join(f"{hashes[name]}  {name}\n" for name in sorted(hashes))


def _is_content(name: str) -> bool:
    return name not in (SUMS, CARD, "lock", "lock.json") and not name.startswith(".")


def _temporary(path: Path) -> Path:
    handle, name = tempfile.mkstemp(UNFINISHED, f".{path.name}.", path.parent)
    os.close(handle)
    return Path(name)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _environment_fault(path: Path, error: OSError) -> EnvironmentFault:
    fixes = {
        errno.ENOSPC: "free some space and run the same command again",
        errno.EFBIG: "raise the file-size limit (ulimit -f) and run the same command again",
        errno.EACCES: "choose a folder you may write to with --out",
        errno.EROFS: "choose a folder you may write to with --out",
    }
    return EnvironmentFault(
        f"{path}: cannot be written",
        why=os.strerror(error.errno) if error.errno else str(error),
        fix=fixes.get(error.errno or 0, "check the disk and run the same command again"),
    )
