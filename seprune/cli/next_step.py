"""The next command as it can be typed: what `prune`, `finetune` and `export` end with."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path

from seprune.cli import console
from seprune.cli.options import NetworkOptions, WorkOptions
from seprune.models.usercode import is_code


def typed() -> str:
    """The command line of this process."""
    return shlex.join(["seprune", *sys.argv[1:]])


def after_prune(
    network: NetworkOptions, data: str | None, out: Path, work: WorkOptions, *, distils: bool
) -> str:
    """Train it on where there are images, else export it.

    Args:
        distils: whether its parent can teach it.
    """
    if data is None:
        return _export(out, None, network.allow_code)
    words = ["seprune", "finetune", str(out), "--data", data]
    if distils:
        words += _teacher(network, work)
    words += ["--out", f"{_plain(out)}-tuned", *_shared(network, work)]
    return shlex.join(words)


def after_finetune(network: NetworkOptions, data: str, out: Path, *, exports: bool) -> str:
    """Export it, or look at its report where it cannot be exported."""
    if exports:
        return _export(out, data, network.allow_code)
    return look(out)


def look(folder: Path) -> str:
    """The page of what was measured."""
    return shlex.join(["seprune", "report", str(folder), "--html", f"{_plain(folder)}.html"])


def show(command: str) -> None:
    """The last line of a command."""
    console.tell(f"next: {command}")


def _export(folder: Path, data: str | None, allow_code: bool) -> str:
    words = ["seprune", "export", str(folder), "--onnx", f"{_plain(folder)}.onnx"]
    words += ["--data", data] if data is not None else []
    return shlex.join([*words, *(["--allow-code"] if allow_code else [])])


def _teacher(network: NetworkOptions, work: WorkOptions) -> list[str]:
    """The network that was cut, as the teacher; none where its weights are random or its arguments
    were overridden, which a teacher's cannot be."""
    zoo = network.model.startswith(("timm/", "torchvision/")) and network.pretrained
    known = network.checkpoint is not None or zoo or _holds_weights(network.model)
    if not known or any(key.startswith("model.") for key in work.set or ()):
        return []
    words = ["--teacher", network.model]
    words += ["--teacher-checkpoint", network.checkpoint] if network.checkpoint else []
    return words + (["--allow-teacher-code"] if is_code(network.model) else [])


def _holds_weights(model: str) -> bool:
    return model.startswith("hf-hub:") or Path(model).is_dir()


def _shared(network: NetworkOptions, work: WorkOptions) -> list[str]:
    """What this command was given that the next one needs as well."""
    words = ["--allow-code"] if network.allow_code else []
    words += ["--device", work.device] if work.device != "auto" else []
    for key in work.set or ():
        words += ["--set", key] if key.startswith("data.") else []
    return words


def _plain(folder: Path) -> str:
    """The folder's path without a dot at its end, which would hide what is written beside it."""
    return str(folder if folder.name else folder.absolute())
