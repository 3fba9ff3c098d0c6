"""Let the Nth file operation below a folder fail, in the process that calls `install`.

Operations are what Python code does to files: opening, writing, fsync, replacing, unlinking, making
folders; and `save_file` of safetensors, whose writes Python does not see, as one operation that
gets half of its bytes out.
"""

from __future__ import annotations

import builtins
import errno
import io
import os
import signal
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import safetensors.torch
from safetensors import SafetensorError

DIED = 137
CALLS = (
    *("replace", "rename", "unlink", "rmdir", "mkdir", "chmod"),
    *("fsync", "ftruncate", "truncate"),
)
FULL = ("ENOSPC", "EDQUOT")
ROOM = ("open", "write", "mkdir", "save_file")  # what needs room on the disk


class _Plan:
    """What fails, and how many operations there were."""

    def __init__(self, root: str, at: int, how: str, log: str | None, only: Collection[str]):
        self.root, self.at, self.how, self.log = os.path.realpath(root), at, how, log
        self.count, self.only = 0, only

    def due(self, name: str, path: object, *, writing: bool = True) -> bool:
        """Whether this operation fails; it is counted if it concerns the folder."""
        if self.only and name not in self.only:
            return False
        if isinstance(path, int):
            path = f"/proc/self/fd/{path}"
        if not os.path.realpath(os.fsdecode(path)).startswith(self.root):  # type: ignore[call-overload]
            return False
        self.count += 1
        if self.log:
            line = f"{self.count} {name} {os.path.basename(os.path.realpath(os.fsdecode(path)))}\n"  # type: ignore[call-overload]
            handle = _open(self.log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            os.write(handle, line.encode())
            os.close(handle)
        if self.how in FULL:  # from then on, and never where nothing is written
            return self.count >= self.at and writing and name in ROOM
        if self.how == "EROFS":  # the system took a disk that failed for one to be read
            return self.count >= self.at and writing and name != "fsync"
        if self.how == "EACCES" and self.count > self.at:
            return writing and name != "unlink"
        return self.count == self.at

    def act(self) -> None:
        """Fail, end the process as a kill would, or get a signal and go on."""
        if self.how == "exit":
            os._exit(DIED)
        if self.how.startswith("SIG"):
            os.kill(os.getpid(), getattr(signal, self.how))
            return
        number = getattr(errno, self.how)
        raise OSError(number, os.strerror(number))


_open = os.open


def install(
    root: str,
    at: int = 0,
    how: str = "exit",
    log: str | None = None,
    only: Collection[str] = (),
) -> None:
    """From now on, operation number `at` below `root` fails.

    Args:
        how: the name of an errno or of a signal, or `exit`.
        log: a file that gets one line an operation.
        only: names of operations; no others count.
    """
    plan = _Plan(root, at, how, log, only)

    def wrapped(function: Callable[..., Any], name: str) -> Callable[..., Any]:
        def call(path: Any, *rest: Any, **named: Any) -> Any:
            folder = named.get("dir_fd")
            if plan.due(name, path if folder is None else f"/proc/self/fd/{folder}/{path}"):
                plan.act()
            return function(path, *rest, **named)

        return call

    for name in CALLS:
        setattr(os, name, wrapped(getattr(os, name), name))
    os.remove = os.unlink
    os.open = _opening(os.open, plan)
    builtins.open = io.open = _file_opening(builtins.open, plan)  # type: ignore[assignment]
    safetensors.torch.save_file = _saving(safetensors.torch.save_file, plan)


def _opening(function: Callable[..., Any], plan: _Plan) -> Any:
    def call(path: Any, flags: int, *rest: Any, **named: Any) -> int:
        writing = bool(flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT))
        if plan.due("open", path, writing=writing):
            plan.act()
        return int(function(path, flags, *rest, **named))

    return call


def _file_opening(function: Callable[..., Any], plan: _Plan) -> Any:
    def call(path: Any, mode: str = "r", *rest: Any, **named: Any) -> Any:
        writing = any(letter in mode for letter in "wax+")
        if not isinstance(path, int) and plan.due("open", path, writing=writing):
            plan.act()
        file = function(path, mode, *rest, **named)
        return _File(file, path, plan) if writing and not isinstance(path, int) else file

    return call


class _File:
    """A file whose writes count; one that fails gets half of its bytes out."""

    def __init__(self, file: Any, path: Any, plan: _Plan):
        self.file, self.path, self.plan = file, path, plan

    def write(self, content: Any) -> int:
        if self.plan.due("write", self.path):
            self.file.write(content[: len(content) // 2])
            self.file.flush()
            self.plan.act()
        return int(self.file.write(content))

    def __enter__(self) -> _File:
        self.file.__enter__()
        return self

    def __exit__(self, *error: object) -> Any:
        return self.file.__exit__(*error)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.file, name)


def _saving(function: Callable[..., Any], plan: _Plan) -> Any:
    def call(tensors: Any, path: Any, *rest: Any, **named: Any) -> None:
        if not plan.due("save_file", path):
            function(tensors, path, *rest, **named)
            return
        handle = _open(path, os.O_WRONLY | os.O_CREAT)
        os.write(handle, b"half of a header")
        try:
            plan.act()
        except OSError as error:  # as the library spells it
            raise SafetensorError(
                f"Error while serializing: I/O error: {error.strerror} (os error {error.errno})"
            ) from None

    return call


def write_everything(folder: str, content: str) -> None:
    """Each way that seprune has to write, once."""
    import torch

    from seprune.errors import SepruneError
    from seprune.runtime import files

    out = Path(folder)
    parts = {
        "a": files.bytes_of(content.encode()),
        "model.safetensors": files.tensors_of({"w": torch.full((50,), len(content))}, {}),
    }
    try:
        files.write_text(out / "text", content)
        files.write_json(out / "new" / "json", {"content": content})
        files.write_folder(out / "folder", parts, need=10)
        files.append_line(out / "lines", content)
    except SepruneError as error:
        print(error)
        raise SystemExit(error.exit_status) from None
