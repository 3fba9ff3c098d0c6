"""Atomic writes: the only way anything is written."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from seprune.errors import EnvironmentFault, UsageError
from seprune.runtime.checksums import SUMS, is_content, sha256, sums_of
from seprune.runtime.interrupts import unbroken
from seprune.runtime.paths import inside, refuse_elsewhere, refuse_special
from seprune.runtime.text import shell_word
from seprune.runtime.transaction import Staging, clear, put_in_place, sync

if TYPE_CHECKING:
    from torch import Tensor

Fill = Callable[[Path], None]
"""Writes the whole of a file to the path that it is given."""
_SURROGATE = re.compile("[\ud800-\udfff]")


def write_with(path: Path, fill: Fill, *, need: int = 0, fresh: bool = False) -> None:
    """Let `fill` write a temporary file beside `path`, then put it in place in one step.

    Args:
        path: final name; its folder is created. A link there is replaced, never followed.
        fill: writes the whole content to the path that it is given.
        need: bytes that must be free before anything is written.
        fresh: replace nothing, also not what another process writes in the meantime.

    Raises:
        EnvironmentFault: no space left or no permission; the previous file is untouched.
        UsageError: there is something where a fresh file was to be.
    """
    write_together(path.parent, {path.name: fill}, need=need, fresh=fresh)


@unbroken()
def write_together(
    folder: Path, parts: Mapping[str, Fill], *, need: int = 0, fresh: bool = False
) -> None:
    """`write_with` for files of one folder: all of them are replaced, or none, also by a kill.

    What an earlier writer that was killed left in the folder is completed or removed first. A
    first signal waits until the files are in place.
    """
    path, staging = folder / next(iter(parts)), None
    refuse_elsewhere(path)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name in parts:
            refuse_special(folder / name)
        clear(folder)
        need_space(folder, need)
        staging = Staging(folder)
        for name, fill in parts.items():
            path, temporary = folder / name, staging.path / name
            fill(temporary)
            temporary.chmod(0o666 & ~_umask())
            sync(temporary)
        put_in_place(staging, parts, fresh=fresh)
    except OSError as error:
        if fresh and isinstance(error, FileExistsError) and os.path.lexists(path):
            raise UsageError(
                f"{path}: exists already",
                why="nothing is overwritten unasked",
                fix="choose another name",
            ) from error
        raise _environment_fault(path, error) from error
    finally:
        if staging is not None:
            staging.close()


def write_folder(folder: Path, parts: Mapping[str, Fill], *, need: int = 0) -> None:
    """Write files of a folder together with the hashes of all that is content of it then.

    Content is what `write_sums` says.
    """
    hashes: dict[str, str] = {}

    def hashed(name: str, fill: Fill) -> Fill:
        def both(temporary: Path) -> None:
            fill(temporary)
            hashes[name] = sha256(temporary)

        return both

    def sums(temporary: Path) -> None:
        temporary.write_bytes(sums_of(folder, hashes).encode())

    filled = {n: hashed(n, fill) if is_content(n) else fill for n, fill in parts.items()}
    write_together(folder, {**filled, SUMS: sums}, need=need)


def write_bytes(path: Path, content: bytes) -> None:
    """Write `content` to `path` atomically."""
    write_with(path, bytes_of(content), need=len(content))


def write_text(path: Path, content: str, *, fresh: bool = False) -> None:
    """Write `content` to `path` atomically, as UTF-8; to a fresh file only as `write_with` does."""
    encoded = content.encode(errors="backslashreplace")
    write_with(path, bytes_of(encoded), need=len(encoded), fresh=fresh)


def write_json(path: Path, content: Any) -> None:
    """Write `content` to `path` atomically as JSON; NaN and infinities are refused."""
    write_text(path, json_text(content))


def json_text(content: Any) -> str:
    """`content` as seprune spells JSON; NaN and infinities are refused."""
    text = json.dumps(content, indent=1, allow_nan=False, ensure_ascii=False) + "\n"
    # names of files that are no UTF-8 hold surrogates, which only escapes can carry
    return _SURROGATE.sub(lambda found: f"\\u{ord(found.group()):04x}", text)


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
                complete = set(file.keys()) == set(tensors)
        except SafetensorError as error:  # the library's own spelling of an OSError
            number = re.search(r"os error (\d+)", str(error))
            raise OSError(int(number[1]) if number else errno.EIO, str(error)) from error
        if not complete:
            raise OSError(errno.EIO, "what was read back is not what was written")

    return fill


def _sort_metadata(path: Path) -> None:
    """Equal content, equal bytes: the library writes its metadata in an order of chance."""
    with path.open("r+b") as stream:
        length = int.from_bytes(stream.read(8), "little")
        header = json.loads(stream.read(length))
        metadata = dict(sorted(header.pop("__metadata__", {}).items()))
        header = {"__metadata__": metadata, **header}
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode().ljust(length)
        if len(text) == length:
            stream.seek(8)
            stream.write(text)


def taken(path: Path) -> bool:
    """Whether a new file cannot be called `path`, once a killed writer's left-overs are gone."""
    if path.parent.is_dir():
        with suppress(OSError):  # nobody can write there, or they are somebody else's
            clear(path.parent)
    return os.path.lexists(path)


def append_line(path: Path, line: str) -> None:
    """Add one line to `path` and wait until the disk has it; a line that fails leaves nothing."""
    content = line.encode() + b"\n"
    refuse_elsewhere(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path, "ab", buffering=0, opener=_open_no_link) as stream:
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
            sync(path.parent)
    except OSError as error:
        raise _environment_fault(path, error) from error


def remove_folders(home: Path, pattern: str) -> None:
    """Remove the folders in `home` whose names match; links are not followed."""
    for folder in home.glob(pattern):
        if folder.is_dir() and not folder.is_symlink():
            shutil.rmtree(folder)


def tidy(folder: Path) -> None:
    """Complete or remove what writers that were killed left in `folder` and below it.

    Raises:
        InputError: a folder below it is a link, which writing would follow.
        OSError: something cannot be read or written.
    """
    for place, folders, _ in os.walk(folder):
        clear(Path(place))
        for name in folders:
            inside(Path(place), name)


def copy(source: Path, target: Path) -> None:
    """Copy a file to `target` atomically."""

    def fill(temporary: Path) -> None:
        shutil.copyfile(source, temporary)

    write_with(target, fill, need=source.stat().st_size)


@contextmanager
def log(path: Path) -> Iterator[IO[bytes]]:
    """`path` opened at its end, for what a child process says."""
    refuse_elsewhere(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        stream = open(path, "ab", opener=_open_no_link)  # noqa: SIM115
    except OSError as error:
        raise _environment_fault(path, error) from error
    with stream:
        yield stream


def write_sums(folder: Path) -> None:
    """Write `SHA256SUMS` over the content of `folder` (the format of sha256sum).

    Content is every file directly in it but the card with its picture, which people edit, what was
    measured of it, which this machine and its paths are part of, hidden files and locks.
    """
    write_text(folder / SUMS, sums_of(folder, {}))


def scratch(size: int) -> Tensor:
    """`size` zero bytes in a file without a name under TMPDIR, which goes when the tensor does.

    Raises:
        EnvironmentFault: the disk has too little free space.
    """
    import torch

    folder = Path(tempfile.gettempdir())
    try:
        need_space(folder, size)
        with tempfile.NamedTemporaryFile(dir=folder) as stream:
            stream.truncate(size)
            return torch.from_file(stream.name, shared=True, size=size, dtype=torch.uint8)
    except OSError as error:
        raise _environment_fault(folder, error) from error


def need_space(folder: Path, size: int) -> None:
    """Refuse to start a write of `size` bytes where the disk under `folder` has less free."""
    if size and shutil.disk_usage(folder).free < size:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def _open_no_link(path: str, flags: int) -> int:
    """A pipe that nobody reads is an error, not waited for; a hard link gets its own content."""
    flags |= os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK
    handle = os.open(path, flags, 0o666)
    if os.fstat(handle).st_nlink > 1:
        os.close(handle)
        copy(Path(path), Path(path))
        handle = os.open(path, flags, 0o666)
    return handle


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _environment_fault(path: Path, error: OSError) -> EnvironmentFault:
    fixes = {
        errno.ENOSPC: "free some space and run the same command again",
        errno.EDQUOT: "free some of what you may use (quota -s), and run the same command again",
        errno.EFBIG: "raise the file-size limit (ulimit -f) and run the same command again",
        errno.EACCES: "choose a folder you may write to with --out",
        errno.EROFS: "choose a folder you may write to with --out",
        errno.ENAMETOOLONG: "choose a shorter name",
        errno.EISDIR: "choose another name: there is a folder of this one",
        errno.ELOOP: f"it is a link, which is never followed for writing: rm {shell_word(path)}",
    }
    return EnvironmentFault(
        f"{path}: cannot be written",
        why=os.strerror(error.errno) if error.errno else str(error),
        fix=fixes.get(error.errno or 0, "check the disk and run the same command again"),
    )
